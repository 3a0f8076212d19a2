#include "ops/risk_map.h"

#include <cmath>

#include "ops/library.h"

namespace riskmap {

math::RiskCurve RiskMapOptions::curve(double range_low, double range_high) const {
  return math::make_risk_curve(scheme, std::log(base), alpha, scale, range_low, range_high);
}

}  // namespace riskmap

RISKMAP_SCHEMAS(m) {
  // scheme: 0 exponential, 1 power, 2 linear. low and high: the range of hardness, or none for that of each image.
  m.def(
      "risk_map(Tensor source, Tensor target, Tensor conditional, Tensor? regions, int scheme, float base, float "
      "alpha, float scale, "
      "float? low, float? high, int? background, int ignore_index) -> Tensor");
}
