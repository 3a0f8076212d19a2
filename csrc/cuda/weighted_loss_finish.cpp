#include <tuple>

#include "cuda/loss_inputs.h"

namespace riskmap::cuda {

std::tuple<Tensor, Tensor, Tensor> weighted_loss_finish(Tensor sums, OptionalTensor class_weight,
                                                        OptionalTensor dice_class_weight,
                                                        std::optional<int64_t> excluded_class, double foreground_floor,
                                                        int64_t normalization, int64_t reduction, double ce_weight,
                                                        double dice_weight, double smooth_nr, double smooth_dr,
                                                        double alpha, double beta, bool batch_dice, bool as_double) {
  const LossOptions options = finish_options(foreground_floor, normalization, reduction, ce_weight, dice_weight,
                                             smooth_nr, smooth_dr, alpha, beta, batch_dice);
  const FinishTensors tensors{sums, class_weight, dice_class_weight};
  check_loss_finish(tensors);
  const DeviceGuard guard(sums);
  const int64_t batch = sums.size(0), classes = tensors.classes();

  LossFinish finish = finish_of(options, excluded_class.value_or(-1));
  finish.batch = batch;
  finish.classes = classes;
  finish.class_sums = true;
  const Tensor given = torch::stable::contiguous(sums);
  Tensor weight = sums, dice_weights = sums;
  finish.class_weight = view_class_weight(class_weight, weight);
  finish.dice_class_weight = view_class_weight(dice_class_weight, dice_weights);
  Tensor loss = empty_on(sums, {}, as_double ? ScalarType::Double : ScalarType::Float);
  Tensor scale = empty_on(sums, {batch}, ScalarType::Double);
  Tensor dice_slopes = empty_on(sums, {batch, 2, classes}, ScalarType::Double);
  finish.partial = finish.sums = static_cast<double*>(given.data_ptr());
  finish.chunks_per_image = 1;
  finish.scale = static_cast<double*>(scale.data_ptr());
  finish.dice_slopes = static_cast<double*>(dice_slopes.data_ptr());
  finish.loss = loss.data_ptr();
  finish.loss_is_double = as_double;
  finish_loss(finish, stream_of(sums));
  return {loss, scale, dice_slopes};
}

}  // namespace riskmap::cuda

STABLE_TORCH_LIBRARY_IMPL(RISKMAP_NAMESPACE, RISKMAP_CUDA_KEY, m) {
  m.impl("_weighted_loss_finish", TORCH_BOX(&riskmap::cuda::weighted_loss_finish));
}
