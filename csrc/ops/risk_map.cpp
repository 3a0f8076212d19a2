#include "ops/risk_map.h"

#include "ops/transferability_map.h"

namespace riskmap {
namespace {

constexpr double kMaxWeight = 1e38;  // weights are float32

}  // namespace

math::RiskCurve RiskMapOptions::curve(double range_low, double range_high) const {
  return math::make_risk_curve(scheme, std::log(base), alpha, scale, range_low, range_high);
}

void check_risk_map(const Tensor& source, const Tensor& target, const Tensor& conditional,
                    const OptionalTensor& regions, const RiskMapOptions& options) {
  const char* op = "risk_map";
  check_transferability_map(op, source, target, conditional, regions);
  const int scheme = static_cast<int>(options.scheme);
  check(scheme >= 0 && scheme <= 2, op, ": scheme must be 0 (exponential), 1 (power) or 2 (linear), got ", scheme);
  check(options.base > 0 && options.base <= kMaxWeight, op, ": base must be within (0, 1e38], got ", options.base);
  check(options.alpha > 0 && options.alpha <= 1, op, ": alpha must be within (0, 1], got ", options.alpha);
  check(options.scale >= 0 && options.scale <= kMaxWeight, op, ": scale must be within [0, 1e38], got ", options.scale);
  check(!options.background || (*options.background >= 0 && *options.background < conditional.size(0)), op,
        ": background must be a class 0 to ", conditional.size(0) - 1, " or none, got ",
        options.background.value_or(0));
  check(options.low.has_value() == options.high.has_value(), op, ": range must have both ends or none");
  if (options.low) {
    check(std::isfinite(*options.low) && std::isfinite(*options.high) && *options.low <= *options.high, op,
          ": range must be finite with low <= high, got (", *options.low, ", ", *options.high, ")");
  }
}

}  // namespace riskmap
