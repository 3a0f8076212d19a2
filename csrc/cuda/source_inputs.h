// Shared by the ops that read source logits: inputs as the kernels take them, and the pass that makes a map.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "cuda/device.h"
#include "cuda/leep.h"
#include "ops/views.h"

namespace riskmap::cuda {

// Keeps the copies that `args` points to; see DeviceLossInputs.
class DeviceSourceInputs {
 public:
  DeviceSourceInputs(const Tensor& source, const Tensor& target, const OptionalTensor& regions, int64_t num_classes,
                     int64_t ignore_index);
  DeviceSourceInputs(const DeviceSourceInputs&) = delete;
  DeviceSourceInputs& operator=(const DeviceSourceInputs&) = delete;

  SourceInputs args{};

 private:
  Tensor source_, target_, regions_;
};

struct TransferPass {
  Tensor map;      // [B, *S] float32
  Tensor partial;  // of Transfer, with MapKind::kMarked
  Chunking chunking;
};

TransferPass transfer_pass(const Tensor& source, const Tensor& target, const Tensor& conditional,
                           const OptionalTensor& regions, int64_t ignore_index, int64_t background, MapKind kind,
                           const math::RiskCurve& curve, cudaStream_t stream);

}  // namespace riskmap::cuda
