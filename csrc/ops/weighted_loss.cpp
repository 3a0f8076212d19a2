#include "ops/weighted_loss.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

namespace riskmap {

void check_loss_tensors(const char* op, const LossTensors& tensors) {
  const Tensor& logits = tensors.logits;
  check_logits(op, "logits", logits);
  check_labels(op, "target", tensors.target, "logits", logits);
  if (tensors.risk) {
    check(is_floating(*tensors.risk), op, ": risk must be floating, got ", dtype_of(*tensors.risk));
    check_voxel_map(op, "risk", *tensors.risk, "logits", logits);
  }
  if (const OptionalTensor& weight = tensors.weight) {
    check(is_floating(*weight), op, ": weight must be floating, got ", dtype_of(*weight));
    check(weight->dim() == 1 && weight->size(0) == logits.size(1), op, ": weight must be [C] with C = ", logits.size(1),
          ", got shape ", shape_of(*weight));
    check(weight->device() == logits.device(), op, ": weight must be on the same device as logits");
  }
  if (tensors.foreground) {
    check(is_label_dtype(*tensors.foreground) && !is_floating(*tensors.foreground), op,
          ": foreground must be bool or integer, got ", dtype_of(*tensors.foreground));
    check_voxel_map(op, "foreground", *tensors.foreground, "logits", logits);
  }
  if (tensors.regions) check_regions(op, *tensors.regions, "logits", logits);
}

void check_weighted_loss(const LossTensors& tensors, const LossOptions& options) {
  const char* op = "weighted_loss";
  const Tensor& logits = tensors.logits;
  check_loss_tensors(op, tensors);
  check(!options.background || (*options.background >= 0 && *options.background < tensors.num_labels()), op,
        ": background must be a class 0 to ", tensors.num_labels() - 1, " or none, got ",
        options.background.value_or(0));
  check_range(op, "foreground_floor", options.foreground_floor, 0, 1);
  check_range(op, "label_smoothing", options.label_smoothing, 0, 1);
  const auto within = [op](const char* name, int64_t value, int64_t last) {
    check(value >= 0 && value <= last, op, ": ", name, " must be 0 to ", last, ", got ", value);
  };
  within("normalization", static_cast<int64_t>(options.normalization), 3);
  within("region", static_cast<int64_t>(options.region), 1);
  within("reduction", static_cast<int64_t>(options.reduction), 2);
  check(std::isfinite(options.ce_weight) && options.ce_weight >= 0, op,
        ": ce_weight must be finite and at least 0, got ", options.ce_weight);
  check(std::isfinite(options.dice_weight) && options.dice_weight >= 0, op,
        ": dice_weight must be finite and at least 0, got ", options.dice_weight);
  if (options.dice()) {
    check(options.reduction != Reduction::kNone, op,
          ": dice_weight must be 0 with reduction none: Dice has no voxel map");
    bool any = false;
    for (int64_t c = 0; c < logits.size(1) && !any; ++c) any = options.in_dice(c, tensors.regions.has_value());
    check(any, op, ": dice_weight needs a class besides the background, or include_background; logits have shape ",
          shape_of(logits));
  }
}

double normalizer(const LossOptions& options, int64_t valid, int64_t foreground, int64_t batch_valid,
                  int64_t batch_foreground, int64_t batch) {
  const auto floored = [&](int64_t f, int64_t v) {
    return f > 0 ? std::max(static_cast<double>(f), options.foreground_floor * static_cast<double>(v))
                 : static_cast<double>(v);
  };
  switch (options.normalization) {
    case Normalization::kForeground: return floored(foreground, valid);
    case Normalization::kBatchForeground: return floored(batch_foreground, batch_valid) / static_cast<double>(batch);
    case Normalization::kValid: return static_cast<double>(valid);
    default: return valid > 0 ? 1 : 0;
  }
}

}  // namespace riskmap

STABLE_TORCH_LIBRARY_FRAGMENT(riskmap_ext, m) {
  // normalization: 0 foreground, 1 batch_foreground, 2 valid, 3 none. region: 0 valid, 1 foreground.
  // reduction: 0 mean, 1 sum, 2 none.
  m.def(
      "weighted_loss(Tensor logits, Tensor target, Tensor? risk, Tensor? weight, Tensor? foreground, Tensor? regions, "
      "int ignore_index, int? background, float foreground_floor, int normalization, int region, int reduction, "
      "float label_smoothing, float ce_weight, float dice_weight, bool include_background, bool batch_dice) "
      "-> (Tensor loss, Tensor scale, Tensor dice_slopes)");
  m.def(
      "_weighted_loss_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor? risk, Tensor? weight, "
      "Tensor? foreground, Tensor? regions, Tensor scale, Tensor dice_slopes, int ignore_index, int? background, "
      "int region, float label_smoothing, bool grad_risk) -> (Tensor grad_logits, Tensor grad_risk)");
  // Cross-entropy only, reduced: loss and gradient for grad_loss = 1 in one pass over the logits.
  m.def(
      "_weighted_loss_with_gradient(Tensor logits, Tensor target, Tensor? risk, Tensor? weight, Tensor? foreground, "
      "Tensor? regions, int ignore_index, int? background, float foreground_floor, int normalization, int region, "
      "int reduction, float label_smoothing, float ce_weight, bool grad_risk) "
      "-> (Tensor loss, Tensor grad_logits, Tensor grad_risk)");
}
