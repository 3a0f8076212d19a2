#pragma once

#include "math/reduction.h"
#include "math/weighted_loss.h"
#include "ops/check.h"

namespace riskmap {

using math::CeVoxels;
using math::Normalization;
using math::Reduction;

struct LossOptions {
  int64_t ignore_index;
  std::optional<int64_t> background;
  double foreground_floor;
  Normalization normalization;
  CeVoxels ce_voxels;
  Reduction reduction;
  double label_smoothing, ce_weight, dice_weight;
  math::DiceFormula dice_formula;
  bool squared_pred, include_background, batch_dice;

  bool dice() const { return dice_weight != 0; }
  // The class whose Dice does not count, or -1; regions have no background among them.
  int64_t excluded_class(bool regions) const { return regions || include_background ? -1 : background.value_or(-1); }
};

// The options of the schemas: of the loss, of its finish, of a gradient once scales and slopes are known, and of the
// loss without Dice.
LossOptions loss_options(int64_t ignore_index, std::optional<int64_t> background, double foreground_floor,
                         int64_t normalization, int64_t ce_voxels, int64_t reduction, double label_smoothing,
                         double ce_weight, double dice_weight, double smooth_nr, double smooth_dr, double alpha,
                         double beta, bool squared_pred, bool include_background, bool batch_dice);
LossOptions finish_options(double foreground_floor, int64_t normalization, int64_t reduction, double ce_weight,
                           double dice_weight, double smooth_nr, double smooth_dr, double alpha, double beta,
                           bool batch_dice);
LossOptions gradient_options(int64_t ignore_index, std::optional<int64_t> background, int64_t ce_voxels,
                             double label_smoothing, bool squared_pred);
LossOptions cross_entropy_options(int64_t ignore_index, std::optional<int64_t> background, double foreground_floor,
                                  int64_t normalization, int64_t ce_voxels, int64_t reduction, double label_smoothing,
                                  double ce_weight);

// A 1x1 convolution that makes the logits: weight [C, F], bias [C] or none.
struct Head {
  Tensor weight;
  OptionalTensor bias;
};

// The tensors of the loss: logits [B, C, *S], or with a head the features [B, F, *S] that it makes them of; target
// [B, *S]; risk [B, *S], class weights [C], foreground [B, *S], regions [C, L] and class weights of the Dice [C] or
// none. With regions the C channels are overlapping regions of L labels, and target holds labels.
struct LossTensors {
  Tensor logits, target;
  OptionalTensor risk, class_weight, foreground, regions, dice_class_weight;
  std::optional<Head> head{};

  // Of the public op, for messages.
  const char* op() const { return head ? "linear_weighted_loss" : "weighted_loss"; }
  const char* class_weight_name() const { return head ? "class_weight" : "weight"; }
  int64_t classes() const { return head ? head->weight.size(0) : logits.size(1); }
  int64_t num_labels() const { return regions ? regions->size(1) : classes(); }
  // Whether the sums of the classes are wanted: for Dice, and for a normaliser that is made of them.
  bool needs_class_sums(const LossOptions& options) const {
    return options.dice() || (options.normalization == Normalization::kWeighted && class_weight);
  }
};

// What becomes of the sums over images, [B, columns] as math::LossColumn has them.
struct FinishTensors {
  Tensor sums;
  OptionalTensor class_weight, dice_class_weight;

  int64_t classes() const { return (sums.size(1) - math::kLossColumns) / 3; }
};

// The outputs of the op:
// loss: float32 (float64 for float64 logits) scalar, or [B, *S] without reduction;
// scale [B] float64: what each image's sum of w c CE is multiplied by in the loss;
// dice_slopes [B, 2, C] float64 ([0] without Dice): derivatives of the loss by the sums P and I, see math::DiceTerm.
void check_loss_tensors(const LossTensors& tensors);

// grad_loss: scalar, or [B, *S] for the map of reduction none; scale and dice_slopes as the op returned them.
// overwrites: the gradient takes the memory of the logits, which must be dense.
void check_loss_backward(const LossTensors& tensors, const Tensor& grad_loss, const Tensor& scale,
                         const Tensor& dice_slopes, bool grad_risk, bool overwrites);
void check_loss_finish(const FinishTensors& tensors);
void check_loss_with_gradient(const LossTensors& tensors, bool grad_risk, bool overwrites);
// gradient: floating, its elements dense in memory; factor: a floating scalar on the same device.
void check_scale_gradient(const Tensor& gradient, const Tensor& factor);

}  // namespace riskmap
