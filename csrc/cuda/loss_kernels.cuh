// Which kernel serves which call of the weighted loss.
#pragma once

#include "cuda/any_column.cuh"
#include "cuda/loss.cuh"
#include "cuda/many_exchange.cuh"

namespace riskmap::cuda {

enum class LossWay : int { kFew, kMany, kAny };

// kPlanar: no other layout, and of few classes as many as there are.
template <class T_, LossWay kWay_, LossKind kKind_, int kSlots_, bool kPlanar_>
struct LossKernel {
  using T = T_;
  static constexpr LossWay kWay = kWay_;
  static constexpr LossKind kKind = kKind_;
  static constexpr int kSlots = kSlots_;
  static constexpr bool kPlanar = kPlanar_;
};

// Calls f with the kernel of a volume that tiles can be read from.
template <class T, LossKind kKind, class F>
void with_tile_kernel(const Volume& logits, const F& f) {
  const bool few = logits.classes <= kFewClasses;
  if (kKind == LossKind::kAny || logits.stride_voxel != 1) {
    if (!few) return f(LossKernel<T, LossWay::kMany, kKind, kManySlots, false>{});
    if (logits.classes <= 4) return f(LossKernel<T, LossWay::kFew, kKind, 4, false>{});
    return f(LossKernel<T, LossWay::kFew, kKind, 8, false>{});
  }
  if constexpr (kKind != LossKind::kAny) {
    if (!few) {
      const int slots = ManyShape::slots_of(logits.classes);
      if (slots == 4) return f(LossKernel<T, LossWay::kMany, kKind, 4, true>{});
      if (slots == 8) return f(LossKernel<T, LossWay::kMany, kKind, 8, true>{});
      return f(LossKernel<T, LossWay::kMany, kKind, kManySlots, true>{});
    }
    switch (logits.classes) {
      case 2: return f(LossKernel<T, LossWay::kFew, kKind, 2, true>{});
      case 3: return f(LossKernel<T, LossWay::kFew, kKind, 3, true>{});
      case 4: return f(LossKernel<T, LossWay::kFew, kKind, 4, true>{});
      case 5: return f(LossKernel<T, LossWay::kFew, kKind, 5, true>{});
      case 6: return f(LossKernel<T, LossWay::kFew, kKind, 6, true>{});
      case 7: return f(LossKernel<T, LossWay::kFew, kKind, 7, true>{});
      default: return f(LossKernel<T, LossWay::kFew, kKind, 8, true>{});
    }
  }
}

// `fits`: whether the tensors do, see fits_tiles; `usual`: whether a kernel of the usual calls may serve.
template <class F>
void with_loss_kernel(const LossInputs& in, bool fits, bool usual, const F& f) {
  with_floating(in.logits.dtype, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (sizeof(T) < sizeof(double)) {
      if (fits) {
        if (!usual) return with_tile_kernel<T, LossKind::kAny>(in.logits, f);
        if (in.class_sums) return with_tile_kernel<T, LossKind::kDice>(in.logits, f);
        return with_tile_kernel<T, LossKind::kCrossEntropy>(in.logits, f);
      }
    }
    f(LossKernel<T, LossWay::kAny, LossKind::kAny, 1, false>{});
  });
}

// Label smoothing where the warps share the classes: each posts its part of sum_k smooth(k) (x_k - max) relative to its
// own largest logit, and keeps its part of smooth_total.
struct SharedSmoothing {
  float* of_warp;

  template <class Weights>
  __device__ __forceinline__ SharedSmoothing(const ManyShape& shape, const Weights& weights) {
    __shared__ float memory[kManyWarps];
    of_warp = memory;
    float sum = 0;
    for (int k = 0; k < shape.count; ++k) sum += weights.smooth(shape.first + k);
    if (lane_index() == 0) of_warp[warp_index()] = sum;
  }
  template <class Tile, class Weights, class Exchange>
  __device__ __forceinline__ void post(const Tile& tile, const ManyShape& shape, const float (&max)[kTileVoxels],
                                       const Weights& weights, Exchange& exchange) const {
    float dot[kTileVoxels] = {};
#pragma unroll
    for (int k = 0; k < Tile::kSlots; ++k) {
      const float smooth = k < shape.count ? weights.smooth(shape.first + k) : 0.0f;
#pragma unroll
      for (int i = 0; i < kTileVoxels; ++i) dot[i] += smooth == 0 ? 0.0f : smooth * (tile.x[k][i] - max[i]);
    }
    exchange.post(2, dot);
  }
  template <class Exchange>
  __device__ __forceinline__ float dot(const Exchange& exchange, uint32_t voxel, float max) const {
    float sum = 0;
    for (int w = 0; w < exchange.warps(); ++w)
      sum += exchange.posted(2, w, voxel) + of_warp[w] * (exchange.posted(0, w, voxel) - max);
    return sum;
  }
};

// Of a usual call: none.
struct NoSharedSmoothing {
  template <class Weights>
  __device__ __forceinline__ NoSharedSmoothing(const ManyShape&, const Weights&) {}
  template <class Tile, class Weights, class Exchange>
  __device__ __forceinline__ void post(const Tile&, const ManyShape&, const float (&)[kTileVoxels], const Weights&,
                                       Exchange&) const {}
  template <class Exchange>
  __device__ __forceinline__ float dot(const Exchange&, uint32_t, float) const {
    return 0;
  }
};

template <LossKind kKind>
using SharedSmoothingOf = std::conditional_t<kKind == LossKind::kAny, SharedSmoothing, NoSharedSmoothing>;

}  // namespace riskmap::cuda
