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

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream, Arguments... arguments) {
#if defined(RISKMAP_CUDA_ON_HOST)
  (void)stream;
  cuda_on_host::launch(kernel, grid, block, arguments...);
#else
  // clang-format off
  kernel<<<grid, block, 0, stream>>>(arguments...);
  // clang-format on
#endif
  check_launch();
}

inline dim3 blocks(int64_t count) { return dim3(static_cast<unsigned>(count)); }

}  // namespace riskmap::cuda
