// Label tiles: any dtype in, int32 out, -1 where the voxel is ignored; values outside the classes are counted.
#pragma once

#include "cpu/kernels/stage.h"

namespace riskmap::cpu {
namespace {

// int64, the dtype of most targets, in whole vectors: the compiler's own version of the loop below is four times
// slower. Returns how many voxels it has done.
static int64_t stage_long_labels(const int64_t* in, int64_t n, int64_t classes, int64_t ignore_index, int32_t* out,
                                 int64_t* bad_count) {
  using I = typename Simd<double>::I;
  constexpr int kLanes = Simd<double>::kLanes;
  typedef int32_t narrow_t __attribute__((vector_size(kVectorBytes / 2)));
  const int64_t whole = n / kLanes * kLanes;
  // Mostly every label is a class that counts; one sign bit tells where one is not.
  I outside = I{} - (ignore_index >= 0 && ignore_index < classes);
  for (int64_t v = 0; v < whole; v += kLanes) {
    const I y = load<I>(in + v);
    outside |= y | (classes - 1 - y);
    store(out + v, __builtin_convertvector(y, narrow_t));
  }
  if (!any_negative(outside)) return whole;
  I bad{};
  for (int64_t v = 0; v < whole; v += kLanes) {
    const I y = load<I>(in + v);
    const I ignored = y == ignore_index;
    const I inside = (y >= 0) & (y < classes);
    bad -= ~ignored & ~inside;
    store(out + v, __builtin_convertvector(y | ~inside | ignored, narrow_t));  // all bits: -1
  }
  *bad_count += horizontal_count(bad);
  return whole;
}

// Returns how many labels are neither a class nor ignore_index; those become -1 too.
static int64_t stage_labels(const VoxelMap& map, int64_t b, int64_t begin, int64_t n, int64_t classes,
                            int64_t ignore_index, int32_t* out) {
  int64_t bad_count = 0;
  // A value that is no class and is not ignore_index.
  const int64_t bad = ignore_index == INT64_MIN ? INT64_MIN + 1 : INT64_MIN;
  with_any(map.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* in = static_cast<const T*>(map.data) + b * map.stride_batch + begin;
    prefetch_row(in + n, n);
    int64_t v = 0;
    if constexpr (__is_same(T, int64_t)) v = stage_long_labels(in, n, classes, ignore_index, out, &bad_count);
    for (; v < n; ++v) {
      const int64_t y = label_value(in[v], bad);
      const bool ignored = y == ignore_index;
      const bool inside = static_cast<uint64_t>(y) < static_cast<uint64_t>(classes);
      bad_count += !ignored & !inside;
      out[v] = inside & !ignored ? static_cast<int32_t>(y) : -1;
    }
  });
  for (int64_t v = n; v % kMinTile; ++v) out[v] = -1;
  return bad_count;
}

// Non-zero where the mask is.
[[maybe_unused]] static void stage_mask(const VoxelMap& map, int64_t b, int64_t begin, int64_t n, int32_t* out) {
  with_any(map.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* in = static_cast<const T*>(map.data) + b * map.stride_batch + begin;
    for (int64_t v = 0; v < n; ++v) {
      if constexpr (__is_same(T, Half) || __is_same(T, BFloat16)) {
        out[v] = (in[v].bits & 0x7fff) != 0;
      } else {
        out[v] = in[v] != T(0);
      }
    }
  });
  for (int64_t v = n; v % kMinTile; ++v) out[v] = 0;
}

}  // namespace
}  // namespace riskmap::cpu
