#include "ops/weighted_loss.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "ops/library.h"

namespace riskmap {
namespace {

void check_class_weight(const char* op, const char* name, const OptionalTensor& weight, int64_t classes,
                        const Tensor& beside) {
  if (!weight) return;
  check(is_floating(*weight), op, ": ", name, " must be floating, got ", dtype_of(*weight));
  check(weight->dim() == 1 && weight->size(0) == classes, op, ": ", name, " must be [C] with C = ", classes,
        ", got shape ", shape_of(*weight));
  check(weight->device() == beside.device(), op, ": ", name, " must be on the same device as the other tensors");
}

void check_head(const char* op, const Head& head, const Tensor& features) {
  const auto beside = [&](const char* name, const Tensor& tensor) {
    check(tensor.scalar_type() == features.scalar_type(), op, ": ", name, " must have the dtype of features, ",
          dtype_of(features), ", got ", dtype_of(tensor));
    check(tensor.device() == features.device(), op, ": ", name, " must be on the same device as features");
  };
  check(head.weight.dim() == 2 && head.weight.size(0) >= 1 && head.weight.size(0) <= INT32_MAX &&
            head.weight.size(1) == features.size(1),
        op, ": weight must be [C, F] with F = ", features.size(1), " as in features, got shape ",
        shape_of(head.weight));
  beside("weight", head.weight);
  if (!head.bias) return;
  check(head.bias->dim() == 1 && head.bias->size(0) == head.weight.size(0), op,
        ": bias must be [C] with C = ", head.weight.size(0), ", got shape ", shape_of(*head.bias));
  beside("bias", *head.bias);
}

void check_grad_risk(const char* op, const LossTensors& tensors, bool grad_risk) {
  check(!grad_risk || tensors.risk.has_value(), op, ": grad_risk needs risk");
}

// Every element of its memory once.
void check_dense(const char* op, const char* name, const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride and size, the innermost first
  for (int64_t d = 0; d < tensor.dim(); ++d)
    if (tensor.size(d) != 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t next = 1;
  for (const auto& [stride, size] : dims) {
    check(stride == next || tensor.numel() == 0, op, ": ", name, " must be dense in memory");
    next *= size;
  }
}

}  // namespace

LossOptions loss_options(int64_t ignore_index, std::optional<int64_t> background, double foreground_floor,
                         int64_t normalization, int64_t ce_voxels, int64_t reduction, double label_smoothing,
                         double ce_weight, double dice_weight, double smooth_nr, double smooth_dr, double alpha,
                         double beta, bool squared_pred, bool include_background, bool batch_dice) {
  return {ignore_index,
          background,
          foreground_floor,
          static_cast<Normalization>(normalization),
          static_cast<CeVoxels>(ce_voxels),
          static_cast<Reduction>(reduction),
          label_smoothing,
          ce_weight,
          dice_weight,
          {smooth_nr, smooth_dr, alpha, beta},
          squared_pred,
          include_background,
          batch_dice};
}

LossOptions finish_options(double foreground_floor, int64_t normalization, int64_t reduction, double ce_weight,
                           double dice_weight, double smooth_nr, double smooth_dr, double alpha, double beta,
                           bool batch_dice) {
  return loss_options(0, std::nullopt, foreground_floor, normalization, 0, reduction, 0, ce_weight, dice_weight,
                      smooth_nr, smooth_dr, alpha, beta, false, false, batch_dice);
}

LossOptions gradient_options(int64_t ignore_index, std::optional<int64_t> background, int64_t ce_voxels,
                             double label_smoothing, bool squared_pred) {
  return loss_options(ignore_index, background, 0, 0, ce_voxels, 0, label_smoothing, 0, 0, 0, 0, 0, 0, squared_pred,
                      false, false);
}

LossOptions cross_entropy_options(int64_t ignore_index, std::optional<int64_t> background, double foreground_floor,
                                  int64_t normalization, int64_t ce_voxels, int64_t reduction, double label_smoothing,
                                  double ce_weight) {
  return loss_options(ignore_index, background, foreground_floor, normalization, ce_voxels, reduction, label_smoothing,
                      ce_weight, 0, 0, 0, 0, 0, false, false, false);
}

void check_loss_tensors(const LossTensors& tensors) {
  const char* op = tensors.op();
  const Tensor& input = tensors.logits;
  const char* name = tensors.head ? "features" : "logits";
  check_logits(op, name, input);
  if (tensors.head) check_head(op, *tensors.head, input);
  const int64_t classes = tensors.classes();
  check_labels(op, "target", tensors.target, name, input);
  if (tensors.risk) {
    check(is_floating(*tensors.risk), op, ": risk must be floating, got ", dtype_of(*tensors.risk));
    check_voxel_map(op, "risk", *tensors.risk, name, input);
  }
  check_class_weight(op, tensors.class_weight_name(), tensors.class_weight, classes, input);
  check_class_weight(op, "dice_class_weight", tensors.dice_class_weight, classes, input);
  if (tensors.foreground) {
    check(find_dtype(*tensors.foreground) && !is_floating(*tensors.foreground), op,
          ": foreground must be bool or integer, got ", dtype_of(*tensors.foreground));
    check_voxel_map(op, "foreground", *tensors.foreground, name, input);
  }
  if (tensors.regions) check_regions(op, *tensors.regions, classes, input);
}

void check_loss_finish(const FinishTensors& tensors) {
  const char* op = "_weighted_loss_finish";
  const Tensor& sums = tensors.sums;
  check(sums.dim() == 2 && sums.scalar_type() == ScalarType::Double && tensors.classes() > 0 &&
            sums.size(1) == math::loss_columns(tensors.classes(), true),
        op, ": sums must be [B, ", static_cast<int>(math::kLossColumns), " + 3 C] float64, got ", dtype_of(sums),
        " of shape ", shape_of(sums));
  check_class_weight(op, "weight", tensors.class_weight, tensors.classes(), sums);
  check_class_weight(op, "dice_class_weight", tensors.dice_class_weight, tensors.classes(), sums);
}

void check_loss_backward(const LossTensors& tensors, const Tensor& grad_loss, const Tensor& scale,
                         const Tensor& dice_slopes, bool grad_risk, bool overwrites) {
  const char* op = tensors.op();
  const Tensor& logits = tensors.logits;
  check_loss_tensors(tensors);
  if (overwrites) check_dense(op, "logits", logits);
  check_grad_risk(op, tensors, grad_risk);
  if (grad_loss.dim() != 0) check_voxel_map(op, "grad_loss", grad_loss, "logits", logits);
  check(is_floating(grad_loss), op, ": grad_loss must be floating, got ", dtype_of(grad_loss));
  check(scale.numel() == logits.size(0) && scale.scalar_type() == ScalarType::Double, op,
        ": scale must be [B] float64");
  const int64_t slopes = logits.size(0) * 2 * tensors.classes();
  check(dice_slopes.numel() == 0 || (dice_slopes.numel() == slopes && dice_slopes.scalar_type() == ScalarType::Double),
        op, ": dice_slopes must be [B, 2, C] or [0], float64");
  for (const Tensor* tensor : {&grad_loss, &scale, &dice_slopes})
    check(tensor->device() == logits.device(), op,
          ": grad_loss, scale and dice_slopes must be on the device of logits");
}

void check_loss_with_gradient(const LossTensors& tensors, bool grad_risk, bool overwrites) {
  check_loss_tensors(tensors);
  if (overwrites) check_dense(tensors.op(), "logits", tensors.logits);
  check_grad_risk(tensors.op(), tensors, grad_risk);
}

void check_scale_gradient(const Tensor& gradient, const Tensor& factor) {
  const char* op = "_scale_gradient_";
  check(is_floating(gradient), op, ": gradient must be floating, got ", dtype_of(gradient));
  check(is_floating(factor) && factor.dim() == 0, op, ": factor must be a floating scalar, got ", dtype_of(factor),
        " of shape ", shape_of(factor));
  check(factor.device() == gradient.device(), op, ": factor must be on the same device as gradient");
  check_dense(op, "gradient", gradient);
}

}  // namespace riskmap

RISKMAP_SCHEMAS(m) {
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
