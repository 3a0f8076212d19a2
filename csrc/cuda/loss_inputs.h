// Shared by the ops of the weighted loss: inputs as the kernels take them, workspaces, and what follows the kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "cuda/device.h"
#include "cuda/tensors.h"
#include "cuda/weighted_loss.h"
#include "ops/views.h"
#include "ops/weighted_loss.h"

namespace riskmap::cuda {

// Keeps the copies and tables that `args` points to. They may be given up once the kernels are launched: torch's
// allocator hands their memory out again on the same stream only.
class DeviceLossInputs {
 public:
  DeviceLossInputs(const LossTensors& tensors, int64_t ignore_index, std::optional<int64_t> background,
                   CeVoxels ce_voxels, double label_smoothing, bool class_sums, bool squared, cudaStream_t stream);
  DeviceLossInputs(const DeviceLossInputs&) = delete;
  DeviceLossInputs& operator=(const DeviceLossInputs&) = delete;

  LossInputs args{};

  ScalarType result_dtype() const { return is_double() ? ScalarType::Double : ScalarType::Float; }
  Chunking chunking() const { return has_regions_ ? region_chunking(args) : loss_chunking(args); }
  // Sums over images, to be told where the partial sums and results are.
  LossFinish finish(const LossOptions& options);

 private:
  bool is_double() const { return args.logits.dtype == Dtype::kDouble; }

  bool has_regions_;
  Tensor logits_, target_, risk_, foreground_, given_class_weight_, regions_;
  Tensor class_weight_, smooth_, bad_class_weight_, dice_class_weight_;
  bool has_class_weight_, has_dice_class_weight_, has_tables_ = false;
};

// All of LossFinish that the options say.
LossFinish finish_of(const LossOptions& options, int64_t excluded_class);

// Partial sums of a pass, and their sums over chunks: what LossFinish::partial and sums point to.
struct PartialSums {
  Tensor partial, sums;

  PartialSums(const Tensor& like, int64_t batch, int64_t columns, const Chunking& chunking)
      : partial(empty_on(like, {batch * columns * chunking.chunks_per_image}, ScalarType::Double)),
        sums(empty_on(like, {batch * columns}, ScalarType::Double)) {}
  double* data() const { return static_cast<double*>(partial.data_ptr()); }
  void tell(LossFinish& finish, const Chunking& chunking) const {
    finish.partial = data();
    finish.sums = static_cast<double*>(sums.data_ptr());
    finish.chunks_per_image = chunking.chunks_per_image;
  }
};

// A gradient laid out as `logits`; where that is neither planar nor channels-last, the kernel writes a contiguous
// tensor first.
struct GradientTensor {
  Tensor result, written;

  explicit GradientTensor(const Tensor& logits);
  Volume view();
  void finish();  // after the kernels are launched
};

}  // namespace riskmap::cuda
