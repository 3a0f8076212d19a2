// Labels that are floats become integers before the other kernels, which know integers only.
#include "cuda/dtypes.cuh"
#include "cuda/labels.h"

namespace riskmap::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) convert_kernel(const LabelConversion args) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; at < args.batch * args.voxels;
       at += stride) {
    const int64_t image = at / args.voxels;
    const double x = load_scalar(args.from.data, args.from.dtype, image * args.from.stride_batch + at % args.voxels);
    int32_t label = kConvertedBad;
    if (x > -9e15 && x < 9e15) {  // no NaN, and nothing that a double cannot hold exactly
      const int64_t y = static_cast<int64_t>(x);
      if (static_cast<double>(y) == x)
        label = y == args.ignore_index          ? kConvertedIgnore
                : y >= 0 && y < args.num_labels ? static_cast<int32_t>(y)
                                                : kConvertedBad;
    }
    args.to[at] = label;
  }
}

}  // namespace

void convert_labels(const LabelConversion& args, cudaStream_t stream) {
  const int64_t blocks = (args.batch * args.voxels + kThreads - 1) / kThreads;
  if (blocks == 0) return;
  launch(convert_kernel, blocks < 1056 ? blocks : 1056, kThreads, 0, stream, args);
}

}  // namespace riskmap::cuda
