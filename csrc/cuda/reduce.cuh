// Sums in fixed order: lanes of a warp, warps of a block, partial sums of an image. No floating-point atomics.
#pragma once

#include "cuda/launch.cuh"

namespace riskmap::cuda {

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }

// All lanes get the sum.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

template <class T>
__device__ __forceinline__ T warp_least(T value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, step);
    value = other < value ? other : value;
  }
  return value;
}

// All threads get the sum. For kThreads threads; every thread of the block must come here.
template <class T>
__device__ __forceinline__ T block_sum(T value) {
  __shared__ T warp_sums[kWarps];
  value = warp_sum(value);
  __syncthreads();  // nobody reads an earlier sum any more
  if (lane_index() == 0) warp_sums[warp_index()] = value;
  __syncthreads();
  T sum = warp_sums[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) sum += warp_sums[w];
  return sum;
}

template <class T>
__device__ __forceinline__ T block_least(T value) {
  __shared__ T warp_leasts[kWarps];
  value = warp_least(value);
  __syncthreads();
  if (lane_index() == 0) warp_leasts[warp_index()] = value;
  __syncthreads();
  T least = warp_leasts[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) least = warp_leasts[w] < least ? warp_leasts[w] : least;
  return least;
}

// Sum of `count` numbers, by the lanes of one warp.
__device__ __forceinline__ double warp_sum_of(const double* numbers, int64_t count) {
  double sum = 0;
  for (int64_t i = lane_index(); i < count; i += kWarp) sum += numbers[i];
  return warp_sum(sum);
}

}  // namespace riskmap::cuda
