// A forward pass that makes the gradient, too.
#include <tuple>
#include <type_traits>

#include "cuda/loss_inputs.h"

namespace riskmap::cuda {

template <bool kOverwrites>
std::conditional_t<kOverwrites, std::tuple<Tensor, Tensor>, std::tuple<Tensor, Tensor, Tensor>>
weighted_loss_with_gradient(Tensor logits, Tensor target, OptionalTensor risk, OptionalTensor class_weight,
                            OptionalTensor foreground, OptionalTensor regions, int64_t ignore_index,
                            std::optional<int64_t> background, double foreground_floor, int64_t normalization,
                            int64_t ce_voxels, int64_t reduction, double label_smoothing, double ce_weight,
                            bool grad_risk) {
  const LossTensors tensors{logits, target, risk, class_weight, foreground, regions, {}};
  const LossOptions options = cross_entropy_options(ignore_index, background, foreground_floor, normalization,
                                                    ce_voxels, reduction, label_smoothing, ce_weight);
  check_loss_with_gradient(tensors, grad_risk, kOverwrites);
  const DeviceGuard guard(logits);
  const cudaStream_t stream = stream_of(logits);
  const DeviceLossInputs in(tensors, ignore_index, background, options.ce_voxels, label_smoothing, false, false,
                            stream);
  const int64_t batch = logits.size(0), voxels = in.args.logits.voxels;
  Tensor loss = empty_on(logits, {}, in.result_dtype());
  GradientTensor gradient(logits, in.logits(), kOverwrites);
  Tensor risk_gradient = empty_grad_risk(tensors, grad_risk), keep_risk = risk_gradient;

  // The normaliser first: it needs the labels alone. It leaves them in one byte each where they take more.
  LossCount count{in.args, count_chunking(in.args), nullptr, nullptr, nullptr};
  LossBackward args{};
  args.in = in.args;
  args.chunking = in.chunking();
  args.grad_logits = gradient.view();
  if (grad_risk) args.grad_risk = view_map(risk_gradient, keep_risk);
  args.in_one.loss = loss.data_ptr();
  args.in_one.loss_is_double = in.is_double();
  args.in_one.batch = batch;
  args.in_one.count_chunks = count.chunking.chunks_per_image;
  args.in_one.normalization = options.normalization;
  args.in_one.reduction = options.reduction;
  args.in_one.foreground_floor = foreground_floor;
  args.in_one.ce_weight = ce_weight;
  const bool coded = size_of(in.args.target.dtype) > 1 && in.args.num_labels <= kMaxCodedLabels;
  Workspace workspace;
  workspace.reserve(&args.in_one.partial, batch * kLossColumns * args.chunking.chunks_per_image);
  workspace.reserve(&args.in_one.scale, batch);
  workspace.reserve(&count.counts, count.chunking.chunks(batch));
  workspace.reserve(&count.ticket, 1);
  if (coded) workspace.reserve(&count.codes, batch * voxels);
  workspace.allocate(logits);
  if (coded) {
    args.in.target = {count.codes, Dtype::kUInt8, voxels};
    args.in.label = label_code(Dtype::kUInt8, in.args.num_labels, kIgnoredCode);
  }
  args.in_one.counts = count.counts;
  args.in_one.ticket = count.ticket;
  count_voxels(count, stream);
  launch_gradient(args, stream);
  if (args.chunking.chunks(batch) == 0) torch::stable::zero_(loss);  // there is nothing to launch
  gradient.finish();
  if constexpr (kOverwrites) {
    return {loss, risk_gradient};
  } else {
    return {loss, gradient.result, risk_gradient};
  }
}

}  // namespace riskmap::cuda

STABLE_TORCH_LIBRARY_IMPL(RISKMAP_NAMESPACE, RISKMAP_CUDA_KEY, m) {
  m.impl("_weighted_loss_with_gradient", TORCH_BOX(&riskmap::cuda::weighted_loss_with_gradient<false>));
  m.impl("_weighted_loss_with_gradient_", TORCH_BOX(&riskmap::cuda::weighted_loss_with_gradient<true>));
}
