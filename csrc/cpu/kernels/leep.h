// What the LEEP kernels of every instruction set take and give.
#pragma once

#include "cpu/types.h"
#include "math/risk_map.h"

namespace riskmap::cpu {

struct StatisticsArgs {
  Volume source;    // [B, Z, S]
  VoxelMap target;  // [B, S]
  int64_t num_classes;
  int64_t ignore_index;
  Chunking chunking;
  double* joint;        // [chunks, C, Z]
  int64_t* bad_labels;  // [chunks]
};

struct TransferPartial {
  int64_t bad_labels, foreground;
  double low, high;  // smallest and largest hardness of the chunk's valid voxels
};

// Elements from one row of the table to the next: a whole vector at least, see lookup.
inline constexpr int64_t table_pitch(int64_t num_classes) { return num_classes < kMinTile ? kMinTile : num_classes; }

inline constexpr float kIgnoredMark = 1.0f;  // no transferability is above 0

struct TransferArgs {
  Volume source;      // [B, Z, S]
  VoxelMap target;    // [B, S]
  const void* table;  // acc_t[Z, table_pitch(C)], P(y|z) with one row for each source class
  int64_t num_classes;
  int64_t ignore_index;
  int64_t background;  // -1: every valid voxel is foreground
  Chunking chunking;
  float* out;                    // [B, S]
  const math::RiskCurve* curve;  // nullptr: T is written, and kIgnoredMark where the voxel is ignored
  TransferPartial* partial;      // [chunks]
};

// Up to this many (y, z) pairs, a masked vector sum for each pair is quicker than adding rows.
inline constexpr int64_t kMaxMaskedSums = 64;

// Elements of scratch for the sums of either way.
inline constexpr int64_t statistics_sums(int64_t source_classes, int64_t num_classes) {
  const int64_t by_row = num_classes * ((source_classes + kMinTile - 1) / kMinTile * kMinTile);
  const int64_t masked = kMaxMaskedSums * kMinTile;
  return by_row > masked ? by_row : masked;
}

size_t statistics_scratch_bytes(int64_t source_classes, int64_t num_classes, size_t acc_size);
size_t transfer_scratch_bytes(int64_t source_classes, size_t acc_size);

using StatisticsKernel = void(const StatisticsArgs&, int64_t chunk, void* scratch);
using TransferKernel = void(const TransferArgs&, int64_t chunk, void* scratch);
// T in place to weights of a curve, or marks to 0 where curve is nullptr.
using FinishKernel = void(float* values, int64_t n, const math::RiskCurve* curve);

namespace baseline {
StatisticsKernel leep_statistics;
TransferKernel transferability_map;
FinishKernel finish_map;
}  // namespace baseline
namespace avx2 {
StatisticsKernel leep_statistics;
TransferKernel transferability_map;
FinishKernel finish_map;
}  // namespace avx2
namespace avx512 {
StatisticsKernel leep_statistics;
TransferKernel transferability_map;
FinishKernel finish_map;
}  // namespace avx512

}  // namespace riskmap::cpu
