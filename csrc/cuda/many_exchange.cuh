// What the warps that share the classes of kWarpVoxels voxels tell each other: every warp posts numbers of its own
// classes, the block meets, every thread makes the results of the voxels it looks after, and the block meets again.
#pragma once

#include "cuda/loss.cuh"

namespace riskmap::cuda {

template <int kPosts, int kResults, bool kPlanar>
class ManyExchange {
 public:
  // The memory behind the results is free while nothing is posted.
  __device__ __forceinline__ explicit ManyExchange(bool channels_last)
      : results_(reinterpret_cast<float*>(dynamic_shared())),
        posts_(results_ + kResults * kWarpVoxels),
        warps_(static_cast<int>(blockDim.x) / kWarp),
        channels_last_(channels_last) {}

  static int64_t shared_bytes(const TileVolume& volume, int64_t stage) {
    const int64_t row = kWarpVoxels * static_cast<int64_t>(sizeof(float));
    const int64_t posts = ManyShape::warps_of(volume.classes) * kPosts * row;
    return kResults * row + (stage > posts ? stage : posts);
  }

  __device__ __forceinline__ char* stage() const { return reinterpret_cast<char*>(posts_); }

  __device__ __forceinline__ void post(int number, const float (&values)[kTileVoxels]) {
    float* row = posts_ + (number * warps_ + warp_index()) * kWarpVoxels;
    if (!kPlanar && channels_last_) {
#pragma unroll
      for (int i = 0; i < kTileVoxels; ++i) row[lane_index() + i * kWarp] = values[i];
    } else {
      Pack<float, kTileVoxels>::of(values).store(row + lane_index() * kTileVoxels);
    }
  }
  __device__ __forceinline__ float posted(int number, int warp, uint32_t voxel) const {
    return posts_[(number * warps_ + warp) * kWarpVoxels + static_cast<int>(voxel)];
  }
  __device__ __forceinline__ int warps() const { return warps_; }

  // Of a voxel of the tile.
  __device__ __forceinline__ float& result(int number, uint32_t voxel) const {
    return results_[number * kWarpVoxels + static_cast<int>(voxel)];
  }
  // Of a thread's voxels.
  __device__ __forceinline__ void results(int number, float (&values)[kTileVoxels]) const {
    const float* row = results_ + number * kWarpVoxels;
    if (!kPlanar && channels_last_) {
#pragma unroll
      for (int i = 0; i < kTileVoxels; ++i) values[i] = row[lane_index() + i * kWarp];
    } else {
      const auto pack = Pack<float, kTileVoxels>::load_shared(row + lane_index() * kTileVoxels);
#pragma unroll
      for (int i = 0; i < kTileVoxels; ++i) values[i] = pack.values[i];
    }
  }

  // Of a voxel, from the largest logits that the warps posted.
  __device__ __forceinline__ float largest(uint32_t voxel) const {
    float max = kNoLogit;
    for (int w = 0; w < warps_; ++w) max = fmaxf(max, posted(0, w, voxel));
    return max;
  }
  // Of a voxel, from what the warps posted: 0 the largest of their logits, 1 the sum of the exponentials relative to
  // it.
  template <class Smoothing>
  __device__ __forceinline__ Softmax<float> softmax(uint32_t voxel, float target, const Smoothing& smoothing) const {
    Softmax<float> softmax{largest(voxel), 0, 0, 0, 0};
    softmax.sum = sum(1, voxel, softmax.max);
    softmax.target = target - softmax.max;
    softmax.at_label = math::exp(softmax.target);
    softmax.smooth_dot = smoothing.dot(*this, voxel, softmax.max);
    return softmax;
  }
  // Of numbers that are relative to the largest logit of their warp.
  __device__ __forceinline__ float sum(int number, uint32_t voxel, float max) const {
    float sum = 0;
    for (int w = 0; w < warps_; ++w) sum += posted(number, w, voxel) * math::exp(posted(0, w, voxel) - max);
    return sum;
  }
  __device__ __forceinline__ float sum_of_squares(int number, uint32_t voxel, float max) const {
    float sum = 0;
    for (int w = 0; w < warps_; ++w) {
      const float scale = math::exp(posted(0, w, voxel) - max);
      sum += posted(number, w, voxel) * scale * scale;
    }
    return sum;
  }

 private:
  float* results_;
  float* posts_;
  int warps_;
  bool channels_last_;
};

// The largest of a thread's logits of each voxel.
template <class Tile>
__device__ __forceinline__ void largest_of(const Tile& tile, float (&max)[kTileVoxels]) {
#pragma unroll
  for (int i = 0; i < kTileVoxels; ++i) max[i] = kNoLogit;
#pragma unroll
  for (int k = 0; k < Tile::kSlots; ++k) {
#pragma unroll
    for (int i = 0; i < kTileVoxels; ++i) max[i] = fmaxf(max[i], tile.x[k][i]);
  }
}

// The logits become their exponentials; their sum.
template <class Tile>
__device__ __forceinline__ void exponentials(Tile& tile, const float (&max)[kTileVoxels], float (&sum)[kTileVoxels]) {
#pragma unroll
  for (int i = 0; i < kTileVoxels; ++i) sum[i] = 0;
#pragma unroll
  for (int k = 0; k < Tile::kSlots; ++k) {
#pragma unroll
    for (int i = 0; i < kTileVoxels; ++i) {
      tile.x[k][i] = math::exp(tile.x[k][i] - max[i]);
      sum[i] += tile.x[k][i];
    }
  }
}

}  // namespace riskmap::cuda
