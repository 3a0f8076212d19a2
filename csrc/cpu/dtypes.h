// Values of any dtype as the numbers the kernels compute with. Internal linkage, see math/portability.h.
#pragma once

#include <cstdint>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "cpu/types.h"
#include "math/elementary.h"

namespace riskmap::cpu {
namespace {

RISKMAP_HD float bfloat16_to_float(uint16_t bits) { return math::bit_cast<float>(uint32_t(bits) << 16); }

RISKMAP_HD uint16_t float_to_bfloat16(float value) {  // to nearest, ties to even
  const uint32_t bits = math::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
}

RISKMAP_HD float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  // Shift exponent and mantissa into place and let a multiplication rescale, subnormals included.
  const uint32_t magnitude = uint32_t(h & 0x7fff) << 13;
  const uint32_t sign = uint32_t(h & 0x8000) << 16;
  const float scaled = math::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = (h & 0x7c00) == 0x7c00 ? (magnitude | 0x7f800000) : math::bit_cast<uint32_t>(scaled);
  return math::bit_cast<float>(sign | special);
#endif
}

RISKMAP_HD uint16_t float_to_half(float value) {  // to nearest, ties to even
#if defined(__F16C__)
  return static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t bits = math::bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds up to 65536 and beyond
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 aligns the bits and rounds
    const float aligned = math::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (math::bit_cast<uint32_t>(aligned) - 0x3f000000));
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
  if constexpr (__is_same(T, Half)) {
    return static_cast<acc_t>(half_to_float(v.bits));
  } else if constexpr (__is_same(T, BFloat16)) {
    return static_cast<acc_t>(bfloat16_to_float(v.bits));
  } else {
    return static_cast<acc_t>(v);
  }
}

template <class T, class acc_t>
RISKMAP_HD T from_acc(acc_t v) {
  if constexpr (__is_same(T, Half)) {
    return {float_to_half(static_cast<float>(v))};
  } else if constexpr (__is_same(T, BFloat16)) {
    return {float_to_bfloat16(static_cast<float>(v))};
  } else {
    return static_cast<T>(v);
  }
}

// Calls f with a value of the C++ type for the dtype.
template <class F>
void with_floating(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kDouble: f(double{}); break;
    case Dtype::kHalf: f(Half{}); break;
    case Dtype::kBFloat16: f(BFloat16{}); break;
    default: f(float{}); break;
  }
}

template <class F>
void with_any(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kUInt8:
    case Dtype::kBool: f(uint8_t{}); break;
    case Dtype::kInt8: f(int8_t{}); break;
    case Dtype::kInt16: f(int16_t{}); break;
    case Dtype::kInt32: f(int32_t{}); break;
    case Dtype::kInt64: f(int64_t{}); break;
    case Dtype::kUInt16: f(uint16_t{}); break;
    case Dtype::kUInt32: f(uint32_t{}); break;
    case Dtype::kUInt64: f(uint64_t{}); break;
    default: with_floating(dtype, f); break;
  }
}

// The value of a label, or `bad` where it is no integer.
template <class T>
RISKMAP_HD int64_t label_value(T v, int64_t bad) {
  if constexpr (__is_same(T, Half) || __is_same(T, BFloat16) || __is_same(T, float) || __is_same(T, double)) {
    const double x = to_acc<double>(v);
    if (!(x > -9e15 && x < 9e15)) return bad;  // NaN and what a double cannot hold exactly
    const int64_t y = static_cast<int64_t>(x);
    return static_cast<double>(y) == x ? y : bad;
  } else if constexpr (__is_same(T, uint64_t)) {
    return v > uint64_t(INT64_MAX) ? bad : static_cast<int64_t>(v);
  } else {
    return static_cast<int64_t>(v);
  }
}

}  // namespace
}  // namespace riskmap::cpu
