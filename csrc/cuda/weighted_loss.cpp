#include "cuda/weighted_loss.h"

#include <tuple>

#include "cuda/loss_inputs.h"

namespace riskmap::cuda {

std::tuple<Tensor, Tensor, Tensor> weighted_loss(Tensor logits, Tensor target, OptionalTensor risk,
                                                 OptionalTensor weight, OptionalTensor foreground,
                                                 OptionalTensor regions, int64_t ignore_index,
                                                 std::optional<int64_t> background, double foreground_floor,
                                                 int64_t normalization, int64_t region, int64_t reduction,
                                                 double label_smoothing, double ce_weight, double dice_weight,
                                                 bool include_background, bool batch_dice) {
  const LossTensors tensors{logits, target, risk, weight, foreground, regions};
  const LossOptions options{ignore_index,
                            background,
                            foreground_floor,
                            static_cast<Normalization>(normalization),
                            static_cast<Region>(region),
                            static_cast<Reduction>(reduction),
                            label_smoothing,
                            ce_weight,
                            dice_weight,
                            include_background,
                            batch_dice};
  check_weighted_loss(tensors, options);
  const DeviceGuard guard(logits);
  const cudaStream_t stream = stream_of(logits);
  const DeviceLossInputs in(tensors, ignore_index, background, options.region, label_smoothing, options.dice(), stream);
  const int64_t batch = logits.size(0), classes = logits.size(1);
  const Chunking chunking = in.chunking();
  const PartialSums sums(logits, batch, loss_columns(classes, options.dice()), chunking);

  const bool as_map = options.reduction == Reduction::kNone;
  Tensor loss = as_map ? empty_map(logits, in.result_dtype()) : empty_on(logits, {}, in.result_dtype());
  Tensor scale = empty_on(logits, {batch}, ScalarType::Double);
  Tensor dice_slopes = options.dice() ? empty_on(logits, {batch, 2, classes}, ScalarType::Double)
                                      : empty_on(logits, {0}, ScalarType::Double);

  LossForward args{in.args, chunking, {}, ce_weight, sums.data()};
  Tensor keep_map = loss;
  if (as_map) args.map = view_map(loss, keep_map);
  if (regions) {
    launch_region_loss_forward(args, stream);
  } else {
    launch_weighted_loss_forward(args, stream);
  }

  LossFinish finish = in.finish(options);
  sums.tell(finish, chunking);
  finish.scale = static_cast<double*>(scale.data_ptr());
  finish.dice_slopes = static_cast<double*>(dice_slopes.data_ptr());
  finish.loss = as_map ? nullptr : loss.data_ptr();
  finish_loss(finish, stream);
  return {loss, scale, dice_slopes};
}

}  // namespace riskmap::cuda

STABLE_TORCH_LIBRARY_IMPL(RISKMAP_NAMESPACE, RISKMAP_CUDA_KEY, m) {
  m.impl("weighted_loss", TORCH_BOX(&riskmap::cuda::weighted_loss));
}
