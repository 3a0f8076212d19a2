// The logits of the source model at a thread's voxels.
#pragma once

#include "cuda/leep.h"
#include "cuda/variant.cuh"

namespace riskmap::cuda {

// SourceInputs as the kernels read them.
struct SourceViews {
  VolumeView source;
  const uint8_t* regions;
  int channels;  // Z, or R with regions
  int classes;   // Z
  int num_classes;
  MapView target;
  LabelCode label;
  int64_t voxels;
  int parts, classes_per_part;
  Chunking chunking;
};

template <int V>
SourceViews view_of(const SourceInputs& in, const Chunking& chunking, int parts) {
  const int classes = static_cast<int>(in.classes);
  return {view_of<V>(in.source),
          in.regions,
          static_cast<int>(in.source.classes),
          classes,
          static_cast<int>(in.num_classes),
          view_of<V>(in.target, in.source.batch),
          in.label,
          in.source.voxels,
          parts,
          (classes + parts - 1) / parts,
          chunking};
}

// MemoryColumn for a source of classes or of regions.
template <class T_>
struct SourceColumn : MemoryColumn<T_> {
  using typename MemoryColumn<T_>::acc_t;
  const uint8_t* regions;  // [R, Z] or nullptr
  int channels;

  __device__ __forceinline__ acc_t get(int z) const {
    if (!regions) return MemoryColumn<T_>::get(z);
    acc_t sum = 0;
    for (int r = 0; r < channels; ++r)
      if (__ldg(regions + static_cast<int64_t>(r) * this->count + z)) sum += MemoryColumn<T_>::get(r);
    return sum;
  }
  __device__ __forceinline__ acc_t exps(acc_t max) const { return math::sum_exp(*this, max); }
  __device__ __forceinline__ acc_t exp_at(int z, acc_t max) const { return math::exp(get(z) - max); }
};

// Columns must be assigned already.
template <class Column, int V>
__device__ __forceinline__ void load_source(const SourceViews& in, int64_t image, const Span<V>& span, Column (&x)[V]) {
  using T = typename Column::T;
  using acc_t = typename Column::acc_t;
  if constexpr (!Column::kInRegisters) {
    load_columns(in.source, image, span, x);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      x[i].regions = in.regions;
      x[i].channels = in.channels;
    }
  } else if (!in.regions) {
    load_columns(in.source, image, span, x);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i)
#pragma unroll
      for (int c = 0; c < Column::kSlots; ++c) x[i].set(c, acc_t(0));
    for (int r = 0; r < in.channels; ++r) {
      const Pack<T, V> logit = load_class<T, V>(in.source, image, r, span);
      const uint8_t* row = in.regions + static_cast<int64_t>(r) * in.classes;
      x[0].each([&](int c) {
        if (!__ldg(row + x[0].class_of(c))) return;
#pragma unroll
        for (int i = 0; i < V; ++i) x[i].set(c, x[i].get(c) + to_acc<acc_t>(logit.values[i]));
      });
    }
  }
}

}  // namespace riskmap::cuda
