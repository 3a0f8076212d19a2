#include "cuda/tensors.h"
#include "cuda/weighted_loss.h"
#include "ops/weighted_loss.h"

namespace riskmap::cuda {

void scale_gradient_in_place(Tensor gradient, Tensor factor) {
  check_scale_gradient(gradient, factor);
  const DeviceGuard guard(gradient);
  scale_gradient(
      {gradient.data_ptr(), dtype_of_view(gradient), gradient.numel(), factor.data_ptr(), dtype_of_view(factor)},
      stream_of(gradient));
}

}  // namespace riskmap::cuda

STABLE_TORCH_LIBRARY_IMPL(RISKMAP_NAMESPACE, RISKMAP_CUDA_KEY, m) {
  m.impl("_scale_gradient_", TORCH_BOX(&riskmap::cuda::scale_gradient_in_place));
}
