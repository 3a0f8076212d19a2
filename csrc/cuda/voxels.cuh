// The voxels of a thread, and what the maps (labels, masks, weights) hold there.
#pragma once

#include <cmath>

#include "cuda/dtypes.cuh"
#include "cuda/reduce.cuh"

namespace riskmap::cuda {

// V neighbouring voxels of an image; all of them are in it, or none is.
template <int V>
struct Neighbours {
  static constexpr int kVoxels = V;
  uint32_t first, end;  // end: of the image, or of the block's part of it

  __device__ __forceinline__ uint32_t at(int i) const { return first + static_cast<uint32_t>(i); }
  __device__ __forceinline__ bool has(int) const { return first < end; }
};

// The same, known to be in the image.
template <int V>
struct Inside {
  static constexpr int kVoxels = V;
  uint32_t first;

  __device__ __forceinline__ uint32_t at(int i) const { return first + static_cast<uint32_t>(i); }
  __device__ __forceinline__ bool has(int) const { return true; }
};

// V voxels that are `step` apart.
template <int V>
struct Spread {
  static constexpr int kVoxels = V;
  uint32_t first, end, step;

  __device__ __forceinline__ uint32_t at(int i) const { return first + static_cast<uint32_t>(i) * step; }
  __device__ __forceinline__ bool has(int i) const { return at(i) < end; }
};

// The voxels of a block.
struct Chunk {
  uint32_t image, index, begin, end;

  __device__ __forceinline__ Chunk(const Chunking& chunking, uint32_t voxels)
      : image(blockIdx.x / static_cast<uint32_t>(chunking.chunks_per_image)),
        index(blockIdx.x - image * static_cast<uint32_t>(chunking.chunks_per_image)),
        begin(index * static_cast<uint32_t>(chunking.voxels_per_chunk)),
        end(begin + static_cast<uint32_t>(chunking.voxels_per_chunk)) {
    end = end < voxels ? end : voxels;
  }
};

// [batch, voxels] as the kernels read it.
struct MapView {
  char* data;  // nullptr: absent
  int64_t stride_bytes;
  Dtype dtype;
  int size;
};

inline bool is_multiple(int64_t value, int64_t of) { return value % of == 0; }

inline MapView view_of(const VoxelMap& map) {
  const int size = size_of(map.dtype);
  return {static_cast<char*>(map.data), map.stride_batch * size, map.dtype, size};
}

// Whether V neighbours can be read at once wherever their first is a multiple of V.
template <int V>
bool has_packs(const VoxelMap& map, int64_t batch) {
  const int size = size_of(map.dtype), word = word_bytes(size * V);
  return is_multiple(static_cast<int64_t>(reinterpret_cast<uintptr_t>(map.data)), word) &&
         (batch == 1 || is_multiple(map.stride_batch * size, word));
}

// That of one image.
struct MapRow {
  char* data;  // nullptr: absent
  Dtype dtype;
  int size;

  __device__ __forceinline__ MapRow(const MapView& map, uint32_t image)
      : data(map.data ? map.data + image * map.stride_bytes : nullptr), dtype(map.dtype), size(map.size) {}
};

// 0 beyond the image.
template <class T, class Span>
__device__ __forceinline__ void load_elements(const MapRow& row, const Span& span, T (&out)[Span::kVoxels]) {
  constexpr int V = Span::kVoxels;
  Pack<T, V> pack{};
  if (span.has(0)) pack = Pack<T, V>::load(reinterpret_cast<const T*>(row.data) + span.first);
#pragma unroll
  for (int i = 0; i < V; ++i) out[i] = pack.values[i];
}

template <class T, int V>
__device__ __forceinline__ void load_elements(const MapRow& row, const Spread<V>& span, T (&out)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    out[i] = T{};
    if (span.has(i)) out[i] = Pack<T, 1>::load(reinterpret_cast<const T*>(row.data) + span.at(i)).values[0];
  }
}

template <class T, class Span>
__device__ __forceinline__ void store_elements(const MapRow& row, const Span& span,
                                               const Pack<T, Span::kVoxels>& pack) {
  if (span.has(0)) pack.store(reinterpret_cast<T*>(row.data) + span.first);
}

template <class T, int V>
__device__ __forceinline__ void store_elements(const MapRow& row, const Spread<V>& span, const Pack<T, V>& pack) {
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (span.has(i)) reinterpret_cast<T*>(row.data)[span.at(i)] = pack.values[i];
}

inline constexpr int kIgnored = -1;   // or beyond the image
inline constexpr int kBadLabel = -2;  // neither a class nor ignore_index

// The class of a voxel, or one of these.
__device__ __forceinline__ int decode_label(const LabelCode& code, uint32_t low, uint32_t high) {
  const bool ignored = low == code.ignore_low && high == code.ignore_high;
  const bool inside = low < code.limit && high == 0;
  return ignored ? kIgnored : inside ? static_cast<int>(low) : kBadLabel;
}

// T: the bits of an element. kClassesOnly: what is no class is kIgnored, bad or not.
template <class T, bool kClassesOnly, class Span>
__device__ __forceinline__ void load_labels_as(const MapRow& map, const LabelCode& code, const Span& span,
                                               int (&label)[Span::kVoxels]) {
  T bits[Span::kVoxels];
  load_elements(map, span, bits);
#pragma unroll
  for (int i = 0; i < Span::kVoxels; ++i) {
    uint32_t low, high = 0;
    if constexpr (sizeof(T) == 8) {
      low = bits[i].x;
      high = bits[i].y;
    } else {
      low = bits[i];
    }
    if constexpr (kClassesOnly) {
      label[i] = low < code.limit && high == 0 ? static_cast<int>(low) : kIgnored;
    } else {
      label[i] = decode_label(code, low, high);
    }
  }
}

// Of integers; labels that are floats are turned into such before, see labels.h.
template <bool kClassesOnly = false, class Span>
__device__ __forceinline__ void load_labels(const MapRow& map, const LabelCode& code, const Span& span,
                                            int (&label)[Span::kVoxels]) {
  if (map.size == 1) {
    load_labels_as<uint8_t, kClassesOnly>(map, code, span, label);
  } else if (map.size == 8) {
    load_labels_as<uint2, kClassesOnly>(map, code, span, label);
  } else if (map.size == 4) {
    load_labels_as<uint32_t, kClassesOnly>(map, code, span, label);
  } else {
    load_labels_as<uint16_t, kClassesOnly>(map, code, span, label);
  }
#pragma unroll
  for (int i = 0; i < Span::kVoxels; ++i) label[i] = span.has(i) ? label[i] : kIgnored;
  if (kClassesOnly && code.ignores_class) {
#pragma unroll
    for (int i = 0; i < Span::kVoxels; ++i)
      label[i] = label[i] == static_cast<int>(code.ignore_low) ? kIgnored : label[i];
  }
}

// 0 of 0, else 1.
__device__ __forceinline__ uint32_t nonzero_bit(uint32_t value) {
#if defined(__CUDACC_VER_MAJOR__) && __CUDACC_VER_MAJOR__ < 13
  return (value | (0u - value)) >> 31;  // CUDA 12: its ptxas crashes on a mask whose bits come from comparisons
#else
  return value != 0 ? 1u : 0u;
#endif
}

template <class T, class Span>
__device__ __forceinline__ uint32_t nonzero_bits(const MapRow& map, const Span& span) {
  T bits[Span::kVoxels];
  load_elements(map, span, bits);
  uint32_t set = 0;
#pragma unroll
  for (int i = 0; i < Span::kVoxels; ++i) {
    if constexpr (sizeof(T) == 8) {
      set |= nonzero_bit(bits[i].x | bits[i].y) << i;
    } else {
      set |= nonzero_bit(bits[i]) << i;
    }
  }
  return set;
}

// A bit for each voxel where the mask is not zero; none where it is absent.
template <class Span>
__device__ __forceinline__ uint32_t load_mask(const MapRow& map, const Span& span) {
  if (!map.data) return 0;
  switch (map.size) {
    case 1: return nonzero_bits<uint8_t>(map, span);
    case 2: return nonzero_bits<uint16_t>(map, span);
    case 4: return nonzero_bits<uint32_t>(map, span);
    default: return nonzero_bits<uint2>(map, span);
  }
}

template <class T, class acc_t, class Span>
__device__ __forceinline__ void load_values_as(const MapRow& map, const Span& span, acc_t (&values)[Span::kVoxels]) {
  T elements[Span::kVoxels];
  load_elements(map, span, elements);
#pragma unroll
  for (int i = 0; i < Span::kVoxels; ++i) values[i] = to_acc<acc_t>(elements[i]);
}

// Values of any floating dtype; 1 where the map is absent.
template <class acc_t, class Span>
__device__ __forceinline__ void load_values(const MapRow& map, const Span& span, acc_t (&values)[Span::kVoxels]) {
#pragma unroll
  for (int i = 0; i < Span::kVoxels; ++i) values[i] = acc_t(1);
  if (!map.data) return;
  if (map.size == 4) {  // by size first: the compiler would jump through a table otherwise
    load_values_as<float>(map, span, values);
  } else if (map.size == 8) {
    load_values_as<double>(map, span, values);
  } else if (map.dtype == Dtype::kHalf) {
    load_values_as<Half>(map, span, values);
  } else {
    load_values_as<BFloat16>(map, span, values);
  }
}

template <class T, class acc_t, class Span>
__device__ __forceinline__ void store_values_as(const MapRow& map, const Span& span,
                                                const acc_t (&values)[Span::kVoxels]) {
  Pack<T, Span::kVoxels> pack;
#pragma unroll
  for (int i = 0; i < Span::kVoxels; ++i) pack.values[i] = from_acc<T>(values[i]);
  store_elements(map, span, pack);
}

template <class acc_t, class Span>
__device__ __forceinline__ void store_values(const MapRow& map, const Span& span,
                                             const acc_t (&values)[Span::kVoxels]) {
  switch (map.dtype) {
    case Dtype::kDouble: store_values_as<double>(map, span, values); break;
    case Dtype::kHalf: store_values_as<Half>(map, span, values); break;
    case Dtype::kBFloat16: store_values_as<BFloat16>(map, span, values); break;
    default: store_values_as<float>(map, span, values); break;
  }
}

}  // namespace riskmap::cuda
