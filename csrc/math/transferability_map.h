// T = log max(p, 1e-6) with p = sum_z P(y|z) theta_z (LEEP, Nguyen et al., ICML 2020).
#pragma once

#include "math/elementary.h"

namespace riskmap::math {

inline constexpr double kMinLikelihood = 1e-6;

template <class V>
RISKMAP_HD V transferability(V p) {
  using Element = typename Traits<V>::Element;
  const V floor = V{} + Element(kMinLikelihood);
  return minimum(V{}, log(select(p < floor, floor, p)));  // rounding may pass 0; a NaN stays
}

}  // namespace riskmap::math
