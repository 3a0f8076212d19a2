#include "ops/weighted_loss.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/capability.h"
#include "cpu/loss_inputs.h"

namespace riskmap::cpu {
namespace {

// One pass over the logits. map: where reduction none puts its voxels, or nullptr.
LossSums forward_pass(const LossTensors& tensors, const LossInputs& in, int64_t ignore_index, Tensor* map,
                      double map_factor) {
  std::vector<LossPartial> partials(static_cast<size_t>(in.chunks()));
  std::vector<double> class_partials(in.args.class_sums ? static_cast<size_t>(in.chunks() * 3 * in.args.logits.classes)
                                                        : 0);
  LossForwardArgs args{};
  static_cast<LossArgs&>(args) = in.args;
  Tensor keep_map = tensors.logits;
  if (map) args.map = view_map(*map, keep_map);
  args.map_factor = map_factor;
  args.partial = partials.data();
  args.class_partial = class_partials.data();
  auto* kernel = tensors.regions ? RISKMAP_CPU_KERNEL(region_loss_forward) : RISKMAP_CPU_KERNEL(weighted_loss_forward);
  for_chunks(args.logits, args.chunking, in.scratch_bytes(),
             [&](int64_t chunk, void* scratch) { kernel(args, chunk, scratch); });
  LossSums sums(partials, class_partials, in, in.args.class_sums);
  raise_bad_values(tensors, sums, ignore_index);
  return sums;
}

}  // namespace

LossResult loss_of(const LossTensors& tensors, const LossOptions& options) {
  check_loss_tensors(tensors);
  const LossInputs in(tensors, options, tensors.needs_class_sums(options));
  const int64_t batch = in.args.logits.batch, classes = tensors.classes();
  const bool as_map = options.reduction == Reduction::kNone;
  Tensor map = as_map ? empty_map(tensors.logits, in.result_dtype()) : empty({0}, in.result_dtype());
  const LossSums sums = forward_pass(tensors, in, options.ignore_index, as_map ? &map : nullptr, options.ce_weight);

  const std::vector<double> scales = image_scales(options, sums, tensors.class_weight);
  double total = cross_entropy_total(sums, scales);
  std::vector<double> slopes;
  if (options.dice())
    total += dice_total(options, options.excluded_class(tensors.regions.has_value()), sums, tensors.dice_class_weight,
                        slopes);
  return {as_map ? map : scalar_tensor(total, in.result_dtype()), tensor_of(scales, {batch}),
          options.dice() ? tensor_of(slopes, {batch, 2, classes}) : empty({0}, ScalarType::Double)};
}

Tensor loss_sums_of(const LossTensors& tensors, const LossOptions& options) {
  check_loss_tensors(tensors);
  const LossInputs in(tensors, options, true);
  const LossSums sums = forward_pass(tensors, in, options.ignore_index, nullptr, 0);
  return tensor_of(sums.values, {sums.batch, math::loss_columns(tensors.classes(), true)});
}

std::tuple<Tensor, Tensor, Tensor> weighted_loss(
    Tensor logits, Tensor target, OptionalTensor risk, OptionalTensor class_weight, OptionalTensor foreground,
    OptionalTensor regions, OptionalTensor dice_class_weight, int64_t ignore_index, std::optional<int64_t> background,
    double foreground_floor, int64_t normalization, int64_t ce_voxels, int64_t reduction, double label_smoothing,
    double ce_weight, double dice_weight, double smooth_nr, double smooth_dr, double alpha, double beta,
    bool squared_pred, bool include_background, bool batch_dice) {
  const LossResult result = loss_of({logits, target, risk, class_weight, foreground, regions, dice_class_weight},
                                    loss_options(ignore_index, background, foreground_floor, normalization, ce_voxels,
                                                 reduction, label_smoothing, ce_weight, dice_weight, smooth_nr,
                                                 smooth_dr, alpha, beta, squared_pred, include_background, batch_dice));
  return {result.loss, result.scale, result.dice_slopes};
}

Tensor weighted_loss_sums(Tensor logits, Tensor target, OptionalTensor risk, OptionalTensor class_weight,
                          OptionalTensor foreground, OptionalTensor regions, int64_t ignore_index,
                          std::optional<int64_t> background, int64_t ce_voxels, double label_smoothing,
                          bool squared_pred) {
  return loss_sums_of({logits, target, risk, class_weight, foreground, regions, {}},
                      gradient_options(ignore_index, background, ce_voxels, label_smoothing, squared_pred));
}

}  // namespace riskmap::cpu

STABLE_TORCH_LIBRARY_IMPL(riskmap_ext, CPU, m) {
  m.impl("weighted_loss", TORCH_BOX(&riskmap::cpu::weighted_loss));
  m.impl("_weighted_loss_sums", TORCH_BOX(&riskmap::cpu::weighted_loss_sums));
}
