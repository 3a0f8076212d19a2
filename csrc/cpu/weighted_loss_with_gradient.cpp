// A forward pass that makes the gradient, too.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>

#include "cpu/capability.h"
#include "cpu/loss_inputs.h"

namespace riskmap::cpu {

Tensor loss_with_gradient_of(const LossTensors& tensors, const LossOptions& options, WantedGradients wanted,
                             LossGradients& gradients) {
  check_loss_with_gradient(tensors, wanted.risk, wanted.overwrites);
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

}  // namespace riskmap::cpu

STABLE_TORCH_LIBRARY_IMPL(riskmap_ext, CPU, m) {
  m.impl("_weighted_loss_with_gradient", TORCH_BOX(&riskmap::cpu::weighted_loss_with_gradient<false>));
  m.impl("_weighted_loss_with_gradient_", TORCH_BOX(&riskmap::cpu::weighted_loss_with_gradient<true>));
}
