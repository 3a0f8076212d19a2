// Which kernel serves which call of the weighted loss.
#pragma once

#include "cuda/any_column.cuh"
#include "cuda/loss.cuh"
#include "cuda/many_exchange.cuh"

namespace riskmap::cuda {

enum class LossWay : int { kFew, kMany, kAny };

template <class T_, LossWay kWay_, LossKind kKind_, int kSlots_>
struct LossKernel {
  using T = T_;
  static constexpr LossWay kWay = kWay_;
  static constexpr LossKind kKind = kKind_;
  static constexpr int kSlots = kSlots_;
};

// Calls f with the kernel of so many classes; of few only as many classes as there are, but for kAny.
template <class T, LossKind kKind, class F>
void with_tile_kernel(int64_t classes, const F& f) {
  if (classes > kFewClasses) {
    const int slots = ManyShape::slots_of(classes);
    if (kKind == LossKind::kAny || slots == kManySlots) return f(LossKernel<T, LossWay::kMany, kKind, kManySlots>{});
    if constexpr (kKind != LossKind::kAny) {
      if (slots == 4) return f(LossKernel<T, LossWay::kMany, kKind, 4>{});
      return f(LossKernel<T, LossWay::kMany, kKind, 8>{});
    }
  }
  if constexpr (kKind == LossKind::kAny) {
    if (classes <= 4) return f(LossKernel<T, LossWay::kFew, kKind, 4>{});
    return f(LossKernel<T, LossWay::kFew, kKind, 8>{});
  } else {
    switch (classes) {
      case 2: return f(LossKernel<T, LossWay::kFew, kKind, 2>{});
      case 3: return f(LossKernel<T, LossWay::kFew, kKind, 3>{});
      case 4: return f(LossKernel<T, LossWay::kFew, kKind, 4>{});
      case 5: return f(LossKernel<T, LossWay::kFew, kKind, 5>{});
      case 6: return f(LossKernel<T, LossWay::kFew, kKind, 6>{});
      case 7: return f(LossKernel<T, LossWay::kFew, kKind, 7>{});
      default: return f(LossKernel<T, LossWay::kFew, kKind, 8>{});
    }
  }
}

// `usual`: whether a kernel of the usual calls may serve.
template <class F>
void with_loss_kernel(const LossInputs& in, bool usual, const F& f) {
  with_floating(in.logits.dtype, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (sizeof(T) < sizeof(double)) {
      if (fits_tiles(in)) {
        if (!usual || in.logits.stride_voxel != 1) return with_tile_kernel<T, LossKind::kAny>(in.logits.classes, f);
        if (in.class_sums) return with_tile_kernel<T, LossKind::kDice>(in.logits.classes, f);
        return with_tile_kernel<T, LossKind::kCrossEntropy>(in.logits.classes, f);
      }
    }
    f(LossKernel<T, LossWay::kAny, LossKind::kAny, 1>{});
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
  __device__ __forceinline__ void post(const Tile& tile, const ManyShape& shape,
                                       const float (&max)[kTileVoxels], const Weights& weights,
                                       Exchange& exchange) const {
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

// Voxels that a block of the kernels holds at once, and blocks that a GPU has room for.
inline Chunking loss_chunks(const LossInputs& in) {
  const int64_t batch = in.logits.batch, classes = in.logits.classes, voxels = in.logits.voxels;
  if (!fits_tiles(in)) return chunk_voxels(batch, voxels, kThreads, 64);
  if (classes <= kFewClasses) return chunk_voxels(batch, voxels, kThreads * kTileVoxels, 64);
  return chunk_voxels(batch, voxels, kWarpVoxels, 256, usual_blocks() * (classes <= 64 ? 2 : 1));
}

}  // namespace riskmap::cuda
