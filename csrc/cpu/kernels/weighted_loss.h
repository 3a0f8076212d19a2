// What the weighted-loss kernels of every instruction set take and give. See csrc/math/weighted_loss.h.
#pragma once

#include "cpu/types.h"

namespace riskmap::cpu {

// A 1x1 convolution: logits = weight features + bias, made tile by tile and never kept.
struct HeadArgs {
  Volume features;     // [B, F, S]
  const void* weight;  // acc_t[C, F]; nullptr: there is no head
  const void* bias;    // acc_t[C]
  const void* zeros;   // acc_t[F]
};

struct HeadGradients {
  Volume features;   // or data == nullptr
  void* parameters;  // acc_t[groups, parameter_sums], zeros at first: the weight's [C, padded F], the bias's [C]
  int64_t chunks_per_group;
};

// Features in whole vectors of any instruction set.
inline int64_t padded_channels(int64_t channels) { return (channels + kMinTile - 1) / kMinTile * kMinTile; }
inline int64_t parameter_sums(int64_t classes, int64_t channels) { return classes * (padded_channels(channels) + 1); }

struct LossArgs {
  Volume logits;  // [B, C, S]; with a head no data
  HeadArgs head;
  VoxelMap target;           // [B, S]
  VoxelMap risk;             // [B, S] or absent: 1
  VoxelMap foreground;       // [B, S] or absent
  const void* class_weight;  // acc_t[C], padded to kMinTile; nullptr: 1. With regions: c[r] / R, never nullptr
  const void* regions;       // acc_t[R, table_pitch(L)], 1 where the label is in the region; nullptr: softmax
  int64_t num_labels;        // L, with a softmax C
  double label_smoothing;    // eps
  const void* smooth;        // acc_t[C], eps / C * c[k]; nullptr without label smoothing
  double smooth_total;       // their sum
  int64_t ignore_index;
  int64_t background;  // -1: every valid voxel is foreground
  bool ce_in_foreground;
  bool class_sums;  // the sums of the classes, or their slopes, are wanted
  bool squared;     // P is the sum of pi^2
  Chunking chunking;
};

// Sums over one chunk; added up in chunk order.
struct LossPartial {
  double cross_entropy;
  int64_t valid, foreground, bad_labels, bad_risk;
};

struct LossForwardArgs : LossArgs {
  VoxelMap map;  // reduction none: factor * w c CE of every voxel, else absent
  double map_factor;
  LossPartial* partial;   // [chunks]
  double* class_partial;  // [chunks, 3, C]: sum pi 1[y = c], sum pi (or pi^2), sum 1[y = c]
};

struct LossBackwardArgs : LossArgs {
  const double* factor;      // [B], d total / d (sum of w c CE) of each image
  VoxelMap grad_map;         // reduction none: gradient of every voxel of the map, else absent
  const void* dice_overall;  // acc_t[B, C], see math::DiceTerm
  const void* dice_hit;      // acc_t[B, C]
  Volume grad_logits;        // with a head no data
  HeadGradients grad_head;
  bool streamed;         // the gradient is too large for the caches
  VoxelMap grad_risk;    // or absent
  LossPartial* partial;  // [chunks] where the loss is wanted from the same pass, else nullptr; only cross_entropy and
                         // bad_risk are set
};

// Counts valid, foreground and bad labels of a chunk: what the normaliser needs before a gradient can be written.
using LossCountKernel = void(const LossArgs&, LossPartial*, int64_t chunk, void* scratch);

// Elements of scratch for a tile of features, planar and channels-last; 0 without a head.
inline int64_t head_scratch(const LossArgs& args) {
  const int64_t tile = tile_voxels(args.logits.classes, args.logits.dtype);
  return padded_channels(args.head.features.classes) * (tile_pitch(tile) + tile);
}
size_t loss_scratch_bytes(const LossArgs& args);

using LossForwardKernel = void(const LossForwardArgs&, int64_t chunk, void* scratch);
using LossBackwardKernel = void(const LossBackwardArgs&, int64_t chunk, void* scratch);

namespace baseline {
LossCountKernel weighted_loss_count;
LossForwardKernel weighted_loss_forward, region_loss_forward;
LossBackwardKernel weighted_loss_backward, region_loss_backward;
}  // namespace baseline
namespace avx2 {
LossCountKernel weighted_loss_count;
LossForwardKernel weighted_loss_forward, region_loss_forward;
LossBackwardKernel weighted_loss_backward, region_loss_backward;
}  // namespace avx2
namespace avx512 {
LossCountKernel weighted_loss_count;
LossForwardKernel weighted_loss_forward, region_loss_forward;
LossBackwardKernel weighted_loss_backward, region_loss_backward;
}  // namespace avx512

}  // namespace riskmap::cpu
