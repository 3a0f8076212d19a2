#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>

#include "cpu/capability.h"
#include "cpu/dtypes.h"
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

Tensor loss_with_gradient_of(const LossTensors& tensors, const LossOptions& options, WantedGradients wanted,
                             LossGradients& gradients) {
  check_loss_with_gradient(tensors, options, wanted.risk, wanted.overwrites);
  const LossInputs in(tensors, options, false);

  // The normaliser first: it needs the labels alone.
  std::vector<LossPartial> partials(static_cast<size_t>(in.chunks()));
  auto* count = RISKMAP_CPU_KERNEL(weighted_loss_count);
  for_chunks(in.args.logits, in.args.chunking, in.scratch_bytes(),
             [&](int64_t chunk, void* scratch) { count(in.args, partials.data(), chunk, scratch); });
  const LossSums counts(partials, {}, in, false);
  raise_bad_values(tensors, counts, options.ignore_index);
  const std::vector<double> scales = image_scales(options, counts, tensors.class_weight);

  gradients = loss_gradients(tensors, in, scales, nullptr, {}, {}, wanted, partials.data());
  const LossSums sums(partials, {}, in, false);
  raise_bad_values(tensors, sums, options.ignore_index);
  return scalar_tensor(cross_entropy_total(sums, scales), in.result_dtype());
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

template <bool kOverwrites>
std::conditional_t<kOverwrites, std::tuple<Tensor, Tensor>, std::tuple<Tensor, Tensor, Tensor>>
weighted_loss_with_gradient(Tensor logits, Tensor target, OptionalTensor risk, OptionalTensor class_weight,
                            OptionalTensor foreground, OptionalTensor regions, int64_t ignore_index,
                            std::optional<int64_t> background, double foreground_floor, int64_t normalization,
                            int64_t ce_voxels, int64_t reduction, double label_smoothing, double ce_weight,
                            bool grad_risk) {
  LossGradients gradients;
  const Tensor loss =
      loss_with_gradient_of({logits, target, risk, class_weight, foreground, regions, {}},
                            cross_entropy_options(ignore_index, background, foreground_floor, normalization, ce_voxels,
                                                  reduction, label_smoothing, ce_weight),
                            {grad_risk, true, false, kOverwrites}, gradients);
  if constexpr (kOverwrites) {
    return {loss, gradients.risk};
  } else {
    return {loss, gradients.logits, gradients.risk};
  }
}

void scale_gradient(Tensor gradient, Tensor factor) {
  check_scale_gradient(gradient, factor);
  const double scale = values_of(factor)[0];
  if (scale == 1) return;
  with_floating(dtype_of_view(gradient), [&](auto tag) {
    using T = decltype(tag);
    using acc_t = std::conditional_t<__is_same(T, double), double, float>;
    T* data = static_cast<T*>(gradient.data_ptr());
    torch::stable::parallel_for(0, gradient.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        data[i] = from_acc<T>(scale == 0 ? acc_t(0) : to_acc<acc_t>(data[i]) * static_cast<acc_t>(scale));
    });
  });
}

}  // namespace riskmap::cpu

STABLE_TORCH_LIBRARY_IMPL(riskmap_ext, CPU, m) {
  m.impl("_weighted_loss_backward", TORCH_BOX(&riskmap::cpu::weighted_loss_backward<false>));
  m.impl("_weighted_loss_backward_", TORCH_BOX(&riskmap::cpu::weighted_loss_backward<true>));
  m.impl("_weighted_loss_with_gradient", TORCH_BOX(&riskmap::cpu::weighted_loss_with_gradient<false>));
  m.impl("_weighted_loss_with_gradient_", TORCH_BOX(&riskmap::cpu::weighted_loss_with_gradient<true>));
  m.impl("_scale_gradient_", TORCH_BOX(&riskmap::cpu::scale_gradient));
}
