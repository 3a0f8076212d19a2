// How a kernel is launched; compiled by g++ for csrc/cuda_on_host, it runs on the CPU instead.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace riskmap::cuda {

inline constexpr int kThreads = 256;  // of a block, unless a kernel says otherwise
inline constexpr int kWarp = 32;
inline constexpr int kWarps = kThreads / kWarp;
inline constexpr unsigned kAllLanes = 0xffffffffu;

inline void check_launch() {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
#if defined(__CUDACC__)
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    throw std::runtime_error(
        "riskmap_ext: its CUDA kernels were built for the architectures " RISKMAP_CUDA_ARCHITECTURES
        ", not for that of this GPU, " +
        std::to_string(major * 10 + minor) +
        "; build it with CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES=" + std::to_string(major * 10 + minor));
  }
#endif
  throw std::runtime_error(std::string("riskmap_ext: CUDA kernel launch failed: ") + cudaGetErrorString(error));
}

// Parameters: the one struct that the kernel takes. shared_bytes: of dynamic_shared(), at most kMaxDynamicShared.
template <class Parameters>
void launch(void (*kernel)(Parameters), int64_t blocks, int threads, int64_t shared_bytes, cudaStream_t stream,
            const Parameters& parameters) {
  const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(threads));
#if defined(RISKMAP_CUDA_ON_HOST)
  (void)stream;
  cuda_on_host::launch(kernel, grid, block, static_cast<size_t>(shared_bytes), parameters);
#else
  // clang-format off
  kernel<<<grid, block, static_cast<size_t>(shared_bytes), stream>>>(parameters);
  // clang-format on
#endif
  check_launch();
}

inline constexpr int64_t kMaxDynamicShared = 40 << 10;  // every GPU grants 48 KB without being asked for more

// The shared memory that the launch asked for; aligned to 16 bytes.
__device__ __forceinline__ char* dynamic_shared() {
#if defined(RISKMAP_CUDA_ON_HOST)
  return cuda_on_host::dynamic_shared();
#else
  extern __shared__ uint4 riskmap_dynamic_shared[];
  return reinterpret_cast<char*>(riskmap_dynamic_shared);
#endif
}

}  // namespace riskmap::cuda
