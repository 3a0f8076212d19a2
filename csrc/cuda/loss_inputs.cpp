#include "cuda/loss_inputs.h"

namespace riskmap::cuda {

DeviceLossInputs::DeviceLossInputs(const LossTensors& tensors, int64_t ignore_index, std::optional<int64_t> background,
                                   CeVoxels ce_voxels, double label_smoothing, bool class_sums, bool squared,
                                   cudaStream_t stream)
    : has_regions_(tensors.regions.has_value()),
      logits_(tensors.logits),
      target_(tensors.logits),
      risk_(tensors.logits),
      foreground_(tensors.logits),
      given_class_weight_(tensors.logits),
      regions_(tensors.logits),
      class_weight_(tensors.logits),
      smooth_(tensors.logits),
      bad_class_weight_(tensors.logits),
      dice_class_weight_(tensors.logits),
      has_class_weight_(tensors.class_weight.has_value()),
      has_dice_class_weight_(tensors.dice_class_weight.has_value()) {
  args.logits = view_volume(tensors.logits, logits_);
  args.target = view_map(tensors.target, target_);
  args.risk = view_map(tensors.risk, risk_);
  args.foreground = view_map(tensors.foreground, foreground_);
  args.num_labels = tensors.num_labels();
  args.label = label_code(args.target.dtype, args.num_labels, ignore_index);
  args.label_smoothing = label_smoothing;
  args.background = background.value_or(-1);
  args.ce_in_foreground = ce_voxels == CeVoxels::kForeground;
  args.class_sums = class_sums;
  args.squared = squared;
  if (has_dice_class_weight_) dice_class_weight_ = torch::stable::contiguous(*tensors.dice_class_weight);
  if (has_regions_) {
    regions_ = torch::stable::contiguous(*tensors.regions);
    args.membership = static_cast<const uint8_t*>(regions_.data_ptr());
  }

  const int64_t classes = args.logits.classes;
  const bool wants_class_weight = tensors.class_weight || has_regions_,
             wants_smooth = label_smoothing > 0 && !has_regions_;
  if (!wants_class_weight && !wants_smooth) return;
  has_tables_ = true;
  LossTables tables{};
  if (tensors.class_weight) {
    given_class_weight_ = torch::stable::contiguous(*tensors.class_weight);
    tables.given = given_class_weight_.data_ptr();
    tables.given_dtype = dtype_of_view(given_class_weight_);
  }
  tables.classes = classes;
  tables.to_double = is_double();
  // Each region's mean over regions is part of its weight: CE = mean over r of c[r] BCE_r.
  tables.weight_factor = has_regions_ ? 1.0 / static_cast<double>(classes) : 1.0;
  tables.smooth_factor = label_smoothing / static_cast<double>(classes);
  if (wants_class_weight) {
    class_weight_ = empty_on(tensors.logits, {classes}, result_dtype());
    args.class_weight = tables.class_weight = class_weight_.data_ptr();
  }
  if (wants_smooth) {
    smooth_ = empty_on(tensors.logits, {classes + 1}, result_dtype());
    args.smooth = tables.smooth = smooth_.data_ptr();
  }
  bad_class_weight_ = empty_on(tensors.logits, {1}, ScalarType::Byte);
  tables.bad_class_weight = static_cast<uint8_t*>(bad_class_weight_.data_ptr());
  make_tables(tables, stream);
}

LossFinish DeviceLossInputs::finish(const LossOptions& options) {
  LossFinish finish = finish_of(options, options.excluded_class(has_regions_));
  finish.batch = args.logits.batch;
  finish.classes = args.logits.classes;
  finish.class_sums = args.class_sums;
  finish.bad_class_weight = has_tables_ ? static_cast<const uint8_t*>(bad_class_weight_.data_ptr()) : nullptr;
  if (has_class_weight_) finish.class_weight = {given_class_weight_.data_ptr(), dtype_of_view(given_class_weight_)};
  if (has_dice_class_weight_)
    finish.dice_class_weight = {dice_class_weight_.data_ptr(), dtype_of_view(dice_class_weight_)};
  finish.loss_is_double = is_double();
  return finish;
}

LossFinish finish_of(const LossOptions& options, int64_t excluded_class) {
  LossFinish finish{};
  finish.normalization = options.normalization;
  finish.reduction = options.reduction;
  finish.foreground_floor = options.foreground_floor;
  finish.ce_weight = options.ce_weight;
  finish.dice_weight = options.dice_weight;
  finish.dice_formula = options.dice_formula;
  finish.excluded_class = excluded_class;
  finish.batch_dice = options.batch_dice;
  return finish;
}

GradientTensor::GradientTensor(const Tensor& logits) : result(torch::stable::empty_like(logits)), written(result) {
  if (!is_viewable(result)) written = torch::stable::empty_like(torch::stable::contiguous(result));
}

Volume GradientTensor::view() {
  Tensor keep = written;
  return view_volume(written, keep);  // viewable: no copy
}

void GradientTensor::finish() {
  if (written.data_ptr() != result.data_ptr()) torch::stable::copy_(result, written);
}

}  // namespace riskmap::cuda
