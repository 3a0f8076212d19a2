#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>

#include "cpu/capability.h"
#include "cpu/head.h"
#include "cpu/loss_inputs.h"

namespace riskmap::cpu {
namespace {

constexpr int64_t kStreamedBytes = 16 << 20;  // more than a core's share of the last cache

}  // namespace

LossGradients loss_gradients(const LossTensors& tensors, const LossInputs& in, const std::vector<double>& factor,
                             const Tensor* grad_map, const std::vector<double>& dice_overall,
                             const std::vector<double>& dice_hit, WantedGradients wanted, LossPartial* partial) {
  const Tensor& logits = tensors.logits;
  const Table overall(dice_overall, in.is_double()), hit(dice_hit, in.is_double());
  const auto none = [] { return empty({0}, ScalarType::Float); };  // one for each: outputs may not be the same
  LossGradients result{!wanted.logits      ? none()
                       : wanted.overwrites ? logits
                                           : empty_gradient(logits),
                       wanted.risk ? empty_map(logits, tensors.risk->scalar_type()) : none(), none(), none()};
  // The result is laid out as logits; where that is neither planar nor channels-last, the kernel writes a
  // contiguous tensor first.
  Tensor written = wanted.overwrites                              ? in.logits()
                   : !wanted.logits || is_viewable(result.logits) ? result.logits
                                                                  : empty_gradient(in.logits());
  Tensor keep_written = written, keep_map = logits, keep_risk = result.risk;

  LossBackwardArgs args{};
  static_cast<LossArgs&>(args) = in.args;
  args.factor = factor.data();
  if (grad_map) args.grad_map = view_map(*grad_map, keep_map);
  args.dice_overall = overall.data();
  args.dice_hit = hit.data();
  if (wanted.logits) args.grad_logits = view_volume(written, keep_written);
  // What was just read is in the caches.
  args.streamed =
      !wanted.overwrites && written.numel() * static_cast<int64_t>(written.element_size()) >= kStreamedBytes;
  if (wanted.risk) args.grad_risk = view_map(result.risk, keep_risk);
  args.partial = partial;
  std::optional<ParameterSums> parameters;
  if (tensors.head) {
    args.grad_head.features = args.grad_logits;
    args.grad_logits = args.logits;
    if (wanted.parameters) args.grad_head = parameters.emplace(in).args(args.grad_head.features);
  }
  auto* kernel =
      tensors.regions ? RISKMAP_CPU_KERNEL(region_loss_backward) : RISKMAP_CPU_KERNEL(weighted_loss_backward);
  for_chunks(
      args.logits, args.chunking, in.scratch_bytes(),
      [&](int64_t chunk, void* scratch) { kernel(args, chunk, scratch); },
      parameters ? parameters->chunks_per_group() : 1);
  if (written.data_ptr() != result.logits.data_ptr()) torch::stable::copy_(result.logits, written);
  if (parameters) {
    result.weight = parameters->weight(logits.scalar_type());
    if (tensors.head->bias) result.bias = parameters->bias(logits.scalar_type());
  }
  return result;
}

LossGradients loss_backward_of(const LossTensors& tensors, const LossOptions& options, const Tensor& grad_loss,
                               const Tensor& scale, const Tensor& dice_slopes, WantedGradients wanted) {
  check_loss_backward(tensors, grad_loss, scale, dice_slopes, wanted.risk, wanted.overwrites);
  const int64_t batch = tensors.logits.size(0), classes = tensors.classes();
  const bool as_map = grad_loss.dim() != 0;
  const bool dice = dice_slopes.numel() != 0;
  const LossInputs in(tensors, options, dice);

  const double grad = as_map ? 1.0 : values_of(grad_loss)[0];
  std::vector<double> factor = values_of(scale);
  for (double& each : factor) each *= grad;
  std::vector<double> overall, hit;
  if (dice) {
    const std::vector<double> slopes = values_of(dice_slopes);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t c = 0; c < classes; ++c) {
        overall.push_back(grad * slopes[static_cast<size_t>(2 * b * classes + c)]);
        hit.push_back(grad * slopes[static_cast<size_t>((2 * b + 1) * classes + c)]);
      }
  }
  return loss_gradients(tensors, in, factor, as_map ? &grad_loss : nullptr, overall, hit, wanted, nullptr);
}

template <bool kOverwrites>
std::conditional_t<kOverwrites, Tensor, std::tuple<Tensor, Tensor>> weighted_loss_backward(
    Tensor grad_loss, Tensor logits, Tensor target, OptionalTensor risk, OptionalTensor class_weight,
    OptionalTensor foreground, OptionalTensor regions, Tensor scale, Tensor dice_slopes, int64_t ignore_index,
    std::optional<int64_t> background, int64_t ce_voxels, double label_smoothing, bool squared_pred, bool grad_risk) {
  const LossGradients gradients =
      loss_backward_of({logits, target, risk, class_weight, foreground, regions, {}},
                       gradient_options(ignore_index, background, ce_voxels, label_smoothing, squared_pred), grad_loss,
                       scale, dice_slopes, {grad_risk, true, false, kOverwrites});
  if constexpr (kOverwrites) {
    return gradients.risk;
  } else {
    return {gradients.logits, gradients.risk};
  }
}

}  // namespace riskmap::cpu

STABLE_TORCH_LIBRARY_IMPL(riskmap_ext, CPU, m) {
  m.impl("_weighted_loss_backward", TORCH_BOX(&riskmap::cpu::weighted_loss_backward<false>));
  m.impl("_weighted_loss_backward_", TORCH_BOX(&riskmap::cpu::weighted_loss_backward<true>));
}
