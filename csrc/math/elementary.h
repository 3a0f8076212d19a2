// exp and log for CPU vectors (and CPU scalars); CUDA uses the device's own.
// NaN stays NaN. Errors: 1 to 2.5 ulp (exp in float beyond |x| = 20: up to 6), of which the mean is below 1.
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
RISKMAP_HD float exp_of_negative(float x) { return exp(x); }
RISKMAP_HD double exp_of_negative(double x) { return exp(x); }
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

// 1 / x of a normal number.
template <class V>
RISKMAP_HD V inverse(V x) {
  using Element = typename Traits<V>::Element;
#if defined(__AVX512F__)
  // An approximation to 14 bits and a step of Newton's: a division of 64 bytes would hold up everything else.
  if constexpr (sizeof(V) == 64 && sizeof(Element) == 4) {
    const V near = _mm512_rcp14_ps(x);
    return near + near * (Element(1) - x * near);
  }
#endif
  return V((V{} + Element(1)) / x);
}

template <class Element>
struct Constants;

// Polynomials in float are minimax, to 1e-7 of the result (exp) and 3e-8 of it (log, log1p), without a division.
template <>
struct Constants<float> {
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  static constexpr int32_t kRoundBits = 0x4b400000;
  static constexpr int kMantissa = 23;
  static constexpr int32_t kBias = 127;
#if defined(__FMA__)
  static constexpr float kLn2High = 0.693147182f, kLn2Low = 0;  // a product that is not rounded needs no second part
#else
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
#endif
  static constexpr float kExpMin = -87.3365f, kExpMax = 88.0f;
  static constexpr int32_t kLogFirstBits = 0x3f400000;  // 3/4
  static constexpr float kExp[] = {1.0f, 1.0f, 0.49999231f, 0.16667115f, 0.041890332f, 0.0083125023f};
  static constexpr float kLog[] = {-0.50000061f, 0.33333549f, -0.24993442f, 0.19977079f,
                                   -0.16822817f, 0.149839f,   -0.12067305f, 0.054131942f};
  static constexpr float kLog1p[] = {1.0f,        -0.49999493f, 0.33319097f,   -0.24842982f, 0.19106008f,
                                     -0.1366325f, 0.078226017f, -0.029505286f, 0.0052327076f};
};

template <>
struct Constants<double> {
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int64_t kRoundBits = 0x4338000000000000;
  static constexpr int kMantissa = 52;
  static constexpr int64_t kBias = 1023;
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kExpMin = -708.39, kExpMax = 709.0;
  static constexpr int64_t kLogFirstBits = 0x3fe6a09e667f3bcd;  // sqrt(1/2)
  // 1 / n!, the Taylor series of exp on [-ln 2 / 2, ln 2 / 2].
  static constexpr double kExp[] = {
      1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
      1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  static constexpr int kLogTerms = 11, kLog1pTerms = 17;
};

inline constexpr double kLog2E = 1.4426950408889634;

// The sum of c[i] x^i.
template <class V, class Element, int kTerms>
RISKMAP_HD V polynomial(V x, const Element (&c)[kTerms]) {
  V p = V{} + c[kTerms - 1];
#pragma GCC unroll 14
  for (int i = kTerms - 2; i >= 0; --i) p = p * x + c[i];
  return p;
}

// 2 artanh(s) from its first terms.
template <int kTerms, class V>
RISKMAP_HD V twice_artanh(V s) {
  using Element = typename Traits<V>::Element;
  const V s2 = s * s;
  V series = V{} + Element(1.0 / (2 * kTerms - 1));
#pragma GCC unroll 17
  for (int i = kTerms - 2; i >= 0; --i) series = series * s2 + Element(1.0 / (2 * i + 1));
  return s * Element(2) * series;
}

// e^x for x <= 0 (or NaN); 0 below the smallest normal result.
template <class V>
RISKMAP_HD V exp_of_negative(V x) {
  using Element = typename Traits<V>::Element;
  using Bits = typename Traits<V>::Bits;
  using K = Constants<Element>;
  constexpr Element kShift = K::kRound + K::kBias;  // leaves n + bias in the low bits
  const V shifted = x * Element(kLog2E) + kShift;
  const V n = shifted - kShift;
  V r = x - n * K::kLn2High;
  if constexpr (K::kLn2Low != 0) r = r - n * K::kLn2Low;
  const V p = polynomial(r, K::kExp);
#if defined(__AVX512F__)
  // The same with its instruction for scaling by a power of two.
  if constexpr (sizeof(V) == 64 && sizeof(Element) == 4)
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, V{} + K::kExpMin, _CMP_NLT_UQ), p, n);
#endif
  const Bits power = bit_cast<Bits>(shifted) << K::kMantissa;
  return select(x < K::kExpMin, V{}, V(p * bit_cast<V>(power)));
}

// e^x; what is above e^kExpMax becomes that.
template <class V>
RISKMAP_HD V exp(V x) {
  return exp_of_negative(minimum(V(V{} + Constants<typename Traits<V>::Element>::kExpMax), x));
}

// log of 2^e (1 + f).
template <class V>
RISKMAP_HD V log_of_parts(V e, V f) {
  using Element = typename Traits<V>::Element;
  using K = Constants<Element>;
  V low;
  if constexpr (sizeof(Element) == 4) {
    low = f + f * f * polynomial(f, K::kLog);
  } else {
    low = twice_artanh<K::kLogTerms>(V(f / (f + Element(2))));
  }
  if constexpr (K::kLn2Low != 0) low = low + e * K::kLn2Low;
  return e * K::kLn2High + low;
}

// Natural logarithm of a normal positive number.
template <class V>
RISKMAP_HD V log(V x) {
  using Element = typename Traits<V>::Element;
  using Bits = typename Traits<V>::Bits;
  using K = Constants<Element>;
#if defined(__AVX512F__)
  // The same with its instructions for exponent and mantissa.
  if constexpr (sizeof(V) == 64 && sizeof(Element) == 4) {
    const V mantissa = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
    return log_of_parts(V(V(_mm512_getexp_ps(x)) - V(_mm512_getexp_ps(mantissa))), V(mantissa - Element(1)));
  }
#endif
  const Bits bits = bit_cast<Bits>(x);
  const Bits exponent = (bits - K::kLogFirstBits) >> K::kMantissa;
  const V mantissa = bit_cast<V>(bits - (exponent << K::kMantissa));  // in [first, 2 first)
  // The integer as a float without a conversion instruction: it sits in the low bits of kRound.
  const V e = bit_cast<V>(exponent + K::kRoundBits) - K::kRound;
  return select(x == x, log_of_parts(e, V(mantissa - Element(1))), x);
}

// log(1 + x) for x in [0, 1], with full relative precision near 0.
template <class V>
RISKMAP_HD V log1p_unit(V x) {
  using Element = typename Traits<V>::Element;
  using K = Constants<Element>;
  if constexpr (sizeof(Element) == 4) {
    return x * polynomial(x, K::kLog1p);
  } else {
    return twice_artanh<K::kLog1pTerms>(V(x / (x + Element(2))));
  }
}

#endif

}  // namespace riskmap::math
