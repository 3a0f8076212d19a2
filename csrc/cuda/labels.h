// Labels as the kernels take them.
#pragma once

#include <cuda_runtime.h>

#include "cuda/types.h"

namespace riskmap::cuda {

// Labels that are floats, as int32: the class, kConvertedIgnore, or what is no class.
struct LabelConversion {
  VoxelMap from;
  int64_t batch, voxels, num_labels, ignore_index;
  int32_t* to;  // [batch, voxels]
};

inline constexpr int32_t kConvertedIgnore = -1, kConvertedBad = -2;

void convert_labels(const LabelConversion& args, cudaStream_t stream);

}  // namespace riskmap::cuda
