// Elements of any dtype: loads and stores of several at once.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/types.h"
#include "math/float16.h"

namespace riskmap::cuda {

using math::BFloat16;
using math::from_acc;
using math::Half;
using math::to_acc;

// float, and double for double.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};

template <class acc_t>
__device__ __forceinline__ acc_t not_a_number() {
  return static_cast<acc_t>(NAN);
}

// The largest finite number.
template <class acc_t>
__device__ __forceinline__ acc_t largest() {
  return sizeof(acc_t) == 8 ? static_cast<acc_t>(1.7976931348623157e308) : static_cast<acc_t>(3.402823466e38f);
}

// The word that memory is read in: of 1, 2, 4, 8 or 16 bytes.
template <int kBytes>
struct WordOf;
template <>
struct WordOf<1> {
  using type = uint8_t;
};
template <>
struct WordOf<2> {
  using type = uint16_t;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

// The largest of these that `bytes` is a whole number of.
__host__ __device__ constexpr int word_bytes(int bytes) {
  for (int word = 16; word > 1; word /= 2)
    if (bytes % word == 0) return word;
  return 1;
}

// N neighbours, read or written in the largest words that they are a whole number of; the address must be a multiple of
// such a word.
template <class T, int N>
struct Pack {
  static constexpr int kBytes = N * static_cast<int>(sizeof(T));
  static constexpr int kWords = kBytes / word_bytes(kBytes);
  using Word = typename WordOf<word_bytes(kBytes)>::type;

  T values[N];

  __device__ __forceinline__ static Pack load(const T* address) {
    Word words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __ldg(reinterpret_cast<const Word*>(address) + i);
    Pack pack;
    memcpy(&pack, words, kBytes);
    return pack;
  }

  // From memory that is written to.
  __device__ __forceinline__ static Pack load_shared(const T* address) {
    Word words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const Word*>(address)[i];
    Pack pack;
    memcpy(&pack, words, kBytes);
    return pack;
  }

  __device__ __forceinline__ static Pack all(float number) {
    Pack pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.values[i] = from_acc<T>(number);
    return pack;
  }

  __device__ __forceinline__ static Pack of(const float (&numbers)[N]) {
    Pack pack;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    if constexpr (sizeof(T) == 2 && N % 2 == 0) {  // two in an instruction
      uint32_t pairs[N / 2];
#pragma unroll
      for (int j = 0; j < N / 2; ++j) {
        if constexpr (std::is_same_v<T, Half>) {
          asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pairs[j]) : "f"(numbers[2 * j + 1]), "f"(numbers[2 * j]));
        } else {
          asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pairs[j]) : "f"(numbers[2 * j + 1]), "f"(numbers[2 * j]));
        }
      }
      memcpy(&pack, pairs, kBytes);
    } else
#endif
    {
#pragma unroll
      for (int i = 0; i < N; ++i) pack.values[i] = from_acc<T>(numbers[i]);
    }
    return pack;
  }
  __device__ __forceinline__ void to(float (&numbers)[N]) const {
    if constexpr (std::is_same_v<T, BFloat16> && N % 2 == 0) {  // an instruction each, without a half on the way
      uint32_t pairs[N / 2];
      memcpy(pairs, this, kBytes);
#pragma unroll
      for (int j = 0; j < N / 2; ++j) {
        numbers[2 * j] = math::bit_cast<float>(pairs[j] << 16);
        numbers[2 * j + 1] = math::bit_cast<float>(pairs[j] & 0xffff0000u);
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) numbers[i] = to_acc<float>(values[i]);
    }
  }

  __device__ __forceinline__ void store(T* address) const {
    Word words[kWords];
    memcpy(words, this, kBytes);
#pragma unroll
    for (int i = 0; i < kWords; ++i) reinterpret_cast<Word*>(address)[i] = words[i];
  }
};

// One floating value of any dtype.
__device__ __forceinline__ double load_scalar(const void* data, Dtype dtype, int64_t index = 0) {
  switch (dtype) {
    case Dtype::kDouble: return static_cast<const double*>(data)[index];
    case Dtype::kHalf: return to_acc<double>(static_cast<const Half*>(data)[index]);
    case Dtype::kBFloat16: return to_acc<double>(static_cast<const BFloat16*>(data)[index]);
    default: return static_cast<double>(static_cast<const float*>(data)[index]);
  }
}

}  // namespace riskmap::cuda
