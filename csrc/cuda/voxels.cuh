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

template <class T>
__device__ __forceinline__ T* row_of(const MapView& map, uint32_t image) {
  return reinterpret_cast<T*>(map.data + image * map.stride_bytes);
}

// 0 beyond the image.
template <class T, int V>
__device__ __forceinline__ void load_elements(const MapView& map, uint32_t image, const Neighbours<V>& span,
                                              T (&out)[V]) {
  Pack<T, V> pack{};
  if (span.has(0)) pack = Pack<T, V>::load(row_of<const T>(map, image) + span.first);
#pragma unroll
  for (int i = 0; i < V; ++i) out[i] = pack.values[i];
}

template <class T, int V>
__device__ __forceinline__ void load_elements(const MapView& map, uint32_t image, const Spread<V>& span, T (&out)[V]) {
  const T* row = row_of<const T>(map, image);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    out[i] = T{};
    if (span.has(i)) out[i] = Pack<T, 1>::load(row + span.at(i)).values[0];
  }
}

template <class T, int V>
__device__ __forceinline__ void store_elements(const MapView& map, uint32_t image, const Neighbours<V>& span,
                                               const Pack<T, V>& pack) {
  if (span.has(0)) pack.store(row_of<T>(map, image) + span.first);
}

template <class T, int V>
__device__ __forceinline__ void store_elements(const MapView& map, uint32_t image, const Spread<V>& span,
                                               const Pack<T, V>& pack) {
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (span.has(i)) row_of<T>(map, image)[span.at(i)] = pack.values[i];
}

inline constexpr int kIgnored = -1;   // or beyond the image
inline constexpr int kBadLabel = -2;  // neither a class nor ignore_index

// The class of a voxel, or one of these.
__device__ __forceinline__ int decode_label(const LabelCode& code, uint32_t low, uint32_t high) {
  const bool ignored = low == code.ignore_low && high == code.ignore_high;
  const bool inside = low < code.limit && high == 0;
  return ignored ? kIgnored : inside ? static_cast<int>(low) : kBadLabel;
}

// T: the bits of an element.
template <class T, class Span>
__device__ __forceinline__ void load_labels_as(const MapView& map, const LabelCode& code, uint32_t image,
                                               const Span& span, int (&label)[Span::kVoxels]) {
  T bits[Span::kVoxels];
  load_elements(map, image, span, bits);
#pragma unroll
  for (int i = 0; i < Span::kVoxels; ++i) {
    if constexpr (sizeof(T) == 8) {
      label[i] = decode_label(code, bits[i].x, bits[i].y);
    } else {
      label[i] = decode_label(code, bits[i], 0);
    }
  }
}

// Of integers; labels of floats are turned into such before, see ops/views.h.
template <class Span>
__device__ __forceinline__ void load_labels(const MapView& map, const LabelCode& code, uint32_t image, const Span& span,
                                            int (&label)[Span::kVoxels]) {
  if (map.size == 1) {
    load_labels_as<uint8_t>(map, code, image, span, label);
  } else if (map.size == 8) {
    load_labels_as<uint2>(map, code, image, span, label);
  } else if (map.size == 4) {
    load_labels_as<uint32_t>(map, code, image, span, label);
  } else {
    load_labels_as<uint16_t>(map, code, image, span, label);
  }
#pragma unroll
  for (int i = 0; i < Span::kVoxels; ++i) label[i] = span.has(i) ? label[i] : kIgnored;
}

template <class T, class Span>
__device__ __forceinline__ uint32_t nonzero_bits(const MapView& map, uint32_t image, const Span& span) {
  T bits[Span::kVoxels];
  load_elements(map, image, span, bits);
  uint32_t set = 0;
#pragma unroll
  for (int i = 0; i < Span::kVoxels; ++i) {
    if constexpr (sizeof(T) == 8) {
      set |= ((bits[i].x | bits[i].y) != 0 ? 1u : 0u) << i;
    } else {
      set |= (bits[i] != 0 ? 1u : 0u) << i;
    }
  }
  return set;
}

// A bit for each voxel where the mask is not zero; none where it is absent.
template <class Span>
__device__ __forceinline__ uint32_t load_mask(const MapView& map, uint32_t image, const Span& span) {
  if (!map.data) return 0;
  switch (map.size) {
    case 1: return nonzero_bits<uint8_t>(map, image, span);
    case 2: return nonzero_bits<uint16_t>(map, image, span);
    case 4: return nonzero_bits<uint32_t>(map, image, span);
    default: return nonzero_bits<uint2>(map, image, span);
  }
}

template <class T, class acc_t, class Span>
__device__ __forceinline__ void load_values_as(const MapView& map, uint32_t image, const Span& span,
                                               acc_t (&values)[Span::kVoxels]) {
  T elements[Span::kVoxels];
  load_elements(map, image, span, elements);
#pragma unroll
  for (int i = 0; i < Span::kVoxels; ++i) values[i] = to_acc<acc_t>(elements[i]);
}

// Values of any floating dtype; 1 where the map is absent.
template <class acc_t, class Span>
__device__ __forceinline__ void load_values(const MapView& map, uint32_t image, const Span& span,
                                            acc_t (&values)[Span::kVoxels]) {
#pragma unroll
  for (int i = 0; i < Span::kVoxels; ++i) values[i] = acc_t(1);
  if (!map.data) return;
  switch (map.dtype) {
    case Dtype::kDouble: load_values_as<double>(map, image, span, values); break;
    case Dtype::kHalf: load_values_as<Half>(map, image, span, values); break;
    case Dtype::kBFloat16: load_values_as<BFloat16>(map, image, span, values); break;
    default: load_values_as<float>(map, image, span, values); break;
  }
}

template <class T, class acc_t, class Span>
__device__ __forceinline__ void store_values_as(const MapView& map, uint32_t image, const Span& span,
                                                const acc_t (&values)[Span::kVoxels]) {
  Pack<T, Span::kVoxels> pack;
#pragma unroll
  for (int i = 0; i < Span::kVoxels; ++i) pack.values[i] = from_acc<T>(values[i]);
  store_elements(map, image, span, pack);
}

template <class acc_t, class Span>
__device__ __forceinline__ void store_values(const MapView& map, uint32_t image, const Span& span,
                                             const acc_t (&values)[Span::kVoxels]) {
  switch (map.dtype) {
    case Dtype::kDouble: store_values_as<double>(map, image, span, values); break;
    case Dtype::kHalf: store_values_as<Half>(map, image, span, values); break;
    case Dtype::kBFloat16: store_values_as<BFloat16>(map, image, span, values); break;
    default: store_values_as<float>(map, image, span, values); break;
  }
}

}  // namespace riskmap::cuda
