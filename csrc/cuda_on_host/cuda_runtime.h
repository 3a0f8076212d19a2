// Stands in for CUDA's header of this name where kernels are compiled by g++ (see runner.h). It holds what the kernels
// use, as CUDA declares it, and no more: no floating-point atomics, no cp.async, TMA, tensor
// cores or cooperative groups.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "runner.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

// AddressSanitizer watches the edges of static arrays only. Elsewhere shared memory is thread-local storage, which the
// runner fills with garbage before every block: as on a GPU, nothing is left there to rely on.
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned int x, y;
};
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};
struct alignas(4) uchar4 {
  unsigned char x, y, z, w;
};
struct alignas(8) ushort4 {
  unsigned short x, y, z, w;
};
struct alignas(16) longlong2 {
  long long x, y;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned int x, unsigned int y) { return {x, y}; }
inline uint4 make_uint4(unsigned int x, unsigned int y, unsigned int z, unsigned int w) { return {x, y, z, w}; }

constexpr int warpSize = riskmap::cuda_on_host::kWarp;

// Barriers and warp operations; the last two parameters are never given.

#define RISKMAP_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(RISKMAP_CALLER) { riskmap::cuda_on_host::block_barrier({"__syncthreads", file, line}); }

inline int __syncthreads_or(int predicate, RISKMAP_CALLER) {
  return riskmap::cuda_on_host::block_any(predicate != 0, {"__syncthreads_or", file, line});
}

inline void __syncwarp(unsigned int mask = 0xffffffffu, RISKMAP_CALLER) {
  riskmap::cuda_on_host::warp_barrier(mask, {"__syncwarp", file, line});
}

inline void __threadfence() { riskmap::cuda_on_host::fence(); }
inline void __threadfence_block() { riskmap::cuda_on_host::fence(); }

inline unsigned int __ballot_sync(unsigned int mask, int predicate, RISKMAP_CALLER) {
  return riskmap::cuda_on_host::warp_ballot(mask, predicate != 0, {"__ballot_sync", file, line});
}

inline int __any_sync(unsigned int mask, int predicate, RISKMAP_CALLER) {
  return riskmap::cuda_on_host::warp_ballot(mask, predicate != 0, {"__any_sync", file, line}) != 0;
}

inline int __all_sync(unsigned int mask, int predicate, RISKMAP_CALLER) {
  return riskmap::cuda_on_host::warp_ballot(mask, predicate != 0, {"__all_sync", file, line}) == mask;
}

namespace riskmap::cuda_on_host {

template <class T>
T shuffle(unsigned int mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_exchange(mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace riskmap::cuda_on_host

template <class T>
T __shfl_sync(unsigned int mask, T value, int source, int width = warpSize, RISKMAP_CALLER) {
  const int first = riskmap::cuda_on_host::lane() & ~(width - 1);
  return riskmap::cuda_on_host::shuffle(mask, value, first + (source & (width - 1)), {"__shfl_sync", file, line});
}

template <class T>
T __shfl_up_sync(unsigned int mask, T value, unsigned int delta, int width = warpSize, RISKMAP_CALLER) {
  const int lane = riskmap::cuda_on_host::lane(), source = lane - static_cast<int>(delta);
  return riskmap::cuda_on_host::shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source,
                                        {"__shfl_up_sync", file, line});
}

template <class T>
T __shfl_down_sync(unsigned int mask, T value, unsigned int delta, int width = warpSize, RISKMAP_CALLER) {
  const int lane = riskmap::cuda_on_host::lane(), source = lane + static_cast<int>(delta);
  return riskmap::cuda_on_host::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source,
                                        {"__shfl_down_sync", file, line});
}

template <class T>
T __shfl_xor_sync(unsigned int mask, T value, int lane_mask, int width = warpSize, RISKMAP_CALLER) {
  const int lane = riskmap::cuda_on_host::lane(), source = lane ^ lane_mask;
  return riskmap::cuda_on_host::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source,
                                        {"__shfl_xor_sync", file, line});
}

// Atomic operations on the types that CUDA has them for, floating-point ones left out.

namespace riskmap::cuda_on_host {

template <class T, class F>
T update(T* address, const F& next) {
  T before = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &before, next(before), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return before;
}

}  // namespace riskmap::cuda_on_host

#define RISKMAP_ATOMICS(T)                                                                               \
  inline T atomicAdd(T* address, T value) {                                                              \
    return riskmap::cuda_on_host::update(address, [&](T old) { return static_cast<T>(old + value); });   \
  }                                                                                                      \
  inline T atomicMax(T* address, T value) {                                                              \
    return riskmap::cuda_on_host::update(address, [&](T old) { return old > value ? old : value; });     \
  }                                                                                                      \
  inline T atomicMin(T* address, T value) {                                                              \
    return riskmap::cuda_on_host::update(address, [&](T old) { return old < value ? old : value; });     \
  }                                                                                                      \
  inline T atomicOr(T* address, T value) {                                                               \
    return riskmap::cuda_on_host::update(address, [&](T old) { return old | value; });                   \
  }                                                                                                      \
  inline T atomicExch(T* address, T value) {                                                             \
    return riskmap::cuda_on_host::update(address, [&](T) { return value; });                             \
  }                                                                                                      \
  inline T atomicCAS(T* address, T expected, T value) {                                                  \
    return riskmap::cuda_on_host::update(address, [&](T old) { return old == expected ? value : old; }); \
  }
RISKMAP_ATOMICS(int)
RISKMAP_ATOMICS(unsigned int)
RISKMAP_ATOMICS(unsigned long long)
#undef RISKMAP_ATOMICS

inline unsigned int atomicInc(unsigned int* address, unsigned int limit) {
  return riskmap::cuda_on_host::update(address, [&](unsigned int old) { return old >= limit ? 0u : old + 1u; });
}

// Loads and stores with a hint for the caches.

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
template <class T>
void __stcg(T* address, T value) {
  *address = value;
}

// Numbers.

namespace riskmap::cuda_on_host {

template <class To, class From>
To reinterpret(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace riskmap::cuda_on_host

inline float __uint_as_float(unsigned int x) { return riskmap::cuda_on_host::reinterpret<float>(x); }
inline unsigned int __float_as_uint(float x) { return riskmap::cuda_on_host::reinterpret<unsigned int>(x); }
inline float __int_as_float(int x) { return riskmap::cuda_on_host::reinterpret<float>(x); }
inline int __float_as_int(float x) { return riskmap::cuda_on_host::reinterpret<int>(x); }
inline long long __double_as_longlong(double x) { return riskmap::cuda_on_host::reinterpret<long long>(x); }
inline double __longlong_as_double(long long x) { return riskmap::cuda_on_host::reinterpret<double>(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdividef(float x, float y) { return x / y; }
inline int __popc(unsigned int x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned int>(x)); }

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

// The runtime: one device, nothing asynchronous.

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
using cudaStream_t = struct CUstream_st*;

namespace riskmap::cuda_on_host {

inline constexpr int kMultiProcessors = 3;  // few, so that grids bounded by them have to loop
cudaError_t& last_error();

}  // namespace riskmap::cuda_on_host

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = riskmap::cuda_on_host::last_error();
  riskmap::cuda_on_host::last_error() = cudaSuccess;
  return error;
}
inline cudaError_t cudaPeekAtLastError() { return riskmap::cuda_on_host::last_error(); }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "invalid configuration argument";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = riskmap::cuda_on_host::kMultiProcessors;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* address, int value, size_t count, cudaStream_t) {
  std::memset(address, value, count);
  return cudaSuccess;
}

namespace riskmap::cuda_on_host {

// kernel<<<grid, block, shared_bytes>>>(parameters): every thread gets its own copy of the parameters.
template <class Parameters>
void launch(void (*kernel)(Parameters), dim3 grid, dim3 block, size_t shared_bytes, const Parameters& parameters) {
  if (!record({reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, &parameters, sizeof(Parameters)}))
    return;
  const auto call = [&] { kernel(parameters); };
  const bool ran = run_grid(
      grid, block, shared_bytes, [](const void* context) { (*static_cast<const decltype(call)*>(context))(); }, &call);
  if (!ran) last_error() = cudaErrorInvalidConfiguration;
}

// The faults' kernels take several arguments, or no dynamic shared memory.
template <class... Parameters, class... Arguments,
          class = std::enable_if_t<sizeof...(Parameters) == sizeof...(Arguments)>>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments&&... arguments) {
  const auto call = [&] { kernel(arguments...); };
  const bool ran =
      run_grid(grid, block, 0, [](const void* context) { (*static_cast<const decltype(call)*>(context))(); }, &call);
  if (!ran) last_error() = cudaErrorInvalidConfiguration;
}

}  // namespace riskmap::cuda_on_host
