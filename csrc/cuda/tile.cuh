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

// Logits of which exp is 0, finite: where a thread has no class, and where all of its classes are -inf.
inline constexpr float kNoLogit = -3e38f;

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

// Up to kFewClasses: a warp has kWarpVoxels voxels to itself. kSlots classes, or at most so many where kExact is false.
template <class T, int kSlots, bool kExact>
struct FewTile {
  float x[kSlots][kTileVoxels];

  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kVoxels = kThreads * kTileVoxels;  // of a block

  // That load and store need, at the beginning of the block's dynamic shared memory.
  static int64_t shared_bytes(const TileVolume& volume) {
    return volume.channels_last ? int64_t(kVoxels) * volume.classes * static_cast<int64_t>(sizeof(T)) : 0;
  }

  __device__ __forceinline__ static uint32_t warp_first() { return static_cast<uint32_t>(warp_index()) * kWarpVoxels; }
  __device__ __forceinline__ static Neighbours<kTileVoxels> span(uint32_t tile, uint32_t end) {
    return {tile + threadIdx.x * kTileVoxels, end};
  }
  __device__ __forceinline__ static bool has(const TileVolume& volume, int c) { return kExact || c < volume.classes; }
  __device__ __forceinline__ static T* stage(const TileVolume& volume) {
    return reinterpret_cast<T*>(dynamic_shared()) + warp_first() * static_cast<uint32_t>(classes_of(volume));
  }
  __device__ __forceinline__ static int classes_of(const TileVolume& volume) {
    return kExact ? kSlots : volume.classes;
  }
  // Elements of the warp's voxels.
  __device__ __forceinline__ static uint32_t count(const TileVolume& volume, uint32_t tile, uint32_t end) {
    const uint32_t first = tile + warp_first();
    const uint32_t voxels = first >= end ? 0 : end - first < kWarpVoxels ? end - first : kWarpVoxels;
    return voxels * static_cast<uint32_t>(classes_of(volume));
  }

  // All lanes of a warp must come here.
  __device__ __forceinline__ void load(const TileVolume& volume, uint32_t image, uint32_t tile,
                                       const Neighbours<kTileVoxels>& span) {
    const T* from = image_of<const T>(volume, image);
    if (volume.channels_last) {
      T* const turned = stage(volume);
      const uint32_t classes = static_cast<uint32_t>(classes_of(volume));
      copy_together(turned, from + (tile + warp_first()) * classes, count(volume, tile, span.end),
                    static_cast<uint32_t>(lane_index()), kWarp);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kTileVoxels; ++i) {
        const T* voxel = turned + (lane_index() * kTileVoxels + i) * classes;
        if constexpr (kExact) {
          const auto pack = Pack<T, kSlots>::load_shared(voxel);
#pragma unroll
          for (int c = 0; c < kSlots; ++c) x[c][i] = to_acc<float>(pack.values[c]);
        } else {
#pragma unroll
          for (int c = 0; c < kSlots; ++c) x[c][i] = has(volume, c) ? to_acc<float>(voxel[c]) : kNoLogit;
        }
      }
      __syncwarp();
    } else {
      Pack<T, kTileVoxels> packs[kSlots];
      const T* at = from + span.first;
#pragma unroll
      for (int c = 0; c < kSlots; ++c) {
        packs[c] = {};
        if (has(volume, c) && span.has(0)) packs[c] = Pack<T, kTileVoxels>::load(at + c * volume.stride_class);
      }
#pragma unroll
      for (int c = 0; c < kSlots; ++c)
#pragma unroll
        for (int i = 0; i < kTileVoxels; ++i)
          x[c][i] = has(volume, c) ? to_acc<float>(packs[c].values[i]) : kNoLogit;
    }
  }

  __device__ __forceinline__ void store(const TileVolume& volume, uint32_t image, uint32_t tile,
                                        const Neighbours<kTileVoxels>& span) const {
    T* to = image_of<T>(volume, image);
    if (volume.channels_last) {
      T* const turned = stage(volume);
      const uint32_t classes = static_cast<uint32_t>(classes_of(volume));
#pragma unroll
      for (int i = 0; i < kTileVoxels; ++i) {
        T* voxel = turned + (lane_index() * kTileVoxels + i) * classes;
        if constexpr (kExact) {
          Pack<T, kSlots> pack;
#pragma unroll
          for (int c = 0; c < kSlots; ++c) pack.values[c] = from_acc<T>(x[c][i]);
          pack.store(voxel);
        } else {
#pragma unroll
          for (int c = 0; c < kSlots; ++c)
            if (has(volume, c)) voxel[c] = from_acc<T>(x[c][i]);
        }
      }
      __syncwarp();
      copy_together(to + (tile + warp_first()) * classes, turned, count(volume, tile, span.end),
                    static_cast<uint32_t>(lane_index()), kWarp);
    } else if (span.has(0)) {
      T* at = to + span.first;
#pragma unroll
      for (int c = 0; c < kSlots; ++c) {
        if (has(volume, c)) Pack<T, kTileVoxels>::of(x[c]).store(at + c * volume.stride_class);
      }
    }
  }
};

// How the warps of a block share the classes of kWarpVoxels voxels. The first warps look after a voxel a thread, too,
// whatever its class.
inline constexpr int kOwnerWarps = kWarpVoxels / kWarp;

struct ManyShape {
  int first, count;  // of the classes of this warp
  uint32_t thread, threads;

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

template <class T>
struct ManyTile {
  float x[kManySlots][kTileVoxels];

  // That load and store need.
  static int64_t stage_bytes(const TileVolume& volume) {
    return volume.channels_last ? int64_t(kWarp) * volume.classes * static_cast<int64_t>(sizeof(T)) : 0;
  }

  __device__ __forceinline__ static Neighbours<kTileVoxels> span(uint32_t tile, uint32_t end) {
    return {tile + static_cast<uint32_t>(lane_index()) * kTileVoxels, end};
  }
  __device__ __forceinline__ static uint32_t round_count(const TileVolume& volume, uint32_t first, uint32_t end) {
    const uint32_t voxels = first >= end ? 0 : end - first < kWarp ? end - first : kWarp;
    return voxels * static_cast<uint32_t>(volume.classes);
  }

  // All threads of the block must come here; `stage` is free before and after.
  __device__ __forceinline__ void load(const TileVolume& volume, const ManyShape& shape, uint32_t image, uint32_t tile,
                                       const Neighbours<kTileVoxels>& span, char* stage) {
    const T* from = image_of<const T>(volume, image);
    const uint32_t classes = static_cast<uint32_t>(volume.classes);
    if (volume.channels_last) {
      T* const turned = reinterpret_cast<T*>(stage);
#pragma unroll
      for (int i = 0; i < kTileVoxels; ++i) {
        const uint32_t first = tile + i * kWarp;
        copy_together(turned, from + first * classes, round_count(volume, first, span.end), shape.thread,
                      shape.threads);
        __syncthreads();
        const T* voxel = turned + lane_index() * classes + shape.first;
#pragma unroll
        for (int k = 0; k < kManySlots; ++k) x[k][i] = k < shape.count ? to_acc<float>(voxel[k]) : kNoLogit;
        __syncthreads();
      }
    } else {
      Pack<T, kTileVoxels> packs[kManySlots];
      const T* at = from + span.first + shape.first * volume.stride_class;
      const bool inside = span.has(0);
#pragma unroll
      for (int k = 0; k < kManySlots; ++k) {
        packs[k] = {};
        if (k < shape.count && inside) packs[k] = Pack<T, kTileVoxels>::load(at);
        at += volume.stride_class;
      }
#pragma unroll
      for (int k = 0; k < kManySlots; ++k)
#pragma unroll
        for (int i = 0; i < kTileVoxels; ++i) x[k][i] = k < shape.count ? to_acc<float>(packs[k].values[i]) : kNoLogit;
    }
  }

  // The label's class gets at_label instead. All threads of the block must come here, as for load.
  __device__ __forceinline__ void store(const TileVolume& volume, const ManyShape& shape, uint32_t image, uint32_t tile,
                                        const Neighbours<kTileVoxels>& span, char* stage, const int (&label)[kTileVoxels],
                                        const float (&at_label)[kTileVoxels]) const {
    T* to = image_of<T>(volume, image);
    const uint32_t classes = static_cast<uint32_t>(volume.classes);
    if (volume.channels_last) {
      T* const turned = reinterpret_cast<T*>(stage);
#pragma unroll
      for (int i = 0; i < kTileVoxels; ++i) {
        T* voxel = turned + lane_index() * classes + shape.first;
#pragma unroll
        for (int k = 0; k < kManySlots; ++k)
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
      for (int k = 0; k < kManySlots; ++k) {
        if (k >= shape.count) break;
        Pack<T, kTileVoxels>::of(x[k]).store(at);
        at += volume.stride_class;
      }
#pragma unroll
      for (int i = 0; i < kTileVoxels; ++i)
        if (shape.has(label[i]))
          first[static_cast<uint32_t>(label[i] - shape.first) * volume.stride_class + i] = from_acc<T>(at_label[i]);
    }
  }
};

}  // namespace riskmap::cuda
