// The logits of one voxel in memory, for what fits no tile: any number of classes, any strides, any dtype. A thread has
// a voxel and reads its classes, mostly from the caches, as often as a formula of csrc/math asks for them.
#pragma once

#include "cuda/voxels.cuh"
#include "math/softmax.h"

namespace riskmap::cuda {

// [batch, classes, voxels] with strides in elements.
struct AnyVolume {
  char* data;
  int64_t stride_batch, stride_class, stride_voxel;
  int classes;
};

inline AnyVolume any_view_of(const Volume& volume) {
  return {static_cast<char*>(volume.data), volume.stride_batch, volume.stride_class, volume.stride_voxel,
          static_cast<int>(volume.classes)};
}

template <class T>
__device__ __forceinline__ T* voxel_of(const AnyVolume& volume, uint32_t image, uint32_t voxel) {
  return reinterpret_cast<T*>(volume.data) + image * volume.stride_batch + voxel * volume.stride_voxel;
}

template <class T_>
struct AnyColumn {
  using T = T_;
  using acc_t = typename AccOf<T>::type;

  const T* base;
  int64_t stride;
  int count;

  __device__ __forceinline__ AnyColumn(const AnyVolume& volume, uint32_t image, uint32_t voxel)
      : base(voxel_of<const T>(volume, image, voxel)), stride(volume.stride_class), count(volume.classes) {}
  template <class Body>
  __device__ __forceinline__ void each(const Body& body) const {
    for (int c = 0; c < count; ++c) body(c);
  }
  __device__ __forceinline__ acc_t get(int c) const {
    return to_acc<acc_t>(Pack<T, 1>::load(base + c * stride).values[0]);
  }
};

}  // namespace riskmap::cuda
