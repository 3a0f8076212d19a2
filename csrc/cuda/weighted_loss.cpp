#include "cuda/weighted_loss.h"

#include <tuple>

#include "cuda/loss_inputs.h"

namespace riskmap::cuda {

namespace {

// One pass over the logits.
void launch_forward(const LossForward& args, cudaStream_t stream) {
  if (args.in.regions) {
    launch_region_loss_forward(args, stream);
  } else {
    launch_weighted_loss_forward(args, stream);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> weighted_loss(
    Tensor logits, Tensor target, OptionalTensor risk, OptionalTensor class_weight, OptionalTensor foreground,
    OptionalTensor regions, OptionalTensor dice_class_weight, int64_t ignore_index, std::optional<int64_t> background,
    double foreground_floor, int64_t normalization, int64_t ce_voxels, int64_t reduction, double label_smoothing,
    double ce_weight, double dice_weight, double smooth_nr, double smooth_dr, double alpha, double beta,
    bool squared_pred, bool include_background, bool batch_dice) {
  const LossTensors tensors{logits, target, risk, class_weight, foreground, regions, dice_class_weight};
  const LossOptions options = loss_options(ignore_index, background, foreground_floor, normalization, ce_voxels,
                                           reduction, label_smoothing, ce_weight, dice_weight, smooth_nr, smooth_dr,
                                           alpha, beta, squared_pred, include_background, batch_dice);
  check_loss_tensors(tensors);
  const DeviceGuard guard(logits);
  const cudaStream_t stream = stream_of(logits);
  const bool class_sums = tensors.needs_class_sums(options);
  const DeviceLossInputs in(tensors, ignore_index, background, options.ce_voxels, label_smoothing, class_sums,
                            squared_pred, stream);
  const int64_t batch = logits.size(0), classes = logits.size(1), columns = batch * loss_columns(classes, class_sums);
  const bool as_map = options.reduction == Reduction::kNone;
  Tensor loss = as_map ? empty_map(logits, in.result_dtype()) : empty_on(logits, {}, in.result_dtype());
  Tensor scale = empty_on(logits, {batch}, ScalarType::Double);
  Tensor dice_slopes = options.dice() ? empty_on(logits, {batch, 2, classes}, ScalarType::Double)
                                      : empty_on(logits, {0}, ScalarType::Double);

  LossForward args{in.args, in.chunking(), {}, ce_weight, nullptr, nullptr};
  LossFinish finish = in.finish(options);
  finish.chunks_per_image = args.chunking.chunks_per_image;
  Workspace workspace;
  workspace.reserve(&args.partial, columns * finish.chunks_per_image);
  workspace.reserve(&finish.sums, columns);
  workspace.reserve(&args.ticket, 1);
  workspace.allocate(logits);
  Tensor keep_map = loss;
  if (as_map) args.map = view_map(loss, keep_map);
  launch_forward(args, stream);

  finish.partial = args.partial;
  finish.ticket = args.ticket;
  finish.scale = static_cast<double*>(scale.data_ptr());
  finish.dice_slopes = static_cast<double*>(dice_slopes.data_ptr());
  finish.loss = as_map ? nullptr : loss.data_ptr();
  finish_loss(finish, stream);
  return {loss, scale, dice_slopes};
}

Tensor weighted_loss_sums(Tensor logits, Tensor target, OptionalTensor risk, OptionalTensor class_weight,
                          OptionalTensor foreground, OptionalTensor regions, int64_t ignore_index,
                          std::optional<int64_t> background, int64_t ce_voxels, double label_smoothing,
                          bool squared_pred) {
  const LossTensors tensors{logits, target, risk, class_weight, foreground, regions, {}};
  check_loss_tensors(tensors);
  const DeviceGuard guard(logits);
  const cudaStream_t stream = stream_of(logits);
  const DeviceLossInputs in(tensors, ignore_index, background, static_cast<CeVoxels>(ce_voxels), label_smoothing, true,
                            squared_pred, stream);
  const int64_t batch = logits.size(0), columns = loss_columns(logits.size(1), true);
  LossForward args{in.args, in.chunking(), {}, 0, nullptr, nullptr};
  Workspace workspace;
  workspace.reserve(&args.partial, batch * columns * args.chunking.chunks_per_image);
  workspace.allocate(logits);
  launch_forward(args, stream);
  Tensor sums = empty_on(logits, {batch, columns}, ScalarType::Double);
  sum_partials(args.partial, static_cast<double*>(sums.data_ptr()), batch * columns, args.chunking.chunks_per_image,
               stream);
  return sums;
}

}  // namespace riskmap::cuda

STABLE_TORCH_LIBRARY_IMPL(RISKMAP_NAMESPACE, RISKMAP_CUDA_KEY, m) {
  m.impl("weighted_loss", TORCH_BOX(&riskmap::cuda::weighted_loss));
  m.impl("_weighted_loss_sums", TORCH_BOX(&riskmap::cuda::weighted_loss_sums));
}
