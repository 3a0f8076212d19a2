// Risk-weighted cross-entropy and soft Dice of one voxel (or one vector of voxels), and their derivatives.
#pragma once

#include "math/softmax.h"

namespace riskmap::math {

// Label smoothing as in torch.nn.functional.cross_entropy:
//   CE = (1 - eps) c[y] (lse - x_y) + (eps / C) sum_k c[k] (lse - x_k)
// Any constant may be taken off lse and all x. hot = (1 - eps) c[y]; smooth_total = (eps / C) sum_k c[k]; smooth_dot =
// (eps / C) sum_k c[k] x_k.
template <class V>
RISKMAP_HD V cross_entropy(V lse, V x_target, V hot, V smooth_total, V smooth_dot) {
  return hot * (lse - x_target) + (smooth_total * lse - smooth_dot);
}

// What a kernel is compiled for. The first two, the usual calls, know no class weights, label smoothing, squared
// probabilities, maps of losses or of gradients, gradient of the risk, or cross-entropy of the foreground alone; kAny
// asks for everything when it runs.
enum class LossKind : int { kCrossEntropy, kDice, kAny };

// The gradient of one voxel. Of class k it is
//   e_k (of_exp + of_slope overall_k [e_k where P is squared]) - scaled_risk (eps / C) c[k] + (k = y ? at_label : 0)
// with e_k = exp(x_k - max); overall and hit as in DiceTerm.
template <class V>
struct VoxelGradient {
  V of_exp, of_slope, at_label;
};

// hot: the risk times what CE has at the label; total: what it has of every class's share. inverse: 1 / sum_k e_k.
template <class V>
RISKMAP_HD VoxelGradient<V> cross_entropy_gradient(V inverse, V hot, V total) {
  return {V(inverse * (hot + total)), V{}, V(-hot)};
}

// Adds the Dice: slope_sum = sum_k e_k overall_k [e_k where P is squared], hit_sum = e_y hit_y.
template <class V>
RISKMAP_HD void add_dice_gradient(VoxelGradient<V>& voxel, V inverse, V slope_sum, V hit_sum, bool squared) {
  voxel.of_slope = squared ? V((inverse + inverse) * inverse) : inverse;
  const V of_hit = hit_sum * inverse;
  voxel.of_exp = voxel.of_exp - inverse * (voxel.of_slope * slope_sum + of_hit);
  voxel.at_label = voxel.at_label + of_hit;
}

// d P / d pi times d loss / d P, see DiceTerm.
template <bool kSquared, class V>
RISKMAP_HD V dice_overall(V pi, V overall) {
  if constexpr (kSquared) return (pi + pi) * overall;
  return overall;
}

// Overlapping regions, each a yes-or-no question with a sigmoid. t is 1 inside the region, smoothed to
// t (1 - eps) + eps / 2.
template <class V>
struct RegionTerm {
  V loss;  // |x| (x < 0 ? t : 1 - t) + log(1 + exp(-|x|))
  V pi;    // sigmoid(x)
};

template <class V>
RISKMAP_HD RegionTerm<V> region_term(V x, V t) {
  using Element = typename Traits<V>::Element;
  const V zero{};
  const V one = V{} + Element(1);
  const auto negative = x < zero;
  const V size = select(negative, V(-x), x);  // a NaN stays
  const V e = exp_of_negative(V(-size));
  const V inverse = math::inverse(V(one + e));
  const V wrong = select(negative, t, V(one - t));
  const V linear = select(wrong == zero, zero, V(size * wrong));  // an infinite logit that is right costs nothing
  return {V(linear + log1p_unit(e)), select(negative, V(e * inverse), inverse)};
}

// d (weight BCE) / d x with a smoothed t.
template <class V>
RISKMAP_HD V region_cross_entropy_grad(V pi, V t, V weight) {
  return weight * (pi - t);
}

// d D / d x: t is not smoothed; overall and hit as in DiceTerm.
template <bool kSquared, class V>
RISKMAP_HD V region_dice_grad(V pi, V t, V overall, V hit) {
  using Element = typename Traits<V>::Element;
  return pi * (V{} + Element(1) - pi) * (t * hit + dice_overall<kSquared>(pi, overall));
}

// The Dice family: the loss of one class from its sums over voxels,
//   1 - (2 I + nr) / max(2 ((1 - alpha - beta) I + alpha P + beta G) + dr, 1e-8)
// with I = sum pi 1[y = c], P = sum pi, or sum pi^2 where it is squared, G = sum 1[y = c]. alpha weights false
// positives, beta false negatives: 1/2 and 1/2 are Dice, 1 and 1 Jaccard, others Tversky.
struct DiceFormula {
  double smooth_nr, smooth_dr, alpha, beta;
};

inline constexpr double kDiceMinDenominator = 1e-8;

struct DiceTerm {
  double loss;
  double overall;  // d loss / d P; at a voxel see dice_overall
  double hit;      // d loss / d I, added where y = c
};

RISKMAP_HD DiceTerm dice_term(double intersection, double predicted, double labelled, const DiceFormula& formula) {
  const double of_both = 1 - formula.alpha - formula.beta;
  const double sum =
      2 * (of_both * intersection + formula.alpha * predicted + formula.beta * labelled) + formula.smooth_dr;
  const bool clamped = sum <= kDiceMinDenominator;  // neither predicted nor labelled; NaN is neither
  const double denominator = clamped ? kDiceMinDenominator : sum;
  const double score = (2 * intersection + formula.smooth_nr) / denominator;
  const double by_sum = clamped ? 0 : 2 * score / denominator;
  return {1 - score, formula.alpha * by_sum, of_both * by_sum - 2 / denominator};
}

}  // namespace riskmap::math
