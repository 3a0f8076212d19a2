// What lets one formula serve a CUDA thread (V = float or double) and a CPU vector of voxels.
#pragma once

// Which side it is: 1 for the kernels of csrc/cuda, compiled by nvcc, or by g++ for csrc/cuda_on_host.
#if defined(__CUDACC__) || defined(RISKMAP_CUDA_ON_HOST)
#define RISKMAP_CUDA_SIDE 1
#else
#define RISKMAP_CUDA_SIDE 0
#endif

#if defined(__CUDACC__)
#define RISKMAP_HD __host__ __device__ __forceinline__
#define RISKMAP_MEMBER __host__ __device__ __forceinline__  // for member functions
#define RISKMAP_LAMBDA
#else
// Internal linkage: the same header is compiled for several CPU instruction sets, and the linker must never
// hand the AVX-512 copy of a function to the baseline kernels.
#define RISKMAP_HD static inline __attribute__((always_inline))
#define RISKMAP_MEMBER inline __attribute__((always_inline))
#define RISKMAP_LAMBDA __attribute__((always_inline))
#endif

namespace riskmap::math {

// mask ? a : b, lane by lane for vectors.
template <class Mask, class V>
RISKMAP_HD V select(Mask mask, V a, V b) {
  return mask ? a : b;
}

template <class V>
RISKMAP_HD V maximum(V a, V b) {  // keeps a NaN in b
  return select(a > b, a, b);
}

template <class V>
RISKMAP_HD V minimum(V a, V b) {
  return select(a < b, a, b);
}

}  // namespace riskmap::math
