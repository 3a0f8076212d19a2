// Plain descriptions of what the CUDA kernels take; shared by kernels and glue, knows neither torch nor CUDA.
#pragma once

#include "ops/volume.h"

namespace riskmap::cuda {

// The work of an op is cut into tiles (what the threads of a block hold at once) and chunks (what a block sums before
// the sums meet in double). Both depend on shape, dtype and strides alone: results are bitwise the same from run to
// run.
struct Chunking {
  int64_t voxels_per_chunk;  // a whole number of tiles
  int64_t chunks_per_image;

  int64_t chunks(int64_t batch) const { return batch * chunks_per_image; }
};

#if defined(RISKMAP_CUDA_ON_HOST)
inline constexpr int64_t kUsualChunks = 3;  // so that chunks of small volumes have several tiles
#else
inline constexpr int64_t kUsualChunks = 2048;  // enough to fill any GPU several times
#endif
inline constexpr int64_t kMaxTilesPerChunk = 16;

// `most_tiles` bounds the numbers that are added in float; `usual_chunks` the partial sums that have to be kept.
inline Chunking chunk_voxels(int64_t batch, int64_t voxels, int64_t tile, int64_t most_tiles = kMaxTilesPerChunk,
                             int64_t usual_chunks = kUsualChunks) {
  const int64_t tiles = (voxels + tile - 1) / tile;
  int64_t per_chunk = batch * tiles / usual_chunks;
  if (per_chunk < 1) per_chunk = 1;
  if (per_chunk > most_tiles) per_chunk = most_tiles;
  return {per_chunk * tile, (tiles + per_chunk - 1) / per_chunk};
}

// Which elements of a volume a thread moves at once.
enum class Layout : int {
  kVoxels,   // a class of neighbouring voxels
  kClasses,  // the classes of a voxel
  kScalar    // one element
};

// What makes a label of raw bits, so that no kernel depends on the dtype of labels.
struct LabelCode {
  uint64_t ignore;  // raw bits of ignore_index, where the dtype has it; for floats its value
  uint32_t limit;   // raw bits below are classes
  bool has_ignore;
  bool floating;
};

inline int size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kUInt8:
    case Dtype::kInt8:
    case Dtype::kBool: return 1;
    case Dtype::kHalf:
    case Dtype::kBFloat16:
    case Dtype::kInt16:
    case Dtype::kUInt16: return 2;
    case Dtype::kFloat:
    case Dtype::kInt32:
    case Dtype::kUInt32: return 4;
    default: return 8;
  }
}

inline LabelCode label_code(Dtype dtype, int64_t num_labels, int64_t ignore_index) {
  const bool floating =
      dtype == Dtype::kFloat || dtype == Dtype::kDouble || dtype == Dtype::kHalf || dtype == Dtype::kBFloat16;
  const bool is_signed =
      dtype == Dtype::kInt8 || dtype == Dtype::kInt16 || dtype == Dtype::kInt32 || dtype == Dtype::kInt64;
  const uint32_t limit = static_cast<uint32_t>(num_labels);
  if (floating) return {static_cast<uint64_t>(ignore_index), limit, true, true};
  const int bits = 8 * size_of(dtype);
  const int value_bits = is_signed ? bits - 1 : bits;
  // 2^value_bits, or more than any label and ignore_index.
  const uint64_t end = value_bits >= 63 ? uint64_t(1) << 63 : uint64_t(1) << value_bits;
  const bool below = ignore_index >= 0 ? static_cast<uint64_t>(ignore_index) < end
                                       : is_signed && static_cast<uint64_t>(-(ignore_index + 1)) < end;
  const uint64_t mask = bits == 64 ? ~uint64_t(0) : (uint64_t(1) << bits) - 1;
  return {static_cast<uint64_t>(ignore_index) & mask, end < limit ? static_cast<uint32_t>(end) : limit, below, false};
}

}  // namespace riskmap::cuda
