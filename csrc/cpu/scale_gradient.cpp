#include <torch/csrc/stable/library.h>

#include <type_traits>

#include "cpu/dtypes.h"
#include "cpu/tensors.h"
#include "ops/weighted_loss.h"

namespace riskmap::cpu {

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

STABLE_TORCH_LIBRARY_IMPL(riskmap_ext, CPU, m) { m.impl("_scale_gradient_", TORCH_BOX(&riskmap::cpu::scale_gradient)); }
