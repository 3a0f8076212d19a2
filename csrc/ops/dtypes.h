// The dtypes that ops take, once for every backend; ops/check.cpp has torch's names for them. Internal linkage, see
// math/portability.h.
#pragma once

#include <cstdint>

#include "math/float16.h"

namespace riskmap {

enum class Dtype : int {
  kFloat,
  kDouble,
  kHalf,
  kBFloat16,
  kUInt8,
  kInt8,
  kInt16,
  kInt32,
  kInt64,
  kUInt16,
  kUInt32,
  kUInt64,
  kBool
};

RISKMAP_HD bool is_floating(Dtype dtype) { return dtype <= Dtype::kBFloat16; }

namespace {

// Calls f with a value of the C++ type for the dtype.
template <class F>
void with_floating(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kDouble: f(double{}); break;
    case Dtype::kHalf: f(math::Half{}); break;
    case Dtype::kBFloat16: f(math::BFloat16{}); break;
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

}  // namespace
}  // namespace riskmap
