// Vectors of the instruction set that this translation unit is compiled for.
// Everything here has internal linkage (see math/portability.h).
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/dtypes.h"
#include "cpu/types.h"
#include "math/elementary.h"

namespace riskmap::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T, int kBytes = kVectorBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};

// acc_t: float or double. F: lanes of acc_t; I: integers of the same width, masks among them.
template <class acc_t>
struct Simd {
  using F = typename VectorOf<acc_t>::type;
  using I = typename VectorOf<typename math::Traits<acc_t>::Bits>::type;
  static constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(acc_t));
};

template <class V>
RISKMAP_HD V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class V>
RISKMAP_HD void store(void* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}

// All lanes the same. 0 + x would be an addition, for the sake of -0.
template <class acc_t>
RISKMAP_HD typename Simd<acc_t>::F broadcast(acc_t x) {
  return x - typename Simd<acc_t>::F{};
}

// One vector of values as the kernels compute with them, from memory of a dtype that is read in place, and back.
RISKMAP_HD Simd<float>::F load_values(const float* p) { return load<Simd<float>::F>(p); }
RISKMAP_HD Simd<double>::F load_values(const double* p) { return load<Simd<double>::F>(p); }
RISKMAP_HD void store_values(float* p, Simd<float>::F v) { store(p, v); }
RISKMAP_HD void store_values(double* p, Simd<double>::F v) { store(p, v); }

typedef uint16_t Vector16 __attribute__((vector_size(kVectorBytes / 2)));
using Vector32 = VectorOf<uint32_t>::type;

// GCC makes four instructions of what AVX-512 has one for.
RISKMAP_HD Vector16 narrow(Vector32 v) {
#if defined(__AVX512F__)
  return math::bit_cast<Vector16>(_mm512_cvtepi32_epi16(math::bit_cast<__m512i>(v)));
#else
  return __builtin_convertvector(v, Vector16);
#endif
}

RISKMAP_HD Simd<float>::F load_values(const BFloat16* p) {
#if defined(__AVX512F__)
  // One instruction instead of two: words go to the upper halves of lanes, the lower ones become 0.
  VectorOf<uint16_t>::type upper{};
  for (uint16_t i = 0; i < 16; ++i) upper[2 * i + 1] = i;
  const __m512i words = _mm512_castsi256_si512(load<__m256i>(p));
  return math::bit_cast<Simd<float>::F>(
      _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, math::bit_cast<__m512i>(upper), words));
#else
  return math::bit_cast<Simd<float>::F>(__builtin_convertvector(load<Vector16>(p), Vector32) << 16);
#endif
}

#if defined(__AVX512F__)
// One instruction instead of eight where the processor has AVX512_BF16; it takes subnormal values for 0. An intrinsic
// would want the whole file compiled for such processors.
static const bool has_bfloat16_rounding = __builtin_cpu_supports("avx512bf16");

RISKMAP_HD Vector16 round_to_bfloat16(Simd<float>::F v) {
  if (!has_bfloat16_rounding) return narrow(math::bfloat16_bits<Vector32>(v));
  Vector16 rounded;
  asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(v));
  return rounded;
}
#else
RISKMAP_HD Vector16 round_to_bfloat16(Simd<float>::F v) { return narrow(math::bfloat16_bits<Vector32>(v)); }
#endif

RISKMAP_HD void store_values(BFloat16* p, Simd<float>::F v) { store(p, round_to_bfloat16(v)); }

// Past the caches, for results too large to be read from them again; p must be aligned to kVectorBytes.
RISKMAP_HD void stream(float* p, typename Simd<float>::F v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, v);
#elif defined(__x86_64__)
  _mm_stream_ps(p, v);
#else
  store(p, v);
#endif
}

// Streamed stores are not ordered with others: to be called before another thread may read them.
RISKMAP_HD void end_of_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

RISKMAP_HD bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; }

// Labels are int32 in tiles; widened where the mask lanes are 64 bit.
template <class acc_t>
RISKMAP_HD typename Simd<acc_t>::I load_labels(const int32_t* p) {
  using I = typename Simd<acc_t>::I;
  if constexpr (sizeof(acc_t) == 4) {
    return load<I>(p);
  } else {
    typedef int32_t half_t __attribute__((vector_size(kVectorBytes / 2)));
    return __builtin_convertvector(load<half_t>(p), I);
  }
}

// The lower and the upper half of a vector.
template <class V>
struct Halves {
  typename VectorOf<typename math::Traits<V>::Element, sizeof(V) / 2>::type low, high;
  RISKMAP_MEMBER explicit Halves(V v) { std::memcpy(this, &v, sizeof(v)); }
};

// The sum of the lanes, by halves: one after the other, they would be waited for.
template <class V>
RISKMAP_HD auto sum_of_lanes(V v) {
  if constexpr (sizeof(V) == 2 * sizeof(v[0])) {
    return v[0] + v[1];
  } else {
    const Halves<V> halves(v);
    return sum_of_lanes(halves.low + halves.high);
  }
}

RISKMAP_HD double horizontal_sum(Simd<double>::F v) { return sum_of_lanes(v); }
RISKMAP_HD double horizontal_sum(Simd<float>::F v) {
  const Halves<Simd<float>::F> halves(v);
  using Wide = Simd<double>::F;
  return sum_of_lanes(__builtin_convertvector(halves.low, Wide) + __builtin_convertvector(halves.high, Wide));
}
RISKMAP_HD int64_t horizontal_count(Simd<float>::I v) { return sum_of_lanes(v); }
RISKMAP_HD int64_t horizontal_count(Simd<double>::I v) { return sum_of_lanes(v); }

// Whether the highest bit of a lane is set.
template <class I>
RISKMAP_HD bool any_negative(I v) {
  return horizontal_count(v < 0) != 0;
}

// sum, with value added where the mask is set: one masked instruction, or two without a blend.
template <class I, class V>
RISKMAP_HD V add_where(I mask, V sum, V value) {
#if defined(__AVX512F__)
  return math::select(mask, V(sum + value), sum);
#else
  return sum + math::select(mask, value, V{});
#endif
}

// count + 1 where the mask is set.
template <class I>
RISKMAP_HD I count_where(I mask, I count) {
#if defined(__AVX512F__)
  return math::select(mask, I(count + 1), count);
#else
  return count - mask;
#endif
}

// table[index modulo kLanes] lane by lane: a short table, padded to kMinTile elements, fits a register.
template <class acc_t>
RISKMAP_HD typename Simd<acc_t>::F lookup_short(const acc_t* table, typename Simd<acc_t>::I index) {
  return __builtin_shuffle(load<typename Simd<acc_t>::F>(table), index);
}

// table[index] lane by lane; 0 <= index < length. Padded as above.
template <class acc_t>
RISKMAP_HD typename Simd<acc_t>::F lookup(const acc_t* table, int64_t length, typename Simd<acc_t>::I index) {
  if (length <= Simd<acc_t>::kLanes) return lookup_short(table, index);
  typename Simd<acc_t>::F v{};
  for (int i = 0; i < Simd<acc_t>::kLanes; ++i) v[i] = table[index[i]];
  return v;
}

// Transposes kLanes x kLanes in registers: log2(kLanes) rounds of interleaving row i with row i + kLanes / 2.
template <class acc_t>
RISKMAP_HD void transpose(typename Simd<acc_t>::F (&rows)[Simd<acc_t>::kLanes]) {
  using F = typename Simd<acc_t>::F;
  using I = typename Simd<acc_t>::I;
  constexpr int n = Simd<acc_t>::kLanes;
  I low{}, high{};
  for (int i = 0; i < n; ++i) {
    low[i] = i / 2 + (i % 2 ? n : 0);
    high[i] = n / 2 + i / 2 + (i % 2 ? n : 0);
  }
  for (int round = 1; round < n; round *= 2) {
    F next[n];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + n / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + n / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

}  // namespace
}  // namespace riskmap::cpu
