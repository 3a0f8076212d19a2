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

// [C], contiguous, as the caller gave them; data == nullptr: 1.
struct ClassWeight {
  const void* data;
  Dtype dtype;
};

struct LossInputs {
  Volume logits;    // [B, C, S]
  VoxelMap target;  // [B, S]
  LabelCode label;
  VoxelMap risk;        // [B, S] or absent: 1
  VoxelMap foreground;  // [B, S] or absent
  ClassWeight class_weight;
  const uint8_t* regions;  // [R, L], 1 where the label is in the region; nullptr: softmax
  int64_t num_labels;      // L, with a softmax C
  double label_smoothing;  // eps
  int64_t background;      // -1: every valid voxel is foreground
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
  double* partial;   // [B, columns, chunks], columns as math::LossColumn
  uint32_t* ticket;  // becomes 0, for finish_loss; or nullptr
};

// Voxels of a chunk of the pass over the labels.
struct VoxelCount {
  uint32_t valid, foreground, bad_labels, unused;
};

// The loss from the same pass as its gradient: every block makes the scale of its image from the counts of an earlier
// pass, and the last one makes the loss.
struct LossInOne {
  void* loss;  // scalar; nullptr: not wanted
  bool loss_is_double;
  const VoxelCount* counts;  // [B, count_chunks]
  int64_t batch, count_chunks;
  math::Normalization normalization;
  math::Reduction reduction;
  double foreground_floor, ce_weight;
  double* scale;     // [B], scratch
  double* partial;   // [B, kLossColumns, chunks], scratch
  uint32_t* ticket;  // 0
};

struct LossBackward {
  LossInputs in;
  Chunking chunking;
  const void* grad_loss;  // scalar of grad_dtype; nullptr: 1, and then scale is the factor of each image
  Dtype grad_dtype;
  const double* scale;        // [B], d loss / d (sum of w c CE) of each image; not read with in_one
  VoxelMap grad_map;          // reduction none: gradient of every voxel of the map, else absent
  const double* dice_slopes;  // [B, 2, C], see math::DiceTerm; read with in.class_sums
  Volume grad_logits;
  VoxelMap grad_risk;  // or absent
  LossInOne in_one;    // of cross-entropy alone
};

// Counts of voxels, and labels in one byte each (classes as they are, kIgnoredCode, kBadCode), which cost less to read
// again than 4 or 8 bytes do.
inline constexpr int64_t kMaxCodedLabels = 254;
inline constexpr uint8_t kIgnoredCode = 255, kBadCode = 254;

struct LossCount {
  LossInputs in;
  Chunking chunking;
  uint8_t* codes;      // [B, S] or nullptr
  VoxelCount* counts;  // [B, chunks]
  uint32_t* ticket;    // becomes 0
};

// Sums over images and the batch.
struct LossFinish {
  int64_t batch, classes, chunks_per_image;
  bool class_sums;
  double* partial;   // [B, columns, chunks]
  double* sums;      // [B, columns], scratch
  uint32_t* ticket;  // 0; nullptr: there is one chunk, and partial and sums are the same

  math::Normalization normalization;
  math::Reduction reduction;
  double foreground_floor, ce_weight, dice_weight;
  ClassWeight class_weight;
  ClassWeight dice_class_weight;  // for Dice
  math::DiceFormula dice_formula;
  int64_t excluded_class;  // from Dice, or -1
  bool batch_dice;

  double* scale;        // [B]
  double* dice_slopes;  // [B, 2, C] with Dice
  void* loss;           // scalar, or nullptr: only scales and slopes are wanted
  bool loss_is_double;
};

void launch_weighted_loss_forward(const LossForward& args, cudaStream_t stream);
void launch_weighted_loss_backward(const LossBackward& args, cudaStream_t stream);
void launch_region_loss_forward(const LossForward& args, cudaStream_t stream);
void launch_region_loss_backward(const LossBackward& args, cudaStream_t stream);
void count_voxels(const LossCount& args, cudaStream_t stream);
void finish_loss(const LossFinish& args, cudaStream_t stream);
void sum_partials(const double* partial, double* sums, int64_t columns, int64_t chunks, cudaStream_t stream);

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
