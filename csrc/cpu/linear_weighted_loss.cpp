// The weighted loss of the logits that a head, a 1x1 convolution, makes of features. A tile's logits are made in
// scratch, and its gradient ends there, too: see kernels/head.h. The rest is that of weighted_loss.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/loss_inputs.h"

namespace riskmap::cpu {

std::tuple<Tensor, Tensor, Tensor> linear_weighted_loss(Tensor features, Tensor weight, OptionalTensor bias,
                                                        Tensor target, OptionalTensor risk, OptionalTensor class_weight,
                                                        OptionalTensor foreground, OptionalTensor regions,
                                                        OptionalTensor dice_class_weight, int64_t ignore_index,
                                                        std::optional<int64_t> background, double foreground_floor,
                                                        int64_t normalization, int64_t ce_voxels, int64_t reduction,
                                                        double label_smoothing, double ce_weight, double dice_weight,
                                                        double smooth_nr, double smooth_dr, double alpha, double beta,
                                                        bool squared_pred, bool include_background, bool batch_dice) {
  const LossResult result =
      loss_of({features, target, risk, class_weight, foreground, regions, dice_class_weight, Head{weight, bias}},
              loss_options(ignore_index, background, foreground_floor, normalization, ce_voxels, reduction,
                           label_smoothing, ce_weight, dice_weight, smooth_nr, smooth_dr, alpha, beta, squared_pred,
                           include_background, batch_dice));
  return {result.loss, result.scale, result.dice_slopes};
}

Tensor linear_weighted_loss_sums(Tensor features, Tensor weight, OptionalTensor bias, Tensor target,
                                 OptionalTensor risk, OptionalTensor class_weight, OptionalTensor foreground,
                                 OptionalTensor regions, int64_t ignore_index, std::optional<int64_t> background,
                                 int64_t ce_voxels, double label_smoothing, bool squared_pred) {
  return loss_sums_of({features, target, risk, class_weight, foreground, regions, {}, Head{weight, bias}},
                      gradient_options(ignore_index, background, ce_voxels, label_smoothing, squared_pred));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_weighted_loss_backward(
    Tensor grad_loss, Tensor features, Tensor weight, OptionalTensor bias, Tensor target, OptionalTensor risk,
    OptionalTensor class_weight, OptionalTensor foreground, OptionalTensor regions, Tensor scale, Tensor dice_slopes,
    int64_t ignore_index, std::optional<int64_t> background, int64_t ce_voxels, double label_smoothing,
    bool squared_pred, bool grad_features, bool grad_parameters, bool grad_risk) {
  const LossGradients gradients =
      loss_backward_of({features, target, risk, class_weight, foreground, regions, {}, Head{weight, bias}},
                       gradient_options(ignore_index, background, ce_voxels, label_smoothing, squared_pred), grad_loss,
                       scale, dice_slopes, {grad_risk, grad_features, grad_parameters});
  return {gradients.logits, gradients.weight, gradients.bias, gradients.risk};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_weighted_loss_with_gradient(
    Tensor features, Tensor weight, OptionalTensor bias, Tensor target, OptionalTensor risk,
    OptionalTensor class_weight, OptionalTensor foreground, OptionalTensor regions, int64_t ignore_index,
    std::optional<int64_t> background, double foreground_floor, int64_t normalization, int64_t ce_voxels,
    int64_t reduction, double label_smoothing, double ce_weight, bool grad_features, bool grad_parameters,
    bool grad_risk) {
  LossGradients gradients;
  const Tensor loss =
      loss_with_gradient_of({features, target, risk, class_weight, foreground, regions, {}, Head{weight, bias}},
                            cross_entropy_options(ignore_index, background, foreground_floor, normalization, ce_voxels,
                                                  reduction, label_smoothing, ce_weight),
                            {grad_risk, grad_features, grad_parameters}, gradients);
  return {loss, gradients.logits, gradients.weight, gradients.bias, gradients.risk};
}

}  // namespace riskmap::cpu

STABLE_TORCH_LIBRARY_IMPL(riskmap_ext, CPU, m) {
  m.impl("linear_weighted_loss", TORCH_BOX(&riskmap::cpu::linear_weighted_loss));
  m.impl("_linear_weighted_loss_sums", TORCH_BOX(&riskmap::cpu::linear_weighted_loss_sums));
  m.impl("_linear_weighted_loss_backward", TORCH_BOX(&riskmap::cpu::linear_weighted_loss_backward));
  m.impl("_linear_weighted_loss_with_gradient", TORCH_BOX(&riskmap::cpu::linear_weighted_loss_with_gradient));
}
