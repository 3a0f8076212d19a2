// Shared by the ops of the weighted loss: inputs as the kernels take them, and sums over their partial results.
#pragma once

#include <vector>

#include "cpu/kernels/weighted_loss.h"
#include "cpu/tensors.h"
#include "ops/weighted_loss.h"

namespace riskmap::cpu {

// A table in float or double, as the kernels sum; padded so that a whole vector can be read (see lookup).
class Table {
 public:
  Table(const std::vector<double>& values, bool as_double);
  const void* data() const { return double_ ? static_cast<const void*>(wide_.data()) : narrow_.data(); }

 private:
  bool double_;
  std::vector<float> narrow_;
  std::vector<double> wide_;
};

// Class weights, 1 where there are none; op and name are told where one is negative or not finite.
std::vector<double> class_weights(const char* op, const char* name, const OptionalTensor& weight, int64_t classes);

// As large as the logits that a head makes of `features`, with no data: no kernel reads it in place.
inline Volume logits_of_head(const Volume& features, int64_t classes) {
  return {nullptr, features.dtype, features.batch, classes, features.voxels, 0, 0, 0};
}

// Keeps the copies and tables that args points to.
class LossInputs {
 public:
  LossInputs(const LossTensors& tensors, const LossOptions& options, bool class_sums);
  LossInputs(const LossInputs&) = delete;
  LossInputs& operator=(const LossInputs&) = delete;

  LossArgs args{};

  const Tensor& logits() const { return logits_; }  // as they are read: a copy where they had gaps
  int64_t chunks() const { return args.logits.batch * args.chunking.chunks_per_image; }
  bool is_double() const { return args.logits.dtype == Dtype::kDouble; }
  ScalarType result_dtype() const { return is_double() ? ScalarType::Double : ScalarType::Float; }
  size_t scratch_bytes() const { return loss_scratch_bytes(args); }

 private:
  Tensor logits_, target_, risk_, foreground_;
  Table class_weight_, smooth_, regions_, head_weight_, head_bias_, zeros_;
};

// Sums over each image, [B, columns], see math::LossColumn.
struct LossSums {
  int64_t batch, columns;
  std::vector<double> values;

  // In chunk order. class_partials: as LossForwardArgs has them, with_classes alone.
  LossSums(const std::vector<LossPartial>& partials, const std::vector<double>& class_partials, const LossInputs& in,
           bool with_classes);
  explicit LossSums(const Tensor& sums);

  double at(int64_t image, int64_t column) const { return values[static_cast<size_t>(image * columns + column)]; }
  double total(int64_t column) const;
  math::VoxelCounts counts(int64_t image) const;
};

// What each image's sum of w c CE is multiplied by in the loss; without reduction that is ce_weight.
std::vector<double> image_scales(const LossOptions& options, const LossSums& sums, const OptionalTensor& class_weight);

// The cross-entropy part of the loss.
double cross_entropy_total(const LossSums& sums, const std::vector<double>& scales);

// The Dice part; fills slopes [B, 2, C].
double dice_total(const LossOptions& options, int64_t excluded_class, const LossSums& sums,
                  const OptionalTensor& dice_class_weight, std::vector<double>& slopes);

void raise_bad_values(const LossTensors& tensors, const LossSums& sums, int64_t ignore_index);

Tensor scalar_tensor(double value, ScalarType dtype);
Tensor tensor_of(const std::vector<double>& values, std::initializer_list<int64_t> shape);

// Gradients that are not wanted are [0].
struct WantedGradients {
  bool risk;
  bool logits = true;       // with a head, features
  bool parameters = false;  // of a head
  bool overwrites = false;  // that of the logits takes their memory
};
struct LossGradients {
  Tensor logits, risk;  // with a head, logits are features
  Tensor weight, bias;  // of a head
};
// Runs the gradient kernel; partial as in LossBackwardArgs.
LossGradients loss_gradients(const LossTensors& tensors, const LossInputs& in, const std::vector<double>& factor,
                             const Tensor* grad_map, const std::vector<double>& dice_overall,
                             const std::vector<double>& dice_hit, WantedGradients wanted, LossPartial* partial);

// The ops, of logits or of a head.
struct LossResult {
  Tensor loss, scale, dice_slopes;
};
LossResult loss_of(const LossTensors& tensors, const LossOptions& options);
Tensor loss_sums_of(const LossTensors& tensors, const LossOptions& options);
LossGradients loss_backward_of(const LossTensors& tensors, const LossOptions& options, const Tensor& grad_loss,
                               const Tensor& scale, const Tensor& dice_slopes, WantedGradients wanted);
Tensor loss_with_gradient_of(const LossTensors& tensors, const LossOptions& options, WantedGradients wanted,
                             LossGradients& gradients);

}  // namespace riskmap::cpu
