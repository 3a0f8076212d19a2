// The schemas of all ops. In the CPU library alone: every backend checks the contract with the other files of this
// folder, but a schema may be defined once.
#include "ops/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(RISKMAP_NAMESPACE, m) {
  m.def("leep_statistics(Tensor source, Tensor target, Tensor? regions, int num_classes, int ignore_index) -> Tensor");
  m.def(
      "transferability_map(Tensor source, Tensor target, Tensor conditional, Tensor? regions, int ignore_index) -> "
      "Tensor");
  // scheme: 0 exponential, 1 power, 2 linear. low and high: the range of hardness, or none for that of each image.
  m.def(
      "risk_map(Tensor source, Tensor target, Tensor conditional, Tensor? regions, int scheme, float base, float "
      "alpha, float scale, "
      "float? low, float? high, int? background, int ignore_index) -> Tensor");
  // normalization: 0 foreground, 1 batch_foreground, 2 valid, 3 batch_valid, 4 weighted, 5 none. ce_voxels: 0 valid, 1
  // foreground. reduction: 0 mean, 1 sum, 2 none.
  m.def(
      "weighted_loss(Tensor logits, Tensor target, Tensor? risk, Tensor? class_weight, Tensor? foreground, "
      "Tensor? regions, Tensor? dice_class_weight, int ignore_index, int? background, float foreground_floor, "
      "int normalization, int ce_voxels, int reduction, float label_smoothing, float ce_weight, float dice_weight, "
      "float smooth_nr, float smooth_dr, float alpha, float beta, bool squared_pred, bool include_background, "
      "bool batch_dice) "
      "-> (Tensor loss, Tensor scale, Tensor dice_slopes)");
  m.def(
      "_weighted_loss_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor? risk, Tensor? class_weight, "
      "Tensor? foreground, Tensor? regions, Tensor scale, Tensor dice_slopes, int ignore_index, int? background, "
      "int ce_voxels, float label_smoothing, bool squared_pred, bool grad_risk) "
      "-> (Tensor grad_logits, Tensor grad_risk)");
  // The same with the gradient of the logits in their memory.
  m.def(
      "_weighted_loss_backward_(Tensor grad_loss, Tensor(a!) logits, Tensor target, Tensor? risk, "
      "Tensor? class_weight, Tensor? foreground, Tensor? regions, Tensor scale, Tensor dice_slopes, int ignore_index, "
      "int? background, int ce_voxels, float label_smoothing, bool squared_pred, bool grad_risk) -> Tensor grad_risk");
  // Cross-entropy only, reduced: loss and gradient for grad_loss = 1 in one pass over the logits.
  m.def(
      "_weighted_loss_with_gradient(Tensor logits, Tensor target, Tensor? risk, Tensor? class_weight, "
      "Tensor? foreground, Tensor? regions, int ignore_index, int? background, float foreground_floor, "
      "int normalization, int ce_voxels, int reduction, float label_smoothing, float ce_weight, bool grad_risk) "
      "-> (Tensor loss, Tensor grad_logits, Tensor grad_risk)");
  m.def(
      "_weighted_loss_with_gradient_(Tensor(a!) logits, Tensor target, Tensor? risk, Tensor? class_weight, "
      "Tensor? foreground, Tensor? regions, int ignore_index, int? background, float foreground_floor, "
      "int normalization, int ce_voxels, int reduction, float label_smoothing, float ce_weight, bool grad_risk) "
      "-> (Tensor loss, Tensor grad_risk)");
  // weighted_loss in two steps, for sums that come from several processes: sums [B, 5 + 3 C] as math::LossColumn has
  // them, and what becomes of them.
  m.def(
      "_weighted_loss_sums(Tensor logits, Tensor target, Tensor? risk, Tensor? class_weight, Tensor? foreground, "
      "Tensor? regions, int ignore_index, int? background, int ce_voxels, float label_smoothing, bool squared_pred) "
      "-> Tensor");
  m.def(
      "_weighted_loss_finish(Tensor sums, Tensor? class_weight, Tensor? dice_class_weight, int? excluded_class, "
      "float foreground_floor, int normalization, int reduction, float ce_weight, float dice_weight, float smooth_nr, "
      "float smooth_dr, float alpha, float beta, bool batch_dice, bool as_double) "
      "-> (Tensor loss, Tensor scale, Tensor dice_slopes)");
  // The same for the logits that a head makes of features: weight [C, F] and bias [C] of a 1x1 convolution. Gradients
  // that are not asked for are [0].
  m.def(
      "linear_weighted_loss(Tensor features, Tensor weight, Tensor? bias, Tensor target, Tensor? risk, "
      "Tensor? class_weight, Tensor? foreground, Tensor? regions, Tensor? dice_class_weight, int ignore_index, "
      "int? background, float foreground_floor, int normalization, int ce_voxels, int reduction, "
      "float label_smoothing, float ce_weight, float dice_weight, float smooth_nr, float smooth_dr, float alpha, "
      "float beta, bool squared_pred, bool include_background, bool batch_dice) "
      "-> (Tensor loss, Tensor scale, Tensor dice_slopes)");
  m.def(
      "_linear_weighted_loss_backward(Tensor grad_loss, Tensor features, Tensor weight, Tensor? bias, Tensor target, "
      "Tensor? risk, Tensor? class_weight, Tensor? foreground, Tensor? regions, Tensor scale, Tensor dice_slopes, "
      "int ignore_index, int? background, int ce_voxels, float label_smoothing, bool squared_pred, "
      "bool grad_features, bool grad_parameters, bool grad_risk) "
      "-> (Tensor grad_features, Tensor grad_weight, Tensor grad_bias, Tensor grad_risk)");
  m.def(
      "_linear_weighted_loss_with_gradient(Tensor features, Tensor weight, Tensor? bias, Tensor target, Tensor? risk, "
      "Tensor? class_weight, Tensor? foreground, Tensor? regions, int ignore_index, int? background, "
      "float foreground_floor, int normalization, int ce_voxels, int reduction, float label_smoothing, "
      "float ce_weight, bool grad_features, bool grad_parameters, bool grad_risk) "
      "-> (Tensor loss, Tensor grad_features, Tensor grad_weight, Tensor grad_bias, Tensor grad_risk)");
  m.def(
      "_linear_weighted_loss_sums(Tensor features, Tensor weight, Tensor? bias, Tensor target, Tensor? risk, "
      "Tensor? class_weight, Tensor? foreground, Tensor? regions, int ignore_index, int? background, int ce_voxels, "
      "float label_smoothing, bool squared_pred) -> Tensor");
  // Multiplies a gradient that nobody else can see by a scalar tensor, in place; 0 gives 0 whatever was there. The
  // factor is read on its device: no host waits for it.
  m.def("_scale_gradient_(Tensor(a!) gradient, Tensor factor) -> ()");
}
