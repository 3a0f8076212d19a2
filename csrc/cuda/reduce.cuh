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

inline constexpr int kMaxWarps = 16;  // of a block

// Of the warps' results, in order. All threads get it; every thread of the block must come here.
template <class T, class F>
__device__ __forceinline__ T over_warps(T value, const F& combine) {
  __shared__ T of_warp[kMaxWarps];
  __syncthreads();  // nobody reads an earlier result any more
  if (lane_index() == 0) of_warp[warp_index()] = value;
  __syncthreads();
  T result = of_warp[0];
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  for (int w = 1; w < warps; ++w) result = combine(result, of_warp[w]);
  return result;
}

template <class T>
__device__ __forceinline__ T block_sum(T value) {
  return over_warps(warp_sum(value), [](T a, T b) { return a + b; });
}

template <class T>
__device__ __forceinline__ T block_least(T value) {
  return over_warps(warp_least(value), [](T a, T b) { return b < a ? b : a; });
}

template <int N>
__device__ __forceinline__ float halve_sums(const float (&numbers)[N]) {
  if constexpr (N == 1) {
    return numbers[0];
  } else {
    constexpr int kHalf = N / 2;
    const bool upper = (lane_index() & kHalf) != 0;
    float half[kHalf];
#pragma unroll
    for (int j = 0; j < kHalf; ++j) {
      const float kept = upper ? numbers[j + kHalf] : numbers[j], given = upper ? numbers[j] : numbers[j + kHalf];
      half[j] = kept + __shfl_xor_sync(kAllLanes, given, kHalf);
    }
    return halve_sums(half);
  }
}

// Sums of N numbers over a warp at once: lane j leaves with that of number j % N. N is a power of two, at most kWarp.
template <int N>
__device__ __forceinline__ float sum_over_warp(const float (&numbers)[N]) {
  float sum = halve_sums(numbers);
#pragma unroll
  for (int step = N; step < kWarp; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return sum;
}

// Sum of `count` numbers, by the lanes of one warp.
__device__ __forceinline__ double warp_sum_of(const double* numbers, int64_t count) {
  double sum = 0;
  for (int64_t i = lane_index(); i < count; i += kWarp) sum += __ldcg(numbers + i);
  return warp_sum(sum);
}

}  // namespace riskmap::cuda
