// Shared by the ops that read source logits: inputs as the kernels take them, and the pass that makes a map.
#pragma once

#include "cuda/leep.h"
#include "cuda/tensors.h"

namespace riskmap::cuda {

// Keeps the copies that `args` points to, see Workspace.
class DeviceSourceInputs {
 public:
  DeviceSourceInputs(const char* op, const Tensor& source, const Tensor& target, const OptionalTensor& regions,
                     int64_t num_classes, int64_t ignore_index, cudaStream_t stream);
  DeviceSourceInputs(const DeviceSourceInputs&) = delete;
  DeviceSourceInputs& operator=(const DeviceSourceInputs&) = delete;

  SourceInputs args{};

 private:
  Tensor source_;
  Labels labels_;
  Tensor regions_;
};

struct TransferPass {
  Tensor map;      // [B, *S] float32
  Tensor partial;  // of Transfer, with MapKind::kMarked
  Chunking chunking;
};

TransferPass transfer_pass(const char* op, const Tensor& source, const Tensor& target, const Tensor& conditional,
                           const OptionalTensor& regions, int64_t ignore_index, int64_t background, MapKind kind,
                           const math::RiskCurve& curve, cudaStream_t stream);

}  // namespace riskmap::cuda
