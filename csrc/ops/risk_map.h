#pragma once

#include "math/risk_map.h"
#include "ops/check.h"

namespace riskmap {

struct RiskMapOptions {
  math::Scheme scheme;
  double base, alpha, scale;
  std::optional<double> low, high;  // both or none; none: the range of each image
  std::optional<int64_t> background;
  int64_t ignore_index;

  // low and high are given, or the scheme needs none: one pass.
  bool one_pass() const { return low.has_value() || scheme == math::Scheme::kPower; }
  math::RiskCurve curve(double range_low, double range_high) const;
};

}  // namespace riskmap
