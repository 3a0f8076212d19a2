// What the LEEP kernels of every instruction set take and give.
#pragma once

#include "cpu/types.h"
#include "math/risk_map.h"

namespace riskmap::cpu {

// Logits of the source model: of Z classes, or of R overlapping regions that make up Z labels. The Z logits of a voxel
// are then the sums of the logits of the regions that a label is in: softmax of these is the posterior of the labels
// under independent sigmoids, restricted to the labels there are.
struct SourceArgs {
  Volume source;        // [B, Z, S] or [B, R, S]
  const void* regions;  // acc_t[R, Z], 1 where the label is in the region; nullptr: softmax source
  int64_t classes;      // Z
  VoxelMap target;      // [B, S]
};

// Rows of scratch that a tile of the source takes.
inline int64_t source_rows(const SourceArgs& args) { return args.classes + (args.regions ? args.source.classes : 0); }

struct StatisticsArgs : SourceArgs {
  int64_t num_classes;
  int64_t ignore_index;
  Chunking chunking;
  double* joint;        // [chunks, C, Z]
  int64_t* bad_labels;  // [chunks]
};

struct TransferPartial {
  int64_t bad_labels, foreground;
  double low, high;  // smallest and largest hardness of the chunk's valid voxels; these and foreground if wants_range
};

inline constexpr float kIgnoredMark = 1.0f;  // no transferability is above 0

struct TransferArgs : SourceArgs {
  const void* by_source;  // acc_t[Z, kMinTile], P(y|z) with a row for each source class; of up to kMinTile labels
  const void* by_label;   // acc_t[C, padded_classes], the same with a row for each label, 0 beyond Z
  int64_t num_classes;
  int64_t ignore_index;
  int64_t background;  // -1: every valid voxel is foreground
  Chunking chunking;
  float* out;                    // [B, S]
  const math::RiskCurve* curve;  // nullptr: T is written
  bool wants_range;          // without a curve: the range of the hardness, and kIgnoredMark where a voxel is ignored
  TransferPartial* partial;  // [chunks]
};

// Up to this many (y, z) pairs, a masked vector sum for each pair is quicker than adding rows.
inline constexpr int64_t kMaxMaskedSums = 64;

// Elements of scratch for the sums of either way.
inline constexpr int64_t statistics_sums(int64_t source_classes, int64_t num_classes) {
  const int64_t by_row = num_classes * ((source_classes + kMinTile - 1) / kMinTile * kMinTile);
  const int64_t masked = kMaxMaskedSums * kMinTile;
  return by_row > masked ? by_row : masked;
}

// Z up to a whole vector; rows of scratch with as many classes.
inline int64_t padded_classes(const SourceArgs& args) { return (args.classes + kMinTile - 1) / kMinTile * kMinTile; }
inline int64_t padded_rows(const SourceArgs& args) { return source_rows(args) + padded_classes(args) - args.classes; }

size_t statistics_scratch_bytes(const StatisticsArgs& args);
size_t transfer_scratch_bytes(const TransferArgs& args);

using StatisticsKernel = void(const StatisticsArgs&, int64_t chunk, void* scratch);
using TransferKernel = void(const TransferArgs&, int64_t chunk, void* scratch);
// Marked T in place to weights.
using WeighMapKernel = void(float* values, int64_t n, const math::RiskCurve& curve);

namespace baseline {
StatisticsKernel leep_statistics;
TransferKernel transferability_map;
WeighMapKernel weigh_map;
}  // namespace baseline
namespace avx2 {
StatisticsKernel leep_statistics;
TransferKernel transferability_map;
WeighMapKernel weigh_map;
}  // namespace avx2
namespace avx512 {
StatisticsKernel leep_statistics;
TransferKernel transferability_map;
WeighMapKernel weigh_map;
}  // namespace avx512

}  // namespace riskmap::cpu
