// Values of any dtype as the numbers the kernels compute with. Internal linkage, see math/portability.h.
#pragma once

#include <cstdint>

#include "cpu/types.h"
#include "math/elementary.h"
#include "math/float16.h"

namespace riskmap::cpu {
namespace {

using math::bfloat16_to_float;
using math::float_to_bfloat16;
using math::float_to_half;
using math::half_to_float;

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
