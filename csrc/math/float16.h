// 16-bit floats as raw bits, to and from float: by an instruction where there is one, else by bit arithmetic. And
// values of any dtype as the numbers that the kernels compute with.
#pragma once

#include <cstdint>
#include <type_traits>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "math/elementary.h"

namespace riskmap::math {

RISKMAP_HD float bfloat16_to_float(uint16_t bits) { return bit_cast<float>(uint32_t(bits) << 16); }

// In the low 16 bits. U: uint32_t, or a vector of them for a vector of floats.
template <class U, class V>
RISKMAP_HD U bfloat16_bits(V value) {
  const U bits = bit_cast<U>(value);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return select(value == value, rounded, U(U{} + 0x7fc0u));
}

RISKMAP_HD uint16_t float_to_bfloat16(float value) {  // to nearest, ties to even
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
  return rounded;
#else
  return static_cast<uint16_t>(bfloat16_bits<uint32_t>(value));
#endif
}

RISKMAP_HD float half_to_float(uint16_t h) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(h));
  return value;
#elif defined(__F16C__) && !defined(__CUDACC__)
  return _cvtsh_ss(h);
#else
  // Shift exponent and mantissa into place and let a multiplication rescale, subnormals included.
  const uint32_t magnitude = uint32_t(h & 0x7fff) << 13;
  const uint32_t sign = uint32_t(h & 0x8000) << 16;
  const float scaled = bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = (h & 0x7c00) == 0x7c00 ? (magnitude | 0x7f800000) : bit_cast<uint32_t>(scaled);
  return bit_cast<float>(sign | special);
#endif
}

RISKMAP_HD uint16_t float_to_half(float value) {  // to nearest, ties to even
#if defined(__CUDA_ARCH__)
  uint16_t rounded;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
  return rounded;
#elif defined(__F16C__) && !defined(__CUDACC__)
  return static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds up to 65536 and beyond
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 aligns the bits and rounds
    const float aligned = bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bit_cast<uint32_t>(aligned) - 0x3f000000));
  }
  const uint32_t rebased = magnitude - 0x38000000;
  return static_cast<uint16_t>(sign | ((rebased + 0xfff + ((rebased >> 13) & 1)) >> 13));
#endif
}

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class acc_t, class T>
RISKMAP_HD acc_t to_acc(T v) {
  if constexpr (std::is_same_v<T, Half>) {
    return static_cast<acc_t>(half_to_float(v.bits));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return static_cast<acc_t>(bfloat16_to_float(v.bits));
  } else {
    return static_cast<acc_t>(v);
  }
}

template <class T, class acc_t>
RISKMAP_HD T from_acc(acc_t v) {
  if constexpr (std::is_same_v<T, Half>) {
    return {float_to_half(static_cast<float>(v))};
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return {float_to_bfloat16(static_cast<float>(v))};
  } else {
    return static_cast<T>(v);
  }
}

}  // namespace riskmap::math
