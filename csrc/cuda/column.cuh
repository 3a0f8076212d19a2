// The logits of one voxel, as the formulas of csrc/math take them: in the registers of one thread, in those of several
// warps that share the voxel, or in memory.
#pragma once

#include <type_traits>

#include "cuda/voxels.cuh"
#include "math/softmax.h"

namespace riskmap::cuda {

// [batch, classes, voxels] as the kernels read or write it.
struct VolumeView {
  char* data;
  int64_t stride_batch, stride_class, stride_voxel;  // in elements
  Layout layout;
};

// Whether V neighbouring voxels of a class can be moved at once.
template <int V>
bool has_aligned_rows(const Volume& volume) {
  const int64_t size = size_of(volume.dtype);
  return volume.stride_voxel == 1 && is_multiple(volume.voxels, V) &&
         (volume.classes == 1 || is_multiple(volume.stride_class, V)) &&
         (volume.batch == 1 || is_multiple(volume.stride_batch, V)) &&
         is_multiple(static_cast<int64_t>(reinterpret_cast<uintptr_t>(volume.data)),
                     word_bytes(static_cast<int>(V * size)));
}

// The same for all classes of a voxel.
inline bool has_aligned_voxels(const Volume& volume) {
  const int64_t size = size_of(volume.dtype);
  const int word = word_bytes(static_cast<int>((volume.classes * size) % 16));
  return volume.stride_class == 1 && is_multiple(volume.stride_voxel * size, word) &&
         (volume.batch == 1 || is_multiple(volume.stride_batch * size, word)) &&
         is_multiple(static_cast<int64_t>(reinterpret_cast<uintptr_t>(volume.data)), word);
}

template <int V>
VolumeView view_of(const Volume& volume) {
  const Layout layout = V > 1 && has_aligned_rows<V>(volume) ? Layout::kVoxels
                        : has_aligned_voxels(volume)         ? Layout::kClasses
                                                             : Layout::kScalar;
  return {static_cast<char*>(volume.data), volume.stride_batch, volume.stride_class, volume.stride_voxel, layout};
}

// Exactly kClasses classes, all in the registers of one thread.
template <class T_, int kClasses>
struct RegisterColumn {
  using T = T_;
  using acc_t = typename AccOf<T>::type;
  static constexpr bool kInRegisters = true, kShared = false;
  static constexpr int kSlots = kClasses;

  acc_t x[kClasses];

  __device__ __forceinline__ void assign(int, int) {}
  __device__ __forceinline__ bool holds(int) const { return true; }
  template <class Body>
  __device__ __forceinline__ void each(const Body& body) const {
#pragma unroll
    for (int c = 0; c < kClasses; ++c) body(c);
  }
  __device__ __forceinline__ acc_t get(int c) const { return x[c]; }
  __device__ __forceinline__ void set(int c, acc_t v) { x[c] = v; }
  __device__ __forceinline__ int class_of(int c) const { return c; }
  // Leaves exp(x - max), for exp_at, and returns the sum.
  __device__ __forceinline__ acc_t exps(acc_t max) { return math::exp_in_place(*this, max); }
  __device__ __forceinline__ acc_t exp_at(int c, acc_t) const { return x[c]; }
  // The logit of a class less `max`; 0 where it is none of these.
  __device__ __forceinline__ acc_t pick(int label, acc_t max) const {
    acc_t v = max;
    each([&](int c) { v = label == c ? x[c] : v; });
    return v - max;
  }
};

// The classes of a voxel shared by several warps; [first, first + count) are here.
inline constexpr int kSharedSlots = 16;
inline constexpr int kMaxSharedClasses = kSharedSlots * kWarps;

// The number of warps, a power of two.
inline int parts_of(int64_t classes, int slots = kSharedSlots) {
  int parts = 1;
  while (parts * slots < classes) parts *= 2;
  return parts;
}

template <class T_, int kSlots_ = kSharedSlots>
struct SharedColumn {
  using T = T_;
  using acc_t = typename AccOf<T>::type;
  static constexpr bool kInRegisters = true, kShared = true;
  static constexpr int kSlots = kSlots_;

  acc_t x[kSlots];
  int first, count;

  __device__ __forceinline__ void assign(int first_, int count_) {
    first = first_;
    count = count_;
  }
  __device__ __forceinline__ bool holds(int c) const { return c < count; }
  template <class Body>
  __device__ __forceinline__ void each(const Body& body) const {
#pragma unroll
    for (int c = 0; c < kSlots; ++c)
      if (c < count) body(c);
  }
  __device__ __forceinline__ acc_t get(int c) const { return x[c]; }
  __device__ __forceinline__ void set(int c, acc_t v) { x[c] = v; }
  __device__ __forceinline__ int class_of(int c) const { return first + c; }
  __device__ __forceinline__ acc_t exps(acc_t max) { return math::exp_in_place(*this, max); }
  __device__ __forceinline__ acc_t exp_at(int c, acc_t) const { return x[c]; }
  __device__ __forceinline__ acc_t pick(int label, acc_t max) const {
    acc_t v = max;
    each([&](int c) { v = label == first + c ? x[c] : v; });
    return v - max;
  }
};

// Any number of classes, read from memory (mostly the caches) each time.
template <class T_>
struct MemoryColumn {
  using T = T_;
  using acc_t = typename AccOf<T>::type;
  static constexpr bool kInRegisters = false, kShared = false;
  static constexpr int kSlots = 1;

  const T* base;
  int64_t stride;
  int count;

  __device__ __forceinline__ void assign(int, int count_) { count = count_; }
  template <class Body>
  __device__ __forceinline__ void each(const Body& body) const {
    for (int c = 0; c < count; ++c) body(c);
  }
  __device__ __forceinline__ acc_t get(int c) const {
    return to_acc<acc_t>(Pack<T, 1>::load(base + c * stride).values[0]);
  }
  __device__ __forceinline__ int class_of(int c) const { return c; }
  __device__ __forceinline__ acc_t exps(acc_t max) const { return math::sum_exp(*this, max); }
  __device__ __forceinline__ acc_t exp_at(int c, acc_t max) const { return math::exp(get(c) - max); }
  __device__ __forceinline__ acc_t pick(int label, acc_t max) const {
    return label >= 0 && label < count ? get(label) - max : acc_t(0);
  }
};

// Tells the columns of a thread's voxels which classes are theirs.
template <class Column, int V>
__device__ __forceinline__ void assign_classes(int part, int per_part, int classes, Column (&x)[V]) {
  const int first = part * per_part, left = classes - first;
#pragma unroll
  for (int i = 0; i < V; ++i) x[i].assign(first, left < per_part ? left : per_part);
}

// One class of a thread's voxels, 0 beyond the image.
template <class T, int V>
__device__ __forceinline__ Pack<T, V> load_class(const VolumeView& volume, int64_t image, int c, const Span<V>& span) {
  const T* base = reinterpret_cast<const T*>(volume.data) + image * volume.stride_batch + c * volume.stride_class;
  Pack<T, V> pack{};
  if (volume.layout == Layout::kVoxels && V > 1) {
    if (span.has(0)) pack = Pack<T, V>::load(base + span.first);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (span.has(i)) pack.values[i] = Pack<T, 1>::load(base + span.at(i) * volume.stride_voxel).values[0];
  }
  return pack;
}

template <class T, int V>
__device__ __forceinline__ void store_class(const VolumeView& volume, int64_t image, int c, const Span<V>& span,
                                            const Pack<T, V>& pack) {
  T* base = reinterpret_cast<T*>(volume.data) + image * volume.stride_batch + c * volume.stride_class;
  if (volume.layout == Layout::kVoxels && V > 1 && span.step == 1) {
    if (span.has(0)) pack.store(base + span.first);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (span.has(i)) base[span.at(i) * volume.stride_voxel] = pack.values[i];
  }
}

template <class T, class acc_t>
__device__ __forceinline__ void store_element(const VolumeView& volume, int64_t image, int c, int64_t voxel, acc_t v) {
  T* first = reinterpret_cast<T*>(volume.data) + image * volume.stride_batch + c * volume.stride_class;
  first[voxel * volume.stride_voxel] = from_acc<T>(v);
}

// The columns of a thread's voxels. Beyond the image they hold 0.
template <class Column, int V>
__device__ __forceinline__ void load_columns(const VolumeView& volume, int64_t image, const Span<V>& span,
                                             Column (&x)[V]) {
  using T = typename Column::T;
  using acc_t = typename Column::acc_t;
  const T* base = reinterpret_cast<const T*>(volume.data) + image * volume.stride_batch;
  if constexpr (!Column::kInRegisters) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      x[i].base = base + (span.has(i) ? span.at(i) : span.end - 1) * volume.stride_voxel;
      x[i].stride = volume.stride_class;
    }
    return;
  } else {
    if (volume.layout == Layout::kClasses && !Column::kShared) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        Pack<T, Column::kSlots> pack{};
        if (span.has(i)) pack = Pack<T, Column::kSlots>::load(base + span.at(i) * volume.stride_voxel);
        x[i].each([&](int c) { x[i].set(c, to_acc<acc_t>(pack.values[c])); });
      }
    } else {
      // All loads are under way before the first is waited for: none is converted among them.
      Pack<T, V> packs[Column::kSlots];
      if (volume.layout == Layout::kVoxels && V > 1) {
        const T* first = base + x[0].class_of(0) * volume.stride_class + span.first;
#pragma unroll
        for (int c = 0; c < Column::kSlots; ++c) {
          packs[c] = Pack<T, V>{};
          if (x[0].holds(c) && span.has(0)) packs[c] = Pack<T, V>::load(first + c * volume.stride_class);
        }
      } else {
#pragma unroll
        for (int c = 0; c < Column::kSlots; ++c) {
          packs[c] = Pack<T, V>{};
          if (x[0].holds(c)) packs[c] = load_class<T, V>(volume, image, x[0].class_of(c), span);
        }
      }
#pragma unroll
      for (int c = 0; c < Column::kSlots; ++c)
#pragma unroll
        for (int i = 0; i < V; ++i) x[i].set(c, to_acc<acc_t>(packs[c].values[i]));
    }
  }
}

// The way back for a gradient that lies in columns.
template <class Column, int V>
__device__ __forceinline__ void store_columns(const VolumeView& volume, int64_t image, const Span<V>& span,
                                              const Column (&x)[V]) {
  using T = typename Column::T;
  if (volume.layout == Layout::kClasses && !Column::kShared) {
    T* base = reinterpret_cast<T*>(volume.data) + image * volume.stride_batch;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      Pack<T, Column::kSlots> pack;
      x[i].each([&](int c) { pack.values[c] = from_acc<T>(x[i].get(c)); });
      if (span.has(i)) pack.store(base + span.at(i) * volume.stride_voxel);
    }
  } else {
    x[0].each([&](int c) {
      Pack<T, V> pack;
#pragma unroll
      for (int i = 0; i < V; ++i) pack.values[i] = from_acc<T>(x[i].get(c));
      store_class<T, V>(volume, image, x[0].class_of(c), span, pack);
    });
  }
}

// What the warps that share a voxel tell each other, in shared memory: a post of every thread, a meeting of the block,
// and then the maximum or the sum of what was posted about voxel i. For columns that are shared.
template <class acc_t, int V, int kSlots>
struct Exchange {
  acc_t (*values)[kWarps][V][kWarp];
  int first, parts;

  __device__ __forceinline__ explicit Exchange(const BlockShape& shape)
      : first(warp_index() - shape.part), parts(shape.parts) {
    __shared__ acc_t memory[kSlots][kWarps][V][kWarp];
    values = memory;
  }
  __device__ __forceinline__ void post(int slot, int i, acc_t value) {
    values[slot][warp_index()][i][lane_index()] = value;
  }
  __device__ __forceinline__ void meet() {
    if (parts > 1) __syncthreads();
  }
  __device__ __forceinline__ acc_t sum(int slot, int i) const {
    acc_t sum = 0;
    for (int w = 0; w < parts; ++w) sum += values[slot][first + w][i][lane_index()];
    return sum;
  }
  __device__ __forceinline__ acc_t max(int slot, int i) const {
    acc_t max = values[slot][first][i][lane_index()];
    for (int w = 1; w < parts; ++w) max = math::maximum(values[slot][first + w][i][lane_index()], max);
    return max;
  }
};

struct NoExchange {
  __device__ __forceinline__ explicit NoExchange(const BlockShape&) {}
};

template <class Column, int V, int kSlots>
using ExchangeFor = std::conditional_t<Column::kShared, Exchange<typename Column::acc_t, V, kSlots>, NoExchange>;

}  // namespace riskmap::cuda
