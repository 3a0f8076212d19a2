#include "cuda/loss_inputs.h"

namespace riskmap::cuda {

ClassWeight view_class_weight(const OptionalTensor& weight, Tensor& keep) {
  if (!weight) return {nullptr, Dtype::kFloat};
  keep = torch::stable::contiguous(*weight);
  return {keep.data_ptr(), dtype_of_view(keep)};
}

DeviceLossInputs::DeviceLossInputs(const LossTensors& tensors, int64_t ignore_index, std::optional<int64_t> background,
                                   CeVoxels ce_voxels, double label_smoothing, bool class_sums, bool squared,
                                   cudaStream_t stream)
    : has_regions_(tensors.regions.has_value()),
      logits_(tensors.logits),
      labels_(tensors.target, tensors.num_labels(), ignore_index, stream),
      risk_(tensors.logits),
      foreground_(tensors.logits),
      class_weight_(tensors.logits),
      regions_(tensors.logits),
      dice_class_weight_(tensors.logits) {
  args.logits = view_volume(tensors.logits, logits_);
  check_voxels("weighted_loss", args.logits.voxels);
  args.target = labels_.map;
  args.label = labels_.code;
  args.risk = view_map(tensors.risk, risk_);
  args.foreground = view_map(tensors.foreground, foreground_);
  args.num_labels = tensors.num_labels();
  args.label_smoothing = label_smoothing;
  args.background = background.value_or(-1);
  args.ce_in_foreground = ce_voxels == CeVoxels::kForeground;
  args.class_sums = class_sums;
  args.squared = squared;
  args.class_weight = view_class_weight(tensors.class_weight, class_weight_);
  dice_class_weight_view_ = view_class_weight(tensors.dice_class_weight, dice_class_weight_);
  if (has_regions_) {
    regions_ = torch::stable::contiguous(*tensors.regions);
    args.regions = static_cast<const uint8_t*>(regions_.data_ptr());
  }
}

LossFinish DeviceLossInputs::finish(const LossOptions& options) const {
  LossFinish finish = finish_of(options, options.excluded_class(has_regions_));
  finish.batch = args.logits.batch;
  finish.classes = args.logits.classes;
  finish.class_sums = args.class_sums;
  finish.class_weight = args.class_weight;
  finish.dice_class_weight = dice_class_weight_view_;
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

namespace {

bool is_planar(const Tensor& tensor) {
  Tensor keep = tensor;
  return view_volume(tensor, keep).stride_voxel == 1;
}

}  // namespace

GradientTensor::GradientTensor(const Tensor& logits, const Tensor& read, bool overwrites)
    : result(overwrites ? logits : torch::stable::empty_like(logits)), written(overwrites ? read : result) {
  if (overwrites) return;
  if (!is_viewable(result) || is_planar(result) != is_planar(read)) written = torch::stable::empty_like(read);
}

Volume GradientTensor::view() {
  Tensor keep = written;
  return view_volume(written, keep);  // viewable: no copy
}

void GradientTensor::finish() {
  if (written.data_ptr() != result.data_ptr()) torch::stable::copy_(result, written);
}

Tensor empty_grad_risk(const LossTensors& tensors, bool wanted) {
  return wanted ? empty_map(tensors.logits, tensors.risk->scalar_type())
                : empty_on(tensors.logits, {0}, ScalarType::Float);
}

void launch_gradient(const LossBackward& args, cudaStream_t stream) {
  if (args.in.regions) {
    launch_region_loss_backward(args, stream);
  } else {
    launch_weighted_loss_backward(args, stream);
  }
}

}  // namespace riskmap::cuda
