// The logits of a tile in the registers of a block: every thread has kTileVoxels voxels of some classes. With up to
// kFewClasses these are all classes; beyond, up to kManyClasses, the warps of a block share the classes of
// kWarpVoxels voxels.
//
// Volumes are moved in whole rows. Planar: a class of neighbouring voxels, straight into registers. Channels-last: what
// lies together is turned in shared memory; a warp that shares its voxels then holds them kWarp apart.
#pragma once

#include <type_traits>

#include "cuda/voxels.cuh"

namespace riskmap::cuda {

inline constexpr int kTileVoxels = 4;
inline constexpr int kWarpVoxels = kWarp * kTileVoxels;
inline constexpr int kFewClasses = 8;
inline constexpr int kManySlots = 16;  // classes of a thread
inline constexpr int kManyWarps = 16;  // at most, of a block
inline constexpr int kManyClasses = kManySlots * kManyWarps;

// [batch, classes, voxels] that tiles are read from or written to.
struct TileVolume {
  char* data;
  int64_t stride_batch;
  uint32_t stride_class;  // planar
  int classes;
  bool channels_last;
};

inline TileVolume tile_view_of(const Volume& volume) {
  return {static_cast<char*>(volume.data), volume.stride_batch, static_cast<uint32_t>(volume.stride_class),
          static_cast<int>(volume.classes), volume.stride_voxel != 1};
}

// Whether they can be: planar in whole packs, or channels-last without gaps. Offsets within an image have 32 bits.
inline bool fits_tiles(const Volume& volume) {
  const int64_t size = size_of(volume.dtype), pack = size * kTileVoxels, limit = int64_t(1) << 31;
  const int64_t address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(volume.data));
  if (volume.dtype == Dtype::kDouble || volume.classes < 2 || volume.classes > kManyClasses) return false;
  if (volume.voxels >= limit / volume.classes || volume.stride_class >= limit / volume.classes) return false;
  if (!is_multiple(volume.voxels, kTileVoxels)) return false;
  if (volume.stride_voxel == 1)
    return is_multiple(address, pack) && is_multiple(volume.stride_class, kTileVoxels) &&
           (volume.batch == 1 || is_multiple(volume.stride_batch, kTileVoxels));
  return volume.stride_class == 1 && volume.stride_voxel == volume.classes && is_multiple(address, 16) &&
         (volume.batch == 1 || is_multiple(volume.stride_batch * size, 16));
}

template <class T>
__device__ __forceinline__ T* image_of(const TileVolume& volume, uint32_t image) {
  return reinterpret_cast<T*>(volume.data) + image * volume.stride_batch;
}

// The least that counts as the largest logit of some classes: finite, so that -inf less it is -inf.
inline constexpr float kNoLogit = -3.402823466e38f;

// Elements that lie together, from or to an address that is a multiple of 16 bytes, by `threads` threads.
template <class T>
__device__ __forceinline__ void copy_together(T* to, const T* from, uint32_t count, uint32_t thread, uint32_t threads) {
  constexpr uint32_t kPiece = 16 / sizeof(T);
  uint32_t at = thread * kPiece;
#pragma unroll 4
  for (; at + kPiece <= count; at += threads * kPiece)
    *reinterpret_cast<uint4*>(to + at) = *reinterpret_cast<const uint4*>(from + at);
  for (at = count / kPiece * kPiece + thread; at < count; at += threads) to[at] = from[at];
}

// Up to kFewClasses: a warp has kWarpVoxels voxels to itself. kExact: kSlots classes, planar; else at most so many,
// of any layout, and -inf in the slots beyond.
template <class T, int kSlots, bool kExact_>
struct FewTile {
  float x[kSlots][kTileVoxels];

  static constexpr bool kExact = kExact_;
  static constexpr int kVoxels = kThreads * kTileVoxels;  // of a block of kThreads
  using Span = std::conditional_t<kExact, Inside<kTileVoxels>, Neighbours<kTileVoxels>>;

  // That load and store need, at the beginning of the block's dynamic shared memory.
  static int64_t shared_bytes(const TileVolume& volume) {
    return volume.channels_last ? int64_t(kVoxels) * volume.classes * static_cast<int64_t>(sizeof(T)) : 0;
  }

  __device__ __forceinline__ static Span span(uint32_t tile, uint32_t end) {
    const uint32_t first = tile + threadIdx.x * kTileVoxels;
    if constexpr (kExact) {
      return {first};
    } else {
      return {first, end};
    }
  }
  // Whether a thread may leave the loop over tiles: where its warp need not meet.
  __device__ __forceinline__ static bool is_done(const Span& span, uint32_t end) { return kExact && span.first >= end; }

  // All lanes of a warp must come here.
  __device__ __forceinline__ void load(const TileVolume& volume, uint32_t image, uint32_t tile, uint32_t end,
                                       const Span& span) {
    const T* from = image_of<const T>(volume, image);
    if (!kExact && volume.channels_last) {
      T* const turned = stage(volume);
      const uint32_t classes = static_cast<uint32_t>(volume.classes);
      copy_together(turned, from + (tile + warp_first()) * classes, count(volume, tile, end),
                    static_cast<uint32_t>(lane_index()), kWarp);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kTileVoxels; ++i) {
        const T* voxel = turned + (lane_index() * kTileVoxels + i) * classes;
#pragma unroll
        for (int c = 0; c < kSlots; ++c) x[c][i] = has(volume, c) ? to_acc<float>(voxel[c]) : -INFINITY;
      }
      __syncwarp();
    } else {
      Pack<T, kTileVoxels> packs[kSlots];
      const T* at = from + span.first;
#pragma unroll
      for (int c = 0; c < kSlots; ++c) {
        if (!kExact) packs[c] = Pack<T, kTileVoxels>::all(has(volume, c) ? 0.0f : -INFINITY);
        if (has(volume, c) && span.has(0)) packs[c] = Pack<T, kTileVoxels>::load(at + c * volume.stride_class);
      }
#pragma unroll
      for (int c = 0; c < kSlots; ++c) packs[c].to(x[c]);
    }
  }

  // Planar; class z gets the sum of the channels r with table[r, z].
  __device__ __forceinline__ void load_sums(const TileVolume& volume, uint32_t image, const uint8_t* table, int classes,
                                            const Span& span) {
#pragma unroll
    for (int z = 0; z < kSlots; ++z)
#pragma unroll
      for (int i = 0; i < kTileVoxels; ++i) x[z][i] = z < classes ? 0.0f : -INFINITY;
    const T* at = image_of<const T>(volume, image) + span.first;
    for (int r = 0; r < volume.classes && span.has(0); ++r, at += volume.stride_class) {
      const auto pack = Pack<T, kTileVoxels>::load(at);
#pragma unroll
      for (int z = 0; z < kSlots; ++z) {
        if (z >= classes) break;
        if (!__ldg(table + r * classes + z)) continue;
#pragma unroll
        for (int i = 0; i < kTileVoxels; ++i) x[z][i] += to_acc<float>(pack.values[i]);
      }
    }
  }

  __device__ __forceinline__ void store(const TileVolume& volume, uint32_t image, uint32_t tile, uint32_t end,
                                        const Span& span) const {
    T* to = image_of<T>(volume, image);
    if (!kExact && volume.channels_last) {
      T* const turned = stage(volume);
      const uint32_t classes = static_cast<uint32_t>(volume.classes);
#pragma unroll
      for (int i = 0; i < kTileVoxels; ++i) {
        T* voxel = turned + (lane_index() * kTileVoxels + i) * classes;
#pragma unroll
        for (int c = 0; c < kSlots; ++c)
          if (has(volume, c)) voxel[c] = from_acc<T>(x[c][i]);
      }
      __syncwarp();
      copy_together(to + (tile + warp_first()) * classes, turned, count(volume, tile, end),
                    static_cast<uint32_t>(lane_index()), kWarp);
    } else if (span.has(0)) {
      T* at = to + span.first;
#pragma unroll
      for (int c = 0; c < kSlots; ++c)
        if (has(volume, c)) Pack<T, kTileVoxels>::of(x[c]).store(at + c * volume.stride_class);
    }
  }

 private:
  __device__ __forceinline__ static bool has(const TileVolume& volume, int c) { return kExact || c < volume.classes; }
  __device__ __forceinline__ static uint32_t warp_first() { return static_cast<uint32_t>(warp_index()) * kWarpVoxels; }
  __device__ __forceinline__ static T* stage(const TileVolume& volume) {
    return reinterpret_cast<T*>(dynamic_shared()) + warp_first() * static_cast<uint32_t>(volume.classes);
  }
  // Elements of the warp's voxels.
  __device__ __forceinline__ static uint32_t count(const TileVolume& volume, uint32_t tile, uint32_t end) {
    const uint32_t first = tile + warp_first();
    const uint32_t voxels = first >= end ? 0 : end - first < kWarpVoxels ? end - first : kWarpVoxels;
    return voxels * static_cast<uint32_t>(volume.classes);
  }
};

// How the warps of a block share the classes of kWarpVoxels voxels. The first warps look after a voxel a thread, too,
// whatever its class.
inline constexpr int kOwnerWarps = kWarpVoxels / kWarp;

struct ManyShape {
  int first, count;  // of the classes of this warp
  uint32_t thread, threads;

  // Slots of a thread that are enough.
  static int slots_of(int64_t classes) {
    const int64_t warps = warps_of(classes), each = (classes + warps - 1) / warps;
    return each <= 4 ? 4 : each <= 8 ? 8 : kManySlots;
  }
  static int warps_of(int64_t classes) {
    const int warps = static_cast<int>((classes + kManySlots - 1) / kManySlots);
    return warps < kOwnerWarps ? kOwnerWarps : warps;
  }

  __device__ __forceinline__ explicit ManyShape(int classes) : thread(threadIdx.x), threads(blockDim.x) {
    const int warps = static_cast<int>(threads) / kWarp, each = (classes + warps - 1) / warps;
    first = warp_index() * each;
    count = classes - first < each ? classes - first : each;
  }
  __device__ __forceinline__ bool has(int label) const { return label >= first && label < first + count; }
  __device__ __forceinline__ bool is_owner() const { return warp_index() < kOwnerWarps; }
  __device__ __forceinline__ Spread<1> own(uint32_t tile, uint32_t end) const { return {tile + thread, end, 0}; }
};

// kPlanar: no other layout. Slots beyond the warp's classes hold -inf.
template <class T, int kSlots_, bool kPlanar>
struct ManyTile {
  static constexpr int kSlots = kSlots_;
  static constexpr int kGroup = 4;  // slots that are looked at together: all of them have a class, or some lack one

  float x[kSlots][kTileVoxels];

  // That load and store need.
  static int64_t stage_bytes(const TileVolume& volume) {
    return volume.channels_last ? int64_t(kWarp) * volume.classes * static_cast<int64_t>(sizeof(T)) : 0;
  }

  __device__ __forceinline__ static Neighbours<kTileVoxels> span(uint32_t tile, uint32_t end) {
    return {tile + static_cast<uint32_t>(lane_index()) * kTileVoxels, end};
  }

  // All threads of the block must come here; `stage` is free before and after.
  __device__ __forceinline__ void load(const TileVolume& volume, const ManyShape& shape, uint32_t image, uint32_t tile,
                                       const Neighbours<kTileVoxels>& span, char* stage) {
    const T* from = image_of<const T>(volume, image);
    if (!kPlanar && volume.channels_last) {
      const uint32_t classes = static_cast<uint32_t>(volume.classes);
      T* const turned = reinterpret_cast<T*>(stage);
#pragma unroll
      for (int i = 0; i < kTileVoxels; ++i) {
        const uint32_t first = tile + i * kWarp;
        copy_together(turned, from + first * classes, round_count(volume, first, span.end), shape.thread,
                      shape.threads);
        __syncthreads();
        const T* voxel = turned + lane_index() * classes + shape.first;
#pragma unroll
        for (int k = 0; k < kSlots; ++k) x[k][i] = k < shape.count ? to_acc<float>(voxel[k]) : -INFINITY;
        __syncthreads();
      }
      return;
    }
    // Beyond the image some other voxels: nobody looks at them.
    const T* at = from + (span.has(0) ? span.first : tile) + shape.first * volume.stride_class;
    Pack<T, kTileVoxels> packs[kSlots];
#pragma unroll
    for (int g = 0; g < kSlots; g += kGroup) {
      if (g + kGroup <= shape.count) {
#pragma unroll
        for (int k = g; k < g + kGroup; ++k) packs[k] = Pack<T, kTileVoxels>::load(at + (k - g) * volume.stride_class);
      } else {
#pragma unroll
        for (int k = g; k < g + kGroup; ++k) {
          packs[k] = Pack<T, kTileVoxels>::all(-INFINITY);
          if (k < shape.count) packs[k] = Pack<T, kTileVoxels>::load(at + (k - g) * volume.stride_class);
        }
      }
      at += kGroup * volume.stride_class;
    }
#pragma unroll
    for (int k = 0; k < kSlots; ++k) packs[k].to(x[k]);
  }

  // The label's class gets at_label instead. All threads of the block must come here, as for load.
  __device__ __forceinline__ void store(const TileVolume& volume, const ManyShape& shape, uint32_t image, uint32_t tile,
                                        const Neighbours<kTileVoxels>& span, char* stage,
                                        const int (&label)[kTileVoxels], const float (&at_label)[kTileVoxels]) const {
    T* to = image_of<T>(volume, image);
    if (!kPlanar && volume.channels_last) {
      const uint32_t classes = static_cast<uint32_t>(volume.classes);
      T* const turned = reinterpret_cast<T*>(stage);
#pragma unroll
      for (int i = 0; i < kTileVoxels; ++i) {
        T* voxel = turned + lane_index() * classes + shape.first;
#pragma unroll
        for (int k = 0; k < kSlots; ++k)
          if (k < shape.count) voxel[k] = from_acc<T>(x[k][i]);
        if (shape.has(label[i])) voxel[label[i] - shape.first] = from_acc<T>(at_label[i]);
        __syncthreads();
        const uint32_t first = tile + i * kWarp;
        copy_together(to + first * classes, turned, round_count(volume, first, span.end), shape.thread, shape.threads);
        __syncthreads();
      }
    } else if (span.has(0)) {
      T* const first = to + span.first + shape.first * volume.stride_class;
      T* at = first;
#pragma unroll
      for (int g = 0; g < kSlots; g += kGroup) {
        if (g + kGroup <= shape.count) {
#pragma unroll
          for (int k = g; k < g + kGroup; ++k) Pack<T, kTileVoxels>::of(x[k]).store(at + (k - g) * volume.stride_class);
        } else {
#pragma unroll
          for (int k = g; k < g + kGroup; ++k)
            if (k < shape.count) Pack<T, kTileVoxels>::of(x[k]).store(at + (k - g) * volume.stride_class);
        }
        at += kGroup * volume.stride_class;
      }
#pragma unroll
      for (int i = 0; i < kTileVoxels; ++i)
        if (shape.has(label[i]))
          first[static_cast<uint32_t>(label[i] - shape.first) * volume.stride_class + i] = from_acc<T>(at_label[i]);
    }
  }

 private:
  __device__ __forceinline__ static uint32_t round_count(const TileVolume& volume, uint32_t first, uint32_t end) {
    const uint32_t voxels = first >= end ? 0 : end - first < kWarp ? end - first : kWarp;
    return voxels * static_cast<uint32_t>(volume.classes);
  }
};

}  // namespace riskmap::cuda
