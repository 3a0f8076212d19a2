#pragma once

#include "math/reduction.h"
#include "ops/check.h"

namespace riskmap {

using math::Normalization;
using math::Reduction;
using math::Region;

struct LossOptions {
  int64_t ignore_index;
  std::optional<int64_t> background;
  double foreground_floor;
  Normalization normalization;
  Region region;
  Reduction reduction;
  double label_smoothing, ce_weight, dice_weight;
  bool include_background, batch_dice;

  bool dice() const { return dice_weight != 0; }
  // Classes whose Dice counts; regions have no background among them.
  bool in_dice(int64_t c, bool regions) const {
    return regions || include_background || !background || c != *background;
  }
};

// The tensors of the loss: logits [B, C, *S]; target [B, *S]; risk [B, *S], class weights [C], foreground [B, *S] and
// regions [C, L] or none. With regions the C channels are overlapping regions of L labels, and target holds labels.
struct LossTensors {
  Tensor logits, target;
  OptionalTensor risk, weight, foreground, regions;

  int64_t num_labels() const { return regions ? regions->size(1) : logits.size(1); }
};

// The outputs of the op:
// loss: float32 (float64 for float64 logits) scalar, or [B, *S] without reduction;
// scale [B] float64: what each image's sum of w c CE is multiplied by in the loss;
// dice_slopes [B, 2, C] float64 ([0] without Dice): derivative of the loss by pi at all voxels, and the part added
// where the voxel is in class c.
void check_loss_tensors(const char* op, const LossTensors& tensors);
void check_weighted_loss(const LossTensors& tensors, const LossOptions& options);

// grad_loss: scalar, or [B, *S] for the map of reduction none; scale and dice_slopes as the op returned them.
void check_loss_backward(const LossTensors& tensors, const Tensor& grad_loss, const Tensor& scale,
                         const Tensor& dice_slopes, bool grad_risk);
void check_loss_with_gradient(const LossTensors& tensors, const LossOptions& options, bool grad_risk);
// gradient: floating, its elements dense in memory; factor: a floating scalar on the same device.
void check_scale_gradient(const Tensor& gradient, const Tensor& factor);

}  // namespace riskmap
