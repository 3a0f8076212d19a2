// Views of tensors as the kernels take them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "ops/check.h"
#include "ops/volume.h"

namespace riskmap {

Dtype dtype_of_view(const Tensor& tensor);

// A view of logits [B, C, *S]. Planar and channels-last strides are read as they are; anything else is copied into
// `keep`, which must outlive the view.
Volume view_volume(const Tensor& tensor, Tensor& keep);
bool is_viewable(const Tensor& logits);  // without a copy

// A view of a map [B, *S]; copied into `keep` unless its voxels are contiguous.
VoxelMap view_map(const Tensor& tensor, Tensor& keep);
VoxelMap view_map(const OptionalTensor& tensor, Tensor& keep);  // absent: data is nullptr

// Uninitialised [B, *S] on the device of logits [B, C, *S].
Tensor empty_map(const Tensor& logits, ScalarType dtype);

}  // namespace riskmap
