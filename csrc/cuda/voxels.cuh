// The voxels of a thread, and what the maps (labels, masks, weights) hold there.
#pragma once

#include <cmath>

#include "cuda/dtypes.cuh"
#include "cuda/reduce.cuh"

namespace riskmap::cuda {

// V voxels of one image: neighbours (step 1; then all of them are in the image or none), or `step` apart.
template <int V>
struct Span {
  int64_t first, end;  // end: of the image
  int step;

  __device__ __forceinline__ int64_t at(int i) const { return first + static_cast<int64_t>(i) * step; }
  __device__ __forceinline__ bool has(int i) const { return at(i) < end; }
};

// How the threads of a block share a tile: every voxel belongs to `parts` warps, each with a part of its classes.
struct BlockShape {
  int part, parts;
  int thread, threads;  // among the threads that share a part
  bool neighbours;

  __device__ __forceinline__ BlockShape(int parts_, bool neighbours_, int block_threads = kThreads)
      : part(warp_index() % parts_),
        parts(parts_),
        thread(warp_index() / parts_ * kWarp + lane_index()),
        threads(block_threads / parts_),
        neighbours(neighbours_) {}

  template <int V>
  __device__ __forceinline__ Span<V> span(int64_t tile, int64_t end) const {
    if (neighbours) return {tile + static_cast<int64_t>(thread) * V, end, 1};
    return {tile + thread, end, threads};
  }
};

// The voxels of a block.
struct Chunk {
  int64_t image, begin, end;

  __device__ __forceinline__ Chunk(const Chunking& chunking, int64_t voxels)
      : image(blockIdx.x / chunking.chunks_per_image),
        begin((blockIdx.x - image * chunking.chunks_per_image) * chunking.voxels_per_chunk),
        end(begin + chunking.voxels_per_chunk < voxels ? begin + chunking.voxels_per_chunk : voxels) {}
};

// [batch, voxels] as the kernels read it.
struct MapView {
  char* data;  // nullptr: absent
  int64_t stride_bytes;
  Dtype dtype;
  int size;
  bool aligned;  // whole packs of neighbours may be read

  bool present() const { return data != nullptr; }
};

inline bool is_multiple(int64_t value, int64_t of) { return value % of == 0; }

template <int V>
MapView view_of(const VoxelMap& map, int64_t batch) {
  const int size = size_of(map.dtype), word = word_bytes(size * V);
  const int64_t stride = map.stride_batch * size;
  const bool aligned = is_multiple(static_cast<int64_t>(reinterpret_cast<uintptr_t>(map.data)), word) &&
                       (batch == 1 || is_multiple(stride, word));
  return {static_cast<char*>(map.data), stride, map.dtype, size, aligned};
}

template <class T, int V>
__device__ __forceinline__ void load_elements(const MapView& map, int64_t image, const Span<V>& span, T (&out)[V]) {
  const T* row = reinterpret_cast<const T*>(map.data + image * map.stride_bytes);
  if (map.aligned && span.step == 1) {
    Pack<T, V> pack{};
    if (span.has(0)) pack = Pack<T, V>::load(row + span.first);
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = pack.values[i];
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      out[i] = T{};
      if (span.has(i)) out[i] = Pack<T, 1>::load(row + span.at(i)).values[0];
    }
  }
}

// Integers of any size by their bits.
template <int V>
struct RawBits {
  uint32_t low[V], high[V];
};

template <class T, int V>
__device__ __forceinline__ void load_narrow(const MapView& map, int64_t image, const Span<V>& span, RawBits<V>& out) {
  T elements[V];
  load_elements(map, image, span, elements);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    out.low[i] = elements[i];
    out.high[i] = 0;
  }
}

template <int V>
__device__ __forceinline__ void load_bits(const MapView& map, int64_t image, const Span<V>& span, RawBits<V>& out) {
  if (map.size == 8) {
    uint2 elements[V];
    load_elements(map, image, span, elements);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      out.low[i] = elements[i].x;
      out.high[i] = elements[i].y;
    }
  } else if (map.size == 1) {
    load_narrow<uint8_t>(map, image, span, out);
  } else if (map.size == 4) {
    load_narrow<uint32_t>(map, image, span, out);
  } else {
    load_narrow<uint16_t>(map, image, span, out);
  }
}

inline constexpr int kIgnored = -1;   // or beyond the image
inline constexpr int kBadLabel = -2;  // neither a class nor ignore_index

// The class of a voxel, or one of these.
__device__ __forceinline__ int decode_label(const LabelCode& code, uint32_t low, uint32_t high) {
  const bool ignored =
      code.has_ignore && low == static_cast<uint32_t>(code.ignore) && high == static_cast<uint32_t>(code.ignore >> 32);
  const bool inside = high == 0 && low < code.limit;
  return ignored ? kIgnored : inside ? static_cast<int>(low) : kBadLabel;
}

__device__ __forceinline__ int decode_floating_label(const LabelCode& code, Dtype dtype, uint32_t low, uint32_t high) {
  const uint16_t half = static_cast<uint16_t>(low);
  const double x = dtype == Dtype::kDouble  ? math::bit_cast<double>(static_cast<uint64_t>(high) << 32 | low)
                   : dtype == Dtype::kHalf  ? static_cast<double>(math::half_to_float(half))
                   : dtype == Dtype::kFloat ? static_cast<double>(math::bit_cast<float>(low))
                                            : static_cast<double>(math::bfloat16_to_float(half));
  if (!(x > -9e15 && x < 9e15)) return kBadLabel;  // NaN, and what a double cannot hold exactly
  const int64_t y = static_cast<int64_t>(x);
  if (static_cast<double>(y) != x) return kBadLabel;
  return decode_label(code, static_cast<uint32_t>(y), static_cast<uint32_t>(static_cast<uint64_t>(y) >> 32));
}

template <int V>
__device__ __forceinline__ void load_labels(const MapView& map, const LabelCode& code, int64_t image,
                                            const Span<V>& span, int (&label)[V]) {
  RawBits<V> bits;
  load_bits(map, image, span, bits);
  if (code.floating) {
#pragma unroll
    for (int i = 0; i < V; ++i) label[i] = decode_floating_label(code, map.dtype, bits.low[i], bits.high[i]);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) label[i] = decode_label(code, bits.low[i], bits.high[i]);
  }
#pragma unroll
  for (int i = 0; i < V; ++i) label[i] = span.has(i) ? label[i] : kIgnored;
}

// Whether the mask is non-zero; false everywhere where it is absent.
template <int V>
__device__ __forceinline__ void load_mask(const MapView& map, int64_t image, const Span<V>& span, bool (&inside)[V]) {
  RawBits<V> bits{};
  if (map.data) load_bits(map, image, span, bits);
#pragma unroll
  for (int i = 0; i < V; ++i) inside[i] = (bits.low[i] | bits.high[i]) != 0;
}

template <class T, class acc_t, int V>
__device__ __forceinline__ void load_values_as(const MapView& map, int64_t image, const Span<V>& span,
                                               acc_t (&values)[V]) {
  T elements[V];
  load_elements(map, image, span, elements);
#pragma unroll
  for (int i = 0; i < V; ++i) values[i] = to_acc<acc_t>(elements[i]);
}

// Values of any floating dtype; 1 where the map is absent.
template <class acc_t, int V>
__device__ __forceinline__ void load_values(const MapView& map, int64_t image, const Span<V>& span,
                                            acc_t (&values)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) values[i] = acc_t(1);
  if (!map.data) return;
  switch (map.dtype) {
    case Dtype::kDouble: load_values_as<double>(map, image, span, values); break;
    case Dtype::kHalf: load_values_as<Half>(map, image, span, values); break;
    case Dtype::kBFloat16: load_values_as<BFloat16>(map, image, span, values); break;
    default: load_values_as<float>(map, image, span, values); break;
  }
}

template <class T, class acc_t, int V>
__device__ __forceinline__ void store_values_as(const MapView& map, int64_t image, const Span<V>& span,
                                                const acc_t (&values)[V]) {
  T* row = reinterpret_cast<T*>(map.data + image * map.stride_bytes);
  if (map.aligned && span.step == 1) {
    Pack<T, V> pack;
#pragma unroll
    for (int i = 0; i < V; ++i) pack.values[i] = from_acc<T>(values[i]);
    if (span.has(0)) pack.store(row + span.first);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (span.has(i)) row[span.at(i)] = from_acc<T>(values[i]);
  }
}

template <class acc_t, int V>
__device__ __forceinline__ void store_values(const MapView& map, int64_t image, const Span<V>& span,
                                             const acc_t (&values)[V]) {
  switch (map.dtype) {
    case Dtype::kDouble: store_values_as<double>(map, image, span, values); break;
    case Dtype::kHalf: store_values_as<Half>(map, image, span, values); break;
    case Dtype::kBFloat16: store_values_as<BFloat16>(map, image, span, values); break;
    default: store_values_as<float>(map, image, span, values); break;
  }
}

template <class acc_t>
__device__ __forceinline__ acc_t not_a_number() {
  return static_cast<acc_t>(NAN);
}

}  // namespace riskmap::cuda
