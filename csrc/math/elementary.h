// exp and log for CPU vectors (and CPU scalars); CUDA uses the device's own.
// NaN stays NaN. Errors: about 1 ulp in float, 2 ulp in double.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "math/portability.h"

#if RISKMAP_CUDA_SIDE
#include <cmath>
#elif defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace riskmap::math {

// Element: float or double; Bits: the integer type of the same width and number of lanes (that of a comparison).
template <class V>
struct Traits {
  using Element = std::remove_cv_t<std::remove_reference_t<decltype(std::declval<V&>()[0])> >;
  using Bits = decltype(V{} < V{});
};

template <>
struct Traits<float> {
  using Element = float;
  using Bits = int32_t;
};
template <>
struct Traits<double> {
  using Element = double;
  using Bits = int64_t;
};

template <class To, class From>
RISKMAP_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

#if RISKMAP_CUDA_SIDE

#if defined(__CUDA_ARCH__)
// The hardware's own, in float: results below the smallest normal number are 0.
#define RISKMAP_APPROXIMATE(name)                                \
  __device__ __forceinline__ float name##_approximate(float x) { \
    float y;                                                     \
    asm(#name ".approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));     \
    return y;                                                    \
  }
RISKMAP_APPROXIMATE(ex2)
RISKMAP_APPROXIMATE(lg2)
RISKMAP_APPROXIMATE(rcp)
#undef RISKMAP_APPROXIMATE
#else
RISKMAP_HD float ex2_approximate(float x) { return ::exp2f(x); }
RISKMAP_HD float lg2_approximate(float x) { return ::log2f(x); }
RISKMAP_HD float rcp_approximate(float x) { return 1.0f / x; }
#endif

// Errors in float: of exp about |x| 1e-7 of the result, of log 2e-7 where the result is below 1, of it elsewhere.
RISKMAP_HD float exp(float x) { return ex2_approximate(x * 1.442695041f); }
RISKMAP_HD double exp(double x) { return ::exp(x); }
RISKMAP_HD float log(float x) { return lg2_approximate(x) * 0.693147181f; }
RISKMAP_HD float inverse(float x) { return rcp_approximate(x); }
RISKMAP_HD double inverse(double x) { return 1.0 / x; }
RISKMAP_HD double log(double x) { return ::log(x); }
// 2 artanh(x / (2 + x)), as below.
RISKMAP_HD float log1p_unit(float x) {
  const float s = x * inverse(x + 2.0f), s2 = s * s;
  float series = 1.0f / 15;
#pragma unroll
  for (int i = 6; i >= 0; --i) series = series * s2 + 1.0f / static_cast<float>(2 * i + 1);
  return s * 2.0f * series;
}
RISKMAP_HD double log1p_unit(double x) { return ::log1p(x); }

#else

template <class V>
RISKMAP_HD V inverse(V x) {
  return V((V{} + typename Traits<V>::Element(1)) / x);
}

template <class Element>
struct Constants;

template <>
struct Constants<float> {
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  static constexpr int32_t kRoundBits = 0x4b400000;
  static constexpr int kMantissa = 23;
  static constexpr int32_t kBias = 127;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kExpMin = -87.3365f, kExpMax = 88.0f;
  static constexpr int32_t kSqrtHalfBits = 0x3f3504f3;
  static constexpr int kExpTerms = 7, kLogTerms = 5, kLog1pTerms = 8;
};

template <>
struct Constants<double> {
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int64_t kRoundBits = 0x4338000000000000;
  static constexpr int kMantissa = 52;
  static constexpr int64_t kBias = 1023;
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kExpMin = -708.39, kExpMax = 709.0;
  static constexpr int64_t kSqrtHalfBits = 0x3fe6a09e667f3bcd;
  static constexpr int kExpTerms = 14, kLogTerms = 11, kLog1pTerms = 17;
};

inline constexpr double kLog2E = 1.4426950408889634;

// 1 / n!, the Taylor series of exp on [-ln 2 / 2, ln 2 / 2].
inline constexpr double kInverseFactorial[14] = {
    1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
    1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};

// e^r for |r| <= ln 2 / 2.
template <class V>
RISKMAP_HD V exp_reduced(V r) {
  using Element = typename Traits<V>::Element;
  constexpr int kTerms = Constants<Element>::kExpTerms;
  V p = V{} + Element(kInverseFactorial[kTerms - 1]);
#pragma GCC unroll 14
  for (int i = kTerms - 2; i >= 0; --i) p = p * r + Element(kInverseFactorial[i]);
  return p;
}

// e^x; 0 below the smallest normal result.
template <class V>
RISKMAP_HD V exp(V x) {
  using Element = typename Traits<V>::Element;
  using Bits = typename Traits<V>::Bits;
  using K = Constants<Element>;
#if defined(__AVX512F__)
  // The same with its instructions for rounding and for scaling by a power of two.
  if constexpr (sizeof(V) == 64 && sizeof(Element) == 4) {
    const V clamped = _mm512_min_ps(V{} + K::kExpMax, x);
    const V n = _mm512_roundscale_ps(clamped * Element(kLog2E), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const V p = exp_reduced(V((clamped - n * K::kLn2High) - n * K::kLn2Low));
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, V{} + K::kExpMin, _CMP_NLT_UQ), p, n);
  }
#endif
  const auto underflow = x < K::kExpMin;
  const V clamped = select(x > K::kExpMax, V{} + K::kExpMax, x);
  constexpr Element kShift = K::kRound + K::kBias;  // leaves n + bias in the low bits
  const V shifted = clamped * Element(kLog2E) + kShift;
  const V n = shifted - kShift;
  const V p = exp_reduced(V((clamped - n * K::kLn2High) - n * K::kLn2Low));
  const Bits power = bit_cast<Bits>(shifted) << K::kMantissa;
  return select(underflow, V{}, p * bit_cast<V>(power));
}

// Natural logarithm of a normal positive number.
template <class V>
RISKMAP_HD V log(V x) {
  using Element = typename Traits<V>::Element;
  using Bits = typename Traits<V>::Bits;
  using K = Constants<Element>;
  const Bits bits = bit_cast<Bits>(x);
  const Bits exponent = (bits - K::kSqrtHalfBits) >> K::kMantissa;
  const V mantissa = bit_cast<V>(bits - (exponent << K::kMantissa));  // in [sqrt(1/2), sqrt(2))
  // The integer as a float without a conversion instruction: it sits in the low bits of kRound.
  const V e = bit_cast<V>(exponent + K::kRoundBits) - K::kRound;
  const V f = mantissa - Element(1);
  const V s = f / (f + Element(2));
  const V s2 = s * s;
  V series = V{} + Element(1.0 / (2 * K::kLogTerms - 1));
#pragma GCC unroll 14
  for (int i = K::kLogTerms - 2; i >= 0; --i) series = series * s2 + Element(1.0 / (2 * i + 1));
  const V result = e * K::kLn2High + (s * Element(2) * series + e * K::kLn2Low);
  return select(x == x, result, x);
}

// log(1 + x) for x in [0, 1], with full relative precision near 0: 2 artanh(x / (2 + x)).
template <class V>
RISKMAP_HD V log1p_unit(V x) {
  using Element = typename Traits<V>::Element;
  using K = Constants<Element>;
  const V s = x / (x + Element(2));
  const V s2 = s * s;
  V series = V{} + Element(1.0 / (2 * K::kLog1pTerms - 1));
#pragma GCC unroll 17
  for (int i = K::kLog1pTerms - 2; i >= 0; --i) series = series * s2 + Element(1.0 / (2 * i + 1));
  return s * Element(2) * series;
}

#endif

}  // namespace riskmap::math
