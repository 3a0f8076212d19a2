// Plain descriptions of tensors for the kernels of every backend, which never see torch.
#pragma once

#include <cstdint>

#include "ops/dtypes.h"

namespace riskmap {

// [batch, classes, voxels]; strides in elements. Either stride_voxel or stride_class is 1.
struct Volume {
  void* data;
  Dtype dtype;
  int64_t batch, classes, voxels;
  int64_t stride_batch, stride_class, stride_voxel;
};

// [batch, voxels] with voxel stride 1; data == nullptr: absent.
struct VoxelMap {
  void* data;
  Dtype dtype;
  int64_t stride_batch;
};

}  // namespace riskmap
