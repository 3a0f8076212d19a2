// Plain descriptions of what the CUDA kernels take; shared by kernels and glue, knows neither torch nor CUDA.
#pragma once

#include <cstdlib>
#include <type_traits>

#include "ops/volume.h"

namespace riskmap::cuda {

// The work of an op is cut into tiles (what a block holds at once) and chunks (what a block sums before the sums meet
// in double). Both depend on shape, dtype and strides alone: results are bitwise the same from run to run.
struct Chunking {
  int64_t voxels_per_chunk;  // a whole number of tiles
  int64_t chunks_per_image;

  int64_t chunks(int64_t batch) const { return batch * chunks_per_image; }
};

// As many blocks as an H100 has room for at once, two on each of its 132 multiprocessors: more would not load sooner,
// and each has its own fixed cost.
inline int64_t usual_blocks() {
  constexpr int64_t kOfGpu = 264;
#if defined(RISKMAP_CUDA_ON_HOST)
  // So few that chunks of small volumes have several tiles. 0: as many as on a GPU.
  const char* text = std::getenv("RISKMAP_CUDA_ON_HOST_BLOCKS");
  const int64_t wanted = text ? std::atoll(text) : 3;
  if (wanted > 0) return wanted;
#endif
  return kOfGpu;
}

// `most_tiles` bounds the numbers that are added in float.
inline Chunking chunk_voxels(int64_t batch, int64_t voxels, int64_t tile, int64_t most_tiles,
                             int64_t blocks = usual_blocks()) {
  const int64_t tiles = (voxels + tile - 1) / tile;
  int64_t per_chunk = batch * tiles / blocks;
  if (per_chunk < 1) per_chunk = 1;
  if (per_chunk > most_tiles) per_chunk = most_tiles;
  return {per_chunk * tile, (tiles + per_chunk - 1) / per_chunk};
}

// What makes a label of raw bits, so that no kernel depends on the dtype of labels.
struct LabelCode {
  uint32_t ignore_low, ignore_high;  // raw bits of ignore_index, or what no element has; for floats its value
  uint32_t limit;                    // raw bits below are classes
  bool ignores_class;                // ignore_index is one of these
};

inline int size_of(Dtype dtype) {
  int size = 0;
  with_any(dtype, [&](auto element) { size = sizeof(element); });
  return size;
}

inline LabelCode label_code(Dtype dtype, int64_t num_labels, int64_t ignore_index) {
  bool is_signed = false;
  with_any(dtype, [&](auto element) { is_signed = std::is_signed_v<decltype(element)>; });
  const uint32_t limit = static_cast<uint32_t>(num_labels);
  const auto code = [&](uint64_t ignore, uint32_t below) {
    return LabelCode{static_cast<uint32_t>(ignore), static_cast<uint32_t>(ignore >> 32), below, ignore < below};
  };
  if (is_floating(dtype)) return code(0, 0);  // converted before, see labels.h
  const int bits = 8 * size_of(dtype);
  const int value_bits = is_signed ? bits - 1 : bits;
  // 2^value_bits, or more than any label and ignore_index.
  const uint64_t end = value_bits >= 63 ? uint64_t(1) << 63 : uint64_t(1) << value_bits;
  const bool in_dtype = ignore_index >= 0 ? static_cast<uint64_t>(ignore_index) < end
                                          : is_signed && static_cast<uint64_t>(-(ignore_index + 1)) < end;
  const uint64_t mask = bits == 64 ? ~uint64_t(0) : (uint64_t(1) << bits) - 1;
  // Where the dtype lacks it: beyond the dtype, or, of 64 bits without a sign, a number that is no label.
  const uint64_t ignore = in_dtype ? static_cast<uint64_t>(ignore_index) & mask : uint64_t(1) << 63 | 1;
  return code(ignore, end < limit ? static_cast<uint32_t>(end) : limit);
}

}  // namespace riskmap::cuda
