#include <tuple>
#include <type_traits>

#include "cuda/loss_inputs.h"

namespace riskmap::cuda {

template <bool kOverwrites>
std::conditional_t<kOverwrites, Tensor, std::tuple<Tensor, Tensor>> weighted_loss_backward(
    Tensor grad_loss, Tensor logits, Tensor target, OptionalTensor risk, OptionalTensor class_weight,
    OptionalTensor foreground, OptionalTensor regions, Tensor scale, Tensor dice_slopes, int64_t ignore_index,
    std::optional<int64_t> background, int64_t ce_voxels, double label_smoothing, bool squared_pred, bool grad_risk) {
  const LossTensors tensors{logits, target, risk, class_weight, foreground, regions, {}};
  const bool dice = dice_slopes.numel() != 0;
  check_loss_backward(tensors, grad_loss, scale, dice_slopes, grad_risk, kOverwrites);
  const DeviceGuard guard(logits);
  const cudaStream_t stream = stream_of(logits);
  const DeviceLossInputs in(tensors, ignore_index, background, static_cast<CeVoxels>(ce_voxels), label_smoothing, dice,
                            squared_pred, stream);

  GradientTensor gradient(logits, in.logits(), kOverwrites);
  Tensor risk_gradient = empty_grad_risk(tensors, grad_risk), keep_risk = risk_gradient, keep_map = logits;
  const Tensor scales = torch::stable::contiguous(scale), slopes = torch::stable::contiguous(dice_slopes);
  LossBackward args{};
  args.in = in.args;
  args.chunking = in.chunking();
  if (grad_loss.dim() != 0) {
    args.grad_map = view_map(grad_loss, keep_map);
  } else {
    args.grad_loss = grad_loss.data_ptr();
    args.grad_dtype = dtype_of_view(grad_loss);
  }
  args.scale = static_cast<const double*>(scales.data_ptr());
  args.dice_slopes = static_cast<const double*>(slopes.data_ptr());
  args.grad_logits = gradient.view();
  if (grad_risk) args.grad_risk = view_map(risk_gradient, keep_risk);
  launch_gradient(args, stream);
  gradient.finish();
  if constexpr (kOverwrites) {
    return risk_gradient;
  } else {
    return {gradient.result, risk_gradient};
  }
}

}  // namespace riskmap::cuda

STABLE_TORCH_LIBRARY_IMPL(RISKMAP_NAMESPACE, RISKMAP_CUDA_KEY, m) {
  m.impl("_weighted_loss_backward", TORCH_BOX(&riskmap::cuda::weighted_loss_backward<false>));
  m.impl("_weighted_loss_backward_", TORCH_BOX(&riskmap::cuda::weighted_loss_backward<true>));
}
