#include "ops/risk_map.h"

#include <cmath>

namespace riskmap {
math::RiskCurve RiskMapOptions::curve(double range_low, double range_high) const {
  return math::make_risk_curve(scheme, std::log(base), alpha, scale, range_low, range_high);
}

}  // namespace riskmap
