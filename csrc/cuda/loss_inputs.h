// Shared by the ops of the weighted loss: inputs as the kernels take them, and the gradient that they write.
#pragma once

#include "cuda/tensors.h"
#include "cuda/weighted_loss.h"
#include "ops/weighted_loss.h"

namespace riskmap::cuda {

// Keeps the copies that `args` points to, see Workspace.
class DeviceLossInputs {
 public:
  DeviceLossInputs(const LossTensors& tensors, int64_t ignore_index, std::optional<int64_t> background,
                   CeVoxels ce_voxels, double label_smoothing, bool class_sums, bool squared, cudaStream_t stream);
  DeviceLossInputs(const DeviceLossInputs&) = delete;
  DeviceLossInputs& operator=(const DeviceLossInputs&) = delete;

  LossInputs args{};

  const Tensor& logits() const { return logits_; }  // as they are read: a copy where they had gaps
  bool is_double() const { return args.logits.dtype == Dtype::kDouble; }
  ScalarType result_dtype() const { return is_double() ? ScalarType::Double : ScalarType::Float; }
  Chunking chunking() const { return has_regions_ ? region_chunking(args) : loss_chunking(args); }
  // Sums over images, to be told where the sums and results are.
  LossFinish finish(const LossOptions& options) const;

 private:
  bool has_regions_;
  Tensor logits_;
  Labels labels_;
  Tensor risk_, foreground_, class_weight_, regions_, dice_class_weight_;
  ClassWeight dice_class_weight_view_{};
};

// All of LossFinish that the options say.
LossFinish finish_of(const LossOptions& options, int64_t excluded_class);

// As the caller gave them; `keep` holds a copy where they had gaps.
ClassWeight view_class_weight(const OptionalTensor& weight, Tensor& keep);

// A gradient laid out as `logits`; where that is not how the kernel reads them (`read`), it writes another tensor
// first. overwrites: it takes the memory of what is read.
struct GradientTensor {
  Tensor result, written;

  GradientTensor(const Tensor& logits, const Tensor& read, bool overwrites);
  Volume view();
  void finish();  // after the kernels are launched
};

// [B, *S] as the risk is, or [0] where it is not wanted.
Tensor empty_grad_risk(const LossTensors& tensors, bool wanted);

void launch_gradient(const LossBackward& args, cudaStream_t stream);

}  // namespace riskmap::cuda
