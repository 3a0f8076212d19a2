// How the CPU kernels cut their work, which never see torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ops/volume.h"

namespace riskmap::cpu {

// Voxels are cut into tiles (what a kernel holds in scratch) and chunks (what one thread sums before the sums meet in
// double). Neither depends on the number of threads: results are bitwise the same for any.
struct Chunking {
  int64_t voxels_per_chunk;
  int64_t chunks_per_image;
};

inline constexpr int kMaxTile = 512;
inline constexpr int kMinTile = 16;  // a whole number of vectors of any instruction set

// Volumes of doubles are computed in double, all others in float.
inline size_t acc_size(Dtype dtype) { return dtype == Dtype::kDouble ? sizeof(double) : sizeof(float); }

// Voxels in a tile, a multiple of kMinTile, so that `rows` rows of them stay within about 32 KB (a first-level cache),
// but no fewer than take 256 bytes in memory: shorter pieces of a row would cost more than they save.
inline int64_t tile_voxels(int64_t rows, Dtype dtype) {
  const int64_t fewest = dtype == Dtype::kHalf || dtype == Dtype::kBFloat16 ? 128 : 64;
  const int64_t fit = static_cast<int64_t>((32 << 10) / acc_size(dtype)) / (rows < 1 ? 1 : rows);
  const int64_t tile = fit < fewest ? fewest : fit > kMaxTile ? kMaxTile : fit;
  return tile / kMinTile * kMinTile;
}

// Elements from one row of a tile to the next; the pad keeps rows from meeting in the same cache sets.
inline int64_t tile_pitch(int64_t tile) { return tile + kMinTile; }

// Elements from one row of a table over labels to the next: a whole vector at least, see lookup.
inline int64_t table_pitch(int64_t num_labels) { return num_labels < kMinTile ? kMinTile : num_labels; }

}  // namespace riskmap::cpu
