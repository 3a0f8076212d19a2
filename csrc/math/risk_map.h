// Voxel weight from the hardness h = -T >= 0 (Duan et al., ICASSP 2025).
#pragma once

#include "math/elementary.h"

namespace riskmap::math {

enum class Scheme : int { kExponential = 0, kPower = 1, kLinear = 2 };

// The weight is exp(rate * t) or 1 + rate * t with t = clip((h - low) * inverse_range, 0, 1); for the power scheme
// t = h. See make_risk_curve.
template <class Element>
struct RiskCurveOf {
  Scheme scheme;
  Element rate;
  Element low;
  Element inverse_range;  // 0 where the range is degenerate: then t = 0 and the weight is 1
};
using RiskCurve = RiskCurveOf<double>;

inline constexpr double kMinHardnessRange = 0.1;

// base: exponential, w = base^t. alpha: power, w = p^-alpha = exp(alpha h). scale: linear, w = 1 + scale * t.
RISKMAP_HD RiskCurve make_risk_curve(Scheme scheme, double log_base, double alpha, double scale, double low,
                                     double high) {
  const double rate = scheme == Scheme::kExponential ? log_base : scheme == Scheme::kPower ? alpha : scale;
  const bool degenerate = !(high - low >= kMinHardnessRange);
  return {scheme, rate, degenerate ? 0.0 : low, degenerate ? 0.0 : 1.0 / (high - low)};
}

template <class V, class Number>
RISKMAP_HD V risk_weight(V hardness, const RiskCurveOf<Number>& curve) {
  using Element = typename Traits<V>::Element;
  if (curve.scheme == Scheme::kPower) return exp(V(hardness * Element(curve.rate)));
  const V zero{};
  const V one = V{} + Element(1);
  V t = (hardness - Element(curve.low)) * Element(curve.inverse_range);
  t = select(t < zero, zero, t);
  t = select(t > one, one, t);
  return curve.scheme == Scheme::kExponential ? exp(V(t * Element(curve.rate))) : V(one + t * Element(curve.rate));
}

}  // namespace riskmap::math
