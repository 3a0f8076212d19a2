// What the kernels of the weighted loss take and give; see ops/weighted_loss.h and math/weighted_loss.h. Every pointer
// is to device memory. Launch functions do not wait for the device.
//
// What the CPU op raises an error for, a label that is no class, a risk or class weight that is negative or not finite,
// turns results into NaN here, since an error would have to wait for the device: the loss, the image's scale and Dice
// slopes, hence its gradient at all valid voxels; without reduction, the voxel of the map.
#pragma once

#include <cuda_runtime.h>

#include "cuda/types.h"
#include "math/reduction.h"
#include "math/weighted_loss.h"

namespace riskmap::cuda {

struct LossInputs {
  Volume logits;    // [B, C, S]
  VoxelMap target;  // [B, S]
  LabelCode label;
  VoxelMap risk;              // [B, S] or absent: 1
  VoxelMap foreground;        // [B, S] or absent
  const void* class_weight;   // acc_t[C] or nullptr: 1. With regions: c[r] / R, never nullptr
  const void* smooth;         // acc_t[C + 1]: eps / C * c[k], then their sum; nullptr without label smoothing
  const uint8_t* membership;  // [R, L], 1 where the label is in the region; nullptr: softmax
  int64_t num_labels;         // L, with a softmax C
  double label_smoothing;     // eps
  int64_t background;         // -1: every valid voxel is foreground
  bool ce_in_foreground;
  bool class_sums;  // the sums of the classes, or their slopes, are wanted
  bool squared;     // P is the sum of pi^2
};

using math::kBadLabels, math::kBadRisk, math::kCrossEntropy, math::kForegroundVoxels, math::kLossColumns, math::kValid;
using math::loss_columns;

Chunking loss_chunking(const LossInputs& in);    // of the passes over the logits
Chunking region_chunking(const LossInputs& in);  // the same for regions
Chunking count_chunking(const LossInputs& in);   // of the pass over the labels

struct LossForward {
  LossInputs in;
  Chunking chunking;
  VoxelMap map;  // reduction none: factor * w c CE of every voxel, else absent
  double map_factor;
  double* partial;  // [B, columns, chunks], columns as math::LossColumn
};

struct LossBackward {
  LossInputs in;
  Chunking chunking;
  const void* grad_loss;  // scalar of grad_dtype; nullptr: 1, and then scale is the factor of each image
  Dtype grad_dtype;
  const double* scale;        // [B], d loss / d (sum of w c CE) of each image
  VoxelMap grad_map;          // reduction none: gradient of every voxel of the map, else absent
  const double* dice_slopes;  // [B, 2, C], see math::DiceTerm; read with in.class_sums
  Volume grad_logits;
  VoxelMap grad_risk;  // or absent
  double* partial;     // [B, kLossColumns, chunks] where the loss is wanted from the same pass, else nullptr
};

// Counts of voxels, and labels in one byte each (classes as they are, kIgnoredCode, kBadCode), which cost less to read
// again than 4 or 8 bytes do.
inline constexpr int64_t kMaxCodedLabels = 254;
inline constexpr uint8_t kIgnoredCode = 255, kBadCode = 254;

struct LossCount {
  LossInputs in;
  Chunking chunking;
  uint8_t* codes;   // [B, S] or nullptr
  double* partial;  // [B, kLossColumns, chunks]
};

// [C], contiguous; data == nullptr: 1.
struct ClassWeight {
  const void* data;
  Dtype dtype;
};

// Sums over images and the batch.
struct LossFinish {
  int64_t batch, classes, chunks_per_image;
  bool class_sums;
  double* partial;                  // [B, columns, chunks]
  double* sums;                     // [B, columns], scratch
  const uint8_t* bad_class_weight;  // 1 where a class weight is negative or not finite; nullptr: there are none

  math::Normalization normalization;
  math::Reduction reduction;
  double foreground_floor, ce_weight, dice_weight;
  ClassWeight class_weight;       // for the normalisation weighted
  ClassWeight dice_class_weight;  // for Dice
  math::DiceFormula dice_formula;
  int64_t excluded_class;  // from Dice, or -1
  bool batch_dice;

  double* scale;        // [B]
  double* dice_slopes;  // [B, 2, C] with Dice
  void* loss;           // scalar, or nullptr: only scales are wanted
  bool loss_is_double;
};

// The loss from the scales of an earlier LossFinish and the sums of a gradient pass. Where an image has a bad risk, its
// gradients become NaN.
struct LossTotal {
  LossFinish sums;
  Volume grad_logits;
  VoxelMap grad_risk;  // or absent
};

// Class weights in the precision of the sums.
struct LossTables {
  const void* given;  // class weights [C] of given_dtype, contiguous; nullptr: 1
  Dtype given_dtype;
  int64_t classes;
  bool to_double;
  double weight_factor, smooth_factor;
  void* class_weight;         // acc_t[C]: given * weight_factor; nullptr: not wanted
  void* smooth;               // acc_t[C + 1]: given * smooth_factor, and the sum; nullptr: not wanted
  uint8_t* bad_class_weight;  // [1]
};

void make_tables(const LossTables& args, cudaStream_t stream);
void launch_weighted_loss_forward(const LossForward& args, cudaStream_t stream);
void launch_weighted_loss_backward(const LossBackward& args, cudaStream_t stream);
void launch_region_loss_forward(const LossForward& args, cudaStream_t stream);
void launch_region_loss_backward(const LossBackward& args, cudaStream_t stream);
void count_voxels(const LossCount& args, cudaStream_t stream);
void finish_loss(const LossFinish& args, cudaStream_t stream);
void sum_partials(const double* partial, double* sums, int64_t columns, int64_t chunks, cudaStream_t stream);
void total_loss(const LossTotal& args, cudaStream_t stream);

// gradient *= factor in place, 0 for a factor of 0, untouched for 1. The elements lie dense from data on.
struct ScaleGradient {
  void* data;
  Dtype dtype;
  int64_t count;
  const void* factor;  // scalar
  Dtype factor_dtype;
};
void scale_gradient(const ScaleGradient& args, cudaStream_t stream);

}  // namespace riskmap::cuda
