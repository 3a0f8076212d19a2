// Values of any dtype for the CPU kernels. Internal linkage, see math/portability.h.
#pragma once

#include <cstdint>

#include "cpu/types.h"
#include "math/elementary.h"
#include "math/float16.h"

namespace riskmap::cpu {
namespace {

using math::BFloat16;
using math::from_acc;
using math::Half;
using math::to_acc;

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
