#include "ops/risk_map.h"

#include <torch/csrc/stable/library.h>

#include "ops/transferability_map.h"

namespace riskmap {

math::RiskCurve RiskMapOptions::curve(double range_low, double range_high) const {
  return math::make_risk_curve(scheme, std::log(base), alpha, scale, range_low, range_high);
}

void check_risk_map(const Tensor& source, const Tensor& target, const Tensor& conditional,
                    const OptionalTensor& regions, const RiskMapOptions& options) {
  const char* op = "risk_map";
  check_transferability_map(op, source, target, conditional, regions);
  const int scheme = static_cast<int>(options.scheme);
  check(scheme >= 0 && scheme <= 2, op, ": scheme must be 0 (exponential), 1 (power) or 2 (linear), got ", scheme);
  check(std::isfinite(options.base) && options.base > 0, op, ": base must be finite and above 0, got ", options.base);
  check(options.alpha > 0 && options.alpha <= 1, op, ": alpha must be within (0, 1], got ", options.alpha);
  check(std::isfinite(options.scale) && options.scale >= 0, op, ": scale must be finite and at least 0, got ",
        options.scale);
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

STABLE_TORCH_LIBRARY_FRAGMENT(riskmap_ext, m) {
  // scheme: 0 exponential, 1 power, 2 linear. low and high: the range of hardness, or none for that of each image.
  m.def(
      "risk_map(Tensor source, Tensor target, Tensor conditional, Tensor? regions, int scheme, float base, float "
      "alpha, float scale, "
      "float? low, float? high, int? background, int ignore_index) -> Tensor");
}
