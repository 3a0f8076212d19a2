// Device and stream of a tensor, and where the CUDA ops are registered:
//   STABLE_TORCH_LIBRARY_IMPL(RISKMAP_NAMESPACE, RISKMAP_CUDA_KEY, m) { ... }
// Built for csrc/cuda_on_host the same files serve CPU tensors, which have neither.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>

#include "ops/library.h"

#if defined(RISKMAP_CUDA_ON_HOST)
#define RISKMAP_CUDA_KEY CPU
#else
#define RISKMAP_CUDA_KEY CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>
#endif

namespace riskmap::cuda {

#if defined(RISKMAP_CUDA_ON_HOST)

class DeviceGuard {
 public:
  explicit DeviceGuard(const torch::stable::Tensor&) {}
};

inline cudaStream_t stream_of(const torch::stable::Tensor&) { return nullptr; }

#else

// Makes the tensor's device the current one for its lifetime.
class DeviceGuard {
 public:
  explicit DeviceGuard(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// The stream that torch uses at present on the tensor's device.
inline cudaStream_t stream_of(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

#endif

}  // namespace riskmap::cuda
