// From sums over images to the loss: normalisers, scales and shares. A few numbers for each image, on the host or in
// one thread of a GPU.
#pragma once

#include <cstdint>

#include "math/portability.h"

namespace riskmap::math {

// Numbers as in the schema.
enum class Normalization : int64_t {
  kForeground = 0,
  kBatchForeground = 1,
  kValid = 2,
  kBatchValid = 3,
  kWeighted = 4,
  kNone = 5
};
enum class CeVoxels : int64_t { kValid = 0, kForeground = 1 };
enum class Reduction : int64_t { kMean = 0, kSum = 1, kNone = 2 };

// Columns of the sums over an image. Where the sums of the classes are wanted, 3 C columns follow: sum pi 1[y = c], sum
// pi (or pi^2) and sum 1[y = c] of every class.
enum LossColumn : int { kCrossEntropy, kValid, kForegroundVoxels, kBadLabels, kBadRisk, kLossColumns };

RISKMAP_HD int64_t loss_columns(int64_t classes, bool class_sums) {
  return kLossColumns + (class_sums ? 3 * classes : 0);
}

// Voxels of an image or of the batch, and the sum of the class weights of the valid ones.
struct VoxelCounts {
  int64_t valid, foreground;
  double class_weight;
};

RISKMAP_HD double floored_foreground(VoxelCounts counts, double foreground_floor) {
  const double floor = foreground_floor * static_cast<double>(counts.valid);
  const double foreground = static_cast<double>(counts.foreground);
  if (counts.foreground == 0) return static_cast<double>(counts.valid);
  return foreground > floor ? foreground : floor;
}

// N_b of every normalisation; 0 where nothing is valid.
RISKMAP_HD double normalizer(Normalization normalization, double foreground_floor, VoxelCounts image, VoxelCounts batch,
                             int64_t batch_size) {
  switch (normalization) {
    case Normalization::kForeground: return floored_foreground(image, foreground_floor);
    case Normalization::kBatchForeground:
      return floored_foreground(batch, foreground_floor) / static_cast<double>(batch_size);
    case Normalization::kValid: return static_cast<double>(image.valid);
    case Normalization::kBatchValid: return static_cast<double>(batch.valid) / static_cast<double>(batch_size);
    case Normalization::kWeighted: return batch.class_weight / static_cast<double>(batch_size);
    default: return image.valid > 0 ? 1 : 0;
  }
}

// What an image's sum of w c CE is multiplied by in the loss; without reduction that is ce_weight.
RISKMAP_HD double image_scale(Reduction reduction, double ce_weight, double normalizer, int64_t batch_size) {
  if (reduction == Reduction::kNone) return ce_weight;
  const double share = reduction == Reduction::kMean ? 1.0 / static_cast<double>(batch_size) : 1.0;
  return normalizer > 0 ? ce_weight * share / normalizer : 0;
}

// What the Dice loss of one class and one group (an image, or the batch) is multiplied by, but for its class weight.
RISKMAP_HD double dice_share(Reduction reduction, double dice_weight, int64_t counted_classes, int64_t groups) {
  const double mean = reduction == Reduction::kMean ? static_cast<double>(groups) : 1.0;
  return dice_weight / static_cast<double>(counted_classes) / mean;
}

}  // namespace riskmap::math
