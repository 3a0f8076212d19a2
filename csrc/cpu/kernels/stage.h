// Moves a tile of voxels between memory (any dtype, planar or channels-last) and scratch (acc_t, one row a class).
#pragma once

#include "cpu/dtypes.h"
#include "cpu/kernels/simd.h"

namespace riskmap::cpu {
namespace {

// n contiguous values. Conversions of 16-bit floats are written out: compilers make less of the scalar loop.
template <class T, class acc_t>
static void convert_row(const T* in, acc_t* out, int64_t n) {
  int64_t i = 0;
  if constexpr (__is_same(T, BFloat16) && sizeof(acc_t) == 4) {
    constexpr int kLanes = Simd<float>::kLanes;
    for (; i + kLanes <= n; i += kLanes) store(out + i, load_values(in + i));
  }
#if defined(__F16C__)
  if constexpr (__is_same(T, Half) && sizeof(acc_t) == 4) {
    for (; i + 8 <= n; i += 8) store(out + i, _mm256_cvtph_ps(load<__m128i>(in + i)));
  }
#endif
  for (; i < n; ++i) out[i] = to_acc<acc_t>(in[i]);
}

template <class acc_t, class T>
static void convert_row_back(const acc_t* in, T* out, int64_t n, bool streamed = false) {
  int64_t i = 0;
  if constexpr (__is_same(T, float) && __is_same(acc_t, float)) {
    constexpr int kLanes = Simd<float>::kLanes;
    if (streamed && is_aligned(out)) {
      for (; i + kLanes <= n; i += kLanes) stream(out + i, load<Simd<float>::F>(in + i));
    }
  }
  if constexpr (__is_same(T, BFloat16) && sizeof(acc_t) == 4) {
    constexpr int kLanes = Simd<float>::kLanes;
    for (; i + kLanes <= n; i += kLanes) store_values(out + i, load<Simd<float>::F>(in + i));
  }
#if defined(__F16C__)
  if constexpr (__is_same(T, Half) && sizeof(acc_t) == 4) {
    for (; i + 8 <= n; i += 8) store(out + i, _mm256_cvtps_ph(load<__m256>(in + i), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; i < n; ++i) out[i] = from_acc<T>(in[i]);
}

// The next tile's part of a row, wanted once this tile is done: rows lie a whole channel apart, too far for the
// hardware to see the pattern. Reaching past the end of the tensor is harmless.
template <class T>
static void prefetch_row(const T* row, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(row + i, 0, 2);
}

// Voxels [begin, begin + n) of image b into rows of `pitch`; the rest of the last vector becomes 0.
template <class acc_t>
static void stage_in(const Volume& volume, int64_t b, int64_t begin, int64_t n, acc_t* scratch, int64_t pitch) {
  const int64_t padded = (n + kMinTile - 1) / kMinTile * kMinTile;
  with_floating(volume.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* base = static_cast<const T*>(volume.data) + b * volume.stride_batch + begin * volume.stride_voxel;
    if (volume.stride_voxel == 1) {
      for (int64_t c = 0; c < volume.classes; ++c) {
        const T* row = base + c * volume.stride_class;
        prefetch_row(row + n, n);
        convert_row(row, scratch + c * pitch, n);
      }
    } else {
      for (int64_t v = 0; v < n; ++v)
        for (int64_t c = 0; c < volume.classes; ++c)
          scratch[c * pitch + v] = to_acc<acc_t>(base[v * volume.stride_voxel + c]);
    }
  });
  for (int64_t c = 0; c < volume.classes; ++c)
    for (int64_t v = n; v < padded; ++v) scratch[c * pitch + v] = acc_t(0);
}

// The way back for a gradient.
template <class acc_t>
static void stage_out(const acc_t* scratch, int64_t pitch, const Volume& volume, int64_t b, int64_t begin, int64_t n,
                      bool streamed) {
  with_floating(volume.dtype, [&](auto tag) {
    using T = decltype(tag);
    T* base = static_cast<T*>(volume.data) + b * volume.stride_batch + begin * volume.stride_voxel;
    if (volume.stride_voxel == 1) {
      for (int64_t c = 0; c < volume.classes; ++c)
        convert_row_back(scratch + c * pitch, base + c * volume.stride_class, n, streamed);
    } else {
      for (int64_t v = 0; v < n; ++v)
        for (int64_t c = 0; c < volume.classes; ++c)
          base[v * volume.stride_voxel + c] = from_acc<T>(scratch[c * pitch + v]);
    }
  });
}

// A voxel map (risk, gradient of a map) as acc_t, the rest of the last vector 0.
template <class acc_t>
static void stage_map(const VoxelMap& map, int64_t b, int64_t begin, int64_t n, acc_t* out) {
  with_floating(map.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* row = static_cast<const T*>(map.data) + b * map.stride_batch + begin;
    prefetch_row(row + n, n);
    convert_row(row, out, n);
  });
  for (int64_t v = n; v % kMinTile; ++v) out[v] = acc_t(0);
}

template <class acc_t>
static void unstage_map(const acc_t* in, const VoxelMap& map, int64_t b, int64_t begin, int64_t n) {
  with_floating(map.dtype, [&](auto tag) {
    using T = decltype(tag);
    convert_row_back(in, static_cast<T*>(map.data) + b * map.stride_batch + begin, n);
  });
}

}  // namespace
}  // namespace riskmap::cpu
