// The logits of the source model, and their softmax, as the LEEP kernels read them.
#pragma once

#include "cuda/any_column.cuh"
#include "cuda/leep.h"
#include "cuda/many_exchange.cuh"
#include "cuda/tile.cuh"

namespace riskmap::cuda {

// SourceInputs as the kernels read them.
struct SourceViews {
  const uint8_t* regions;  // [R, Z] or nullptr
  int classes;             // Z
  int num_classes;
  MapView target;
  LabelCode label;
  uint32_t voxels;
  Chunking chunking;
};

inline SourceViews view_of(const SourceInputs& in, const Chunking& chunking) {
  return {in.regions,
          static_cast<int>(in.classes),
          static_cast<int>(in.num_classes),
          view_of(in.target),
          in.label,
          static_cast<uint32_t>(in.source.voxels),
          chunking};
}

// AnyColumn for a source of classes or of regions.
template <class T_>
struct SourceColumn {
  using T = T_;
  using acc_t = typename AccOf<T>::type;

  AnyColumn<T> channels;
  const uint8_t* regions;
  int count;

  __device__ __forceinline__ SourceColumn(const SourceViews& in, const AnyVolume& source, uint32_t image,
                                          uint32_t voxel)
      : channels(source, image, voxel), regions(in.regions), count(in.classes) {}
  template <class Body>
  __device__ __forceinline__ void each(const Body& body) const {
    for (int z = 0; z < count; ++z) body(z);
  }
  __device__ __forceinline__ acc_t get(int z) const {
    if (!regions) return channels.get(z);
    acc_t sum = 0;
    channels.each([&](int r) {
      if (__ldg(regions + static_cast<int64_t>(r) * count + z)) sum += channels.get(r);
    });
    return sum;
  }
};

// A tile of a few classes, or of the few classes that regions make up: their logits are sums of the regions'.
template <class Tile>
__device__ __forceinline__ void load_source(Tile& tile, const SourceViews& in, const TileVolume& source, uint32_t image,
                                            uint32_t first, uint32_t end, const typename Tile::Span& span) {
  if constexpr (!Tile::kExact) {
    if (in.regions) return tile.load_sums(source, image, in.regions, in.classes, span);
  }
  tile.load(source, image, first, end, span);
}

// The largest logit of voxel i, and the sum of the exponentials, which take the logits' place.
template <class Tile>
__device__ __forceinline__ float exponentials_of(Tile& tile, int i) {
  constexpr int kSlots = static_cast<int>(sizeof(tile.x) / sizeof(tile.x[0]));
  float max = tile.x[0][i], sum = 0;
#pragma unroll
  for (int z = 1; z < kSlots; ++z) max = fmaxf(max, tile.x[z][i]);
#pragma unroll
  for (int z = 0; z < kSlots; ++z) {
    tile.x[z][i] = math::exp(tile.x[z][i] - max);
    sum += tile.x[z][i];
  }
  return sum;
}

template <class T_, SourceWay kWay_, int kSlots_ = 1, bool kExact_ = true>
struct SourceKernel {
  using T = T_;
  static constexpr SourceWay kWay = kWay_;
  static constexpr int kSlots = kSlots_;
  static constexpr bool kExact = kExact_;
};

inline SourceWay way_of(const SourceInputs& in, bool few) {
  const bool packs = fits_tiles(in.source) && has_packs<kTileVoxels>(in.target, in.source.batch);
  if (!packs || in.source.dtype == Dtype::kDouble) return SourceWay::kAny;
  if (in.regions && (in.source.stride_voxel != 1 || in.classes > kFewClasses || !few)) return SourceWay::kAny;
  return in.classes <= kFewClasses && few ? SourceWay::kFew : SourceWay::kMany;
}

// Calls f with the kernel for the way. kExact: planar, and of few classes as many as there are.
template <class F>
void with_source_kernel(const SourceInputs& in, SourceWay way, const F& f) {
  with_floating(in.source.dtype, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (sizeof(T) < sizeof(double)) {
      const bool planar = in.source.stride_voxel == 1;
      if (way == SourceWay::kMany) {
        const bool small = ManyShape::slots_of(in.classes) == 4;
        if (!planar) return f(SourceKernel<T, SourceWay::kMany, kManySlots, false>{});
        if (small) return f(SourceKernel<T, SourceWay::kMany, 4, true>{});
        return f(SourceKernel<T, SourceWay::kMany, kManySlots, true>{});
      }
      if (way == SourceWay::kFew) {
        if (in.regions || !planar) return f(SourceKernel<T, SourceWay::kFew, 8, false>{});
        switch (in.classes) {
          case 2: return f(SourceKernel<T, SourceWay::kFew, 2>{});
          case 3: return f(SourceKernel<T, SourceWay::kFew, 3>{});
          case 4: return f(SourceKernel<T, SourceWay::kFew, 4>{});
          case 5: return f(SourceKernel<T, SourceWay::kFew, 5>{});
          case 6: return f(SourceKernel<T, SourceWay::kFew, 6>{});
          case 7: return f(SourceKernel<T, SourceWay::kFew, 7>{});
          default: return f(SourceKernel<T, SourceWay::kFew, 8>{});
        }
      }
    }
    f(SourceKernel<T, SourceWay::kAny>{});
  });
}

// The voxels of a thread's part of a tile that warps share, see ManyTile.
struct TileVoxels {
  uint32_t first, step;

  __device__ __forceinline__ explicit TileVoxels(const TileVolume& volume)
      : first(static_cast<uint32_t>(lane_index()) * (volume.channels_last ? 1 : kTileVoxels)),
        step(volume.channels_last ? kWarp : 1) {}
  __device__ __forceinline__ uint32_t at(int i) const { return first + static_cast<uint32_t>(i) * step; }
};

}  // namespace riskmap::cuda
