// Vectors of float (and, in the portable set, double) with one spelling for every instruction set, so that a kernel is
// written once. Compiled once per set inside namespace glm5::cpu::GLM5_ISA. Everything is exact IEEE arithmetic except
// that `fma` rounds twice where the set has no fused multiply-add; -ffp-contract=off keeps the compiler from fusing
// anything by itself, so an expression gives the same bits in every loop it is inlined into.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "common/bf16.h"

#ifndef GLM5_ISA
#error "compile with -DGLM5_ISA=portable|avx2|avx512 and -DGLM5_ISA_LEVEL=0|1|2"
#endif

#if GLM5_ISA_LEVEL > 0
#include <immintrin.h>
#endif

#define GLM5_INLINE inline __attribute__((always_inline))

namespace glm5::cpu::GLM5_ISA {

GLM5_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
GLM5_INLINE float to_float(float x) { return x; }
GLM5_INLINE double to_float(double x) { return x; }

GLM5_INLINE bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fc0};  // NaN
  return bf16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// ---- F: a vector of kLanes floats ---------------------------------------------------------------------------------

#if GLM5_ISA_LEVEL == 2

struct F {
  static constexpr int kLanes = 16;
  using Scalar = float;
  __m512 v;
};
GLM5_INLINE __mmask16 first_n(int64_t n) { return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1u); }
GLM5_INLINE F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
GLM5_INLINE F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
GLM5_INLINE F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
GLM5_INLINE F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
GLM5_INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }   // a * b + c
GLM5_INLINE F fnma(F a, F b, F c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a * b
GLM5_INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }  // the second where either is NaN
GLM5_INLINE F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
GLM5_INLINE F sqrt(F a) { return {_mm512_sqrt_ps(a.v)}; }
GLM5_INLINE F load(const float* p) { return {_mm512_loadu_ps(p)}; }
GLM5_INLINE F load_n(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first_n(n), p)}; }
GLM5_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
GLM5_INLINE void store_n(float* p, F a, int64_t n) { _mm512_mask_storeu_ps(p, first_n(n), a.v); }
GLM5_INLINE F widen(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
GLM5_INLINE F load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
GLM5_INLINE F load_n(const bf16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(first_n(n), p)); }
GLM5_INLINE __m256i narrow(F a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(rounded);
}
GLM5_INLINE void store(bf16* p, F a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
GLM5_INLINE void store_n(bf16* p, F a, int64_t n) { _mm256_mask_storeu_epi16(p, first_n(n), narrow(a)); }
// Sum and maximum over the lanes by halving: lane i meets lane i + kLanes/2, then i + kLanes/4, ...
GLM5_INLINE float sum(F a) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a.v),
                                 _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
GLM5_INLINE float max_lane(F a) {
  const __m256 h = _mm256_max_ps(_mm512_castps512_ps256(a.v),
                                 _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)));
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
// a where x < y, else b; a comparison with NaN is false.
GLM5_INLINE F where_lt(F x, F y, F a, F b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_LT_OQ), b.v, a.v)};
}
// x * 2^n for integral n, with correct overflow to infinity and gradual underflow.
GLM5_INLINE F scale_by_power_of_two(F x, F n) { return {_mm512_scalef_ps(x.v, n.v)}; }
GLM5_INLINE F round_to_integer(F x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

#elif GLM5_ISA_LEVEL == 1

struct F {
  static constexpr int kLanes = 8;
  using Scalar = float;
  __m256 v;
};
GLM5_INLINE __m256i first_n(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n < 8 ? n : 8)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
GLM5_INLINE F operator+(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
GLM5_INLINE F operator-(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
GLM5_INLINE F operator*(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
GLM5_INLINE F operator/(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
GLM5_INLINE F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
GLM5_INLINE F fnma(F a, F b, F c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
GLM5_INLINE F max(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
GLM5_INLINE F min(F a, F b) { return {_mm256_min_ps(a.v, b.v)}; }
GLM5_INLINE F sqrt(F a) { return {_mm256_sqrt_ps(a.v)}; }
GLM5_INLINE F load(const float* p) { return {_mm256_loadu_ps(p)}; }
GLM5_INLINE F load_n(const float* p, int64_t n) { return n >= 8 ? load(p) : F{_mm256_maskload_ps(p, first_n(n))}; }
GLM5_INLINE void store(float* p, F a) { _mm256_storeu_ps(p, a.v); }
GLM5_INLINE void store_n(float* p, F a, int64_t n) {
  if (n >= 8) return store(p, a);
  _mm256_maskstore_ps(p, first_n(n), a.v);
}
GLM5_INLINE F widen(__m128i h) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))}; }
GLM5_INLINE F load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
GLM5_INLINE F load_n(const bf16* p, int64_t n) {
  if (n >= 8) return load(p);
  alignas(16) uint16_t h[8] = {};
  for (int64_t i = 0; i < n; ++i) h[i] = p[i].bits;
  return widen(_mm_load_si128(reinterpret_cast<const __m128i*>(h)));
}
GLM5_INLINE __m128i narrow(F a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0),
                               _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)));
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
GLM5_INLINE void store(bf16* p, F a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a)); }
GLM5_INLINE void store_n(bf16* p, F a, int64_t n) {
  if (n >= 8) return store(p, a);
  alignas(16) uint16_t h[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(h), narrow(a));
  for (int64_t i = 0; i < n; ++i) p[i].bits = h[i];
}
GLM5_INLINE float sum(F a) {
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
GLM5_INLINE float max_lane(F a) {
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
GLM5_INLINE F where_lt(F x, F y, F a, F b) { return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(x.v, y.v, _CMP_LT_OQ))}; }
GLM5_INLINE F scale_by_power_of_two(F x, F n) {
  // In two steps, since 2^n alone may lie outside the exponent range; both factors are clamped into it.
  const __m256i e = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(n.v, _mm256_set1_ps(-252)), _mm256_set1_ps(252)));
  const __m256i half = _mm256_srai_epi32(e, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(e, half), bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(x.v, a), b)};
}
GLM5_INLINE F round_to_integer(F x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

#else  // portable: GCC/Clang vector extensions, four lanes

struct F {
  static constexpr int kLanes = 4;
  using Scalar = float;
  typedef float Native __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  Native v;
};
GLM5_INLINE F operator+(F a, F b) { return {a.v + b.v}; }
GLM5_INLINE F operator-(F a, F b) { return {a.v - b.v}; }
GLM5_INLINE F operator*(F a, F b) { return {a.v * b.v}; }
GLM5_INLINE F operator/(F a, F b) { return {a.v / b.v}; }
GLM5_INLINE F fma(F a, F b, F c) { return {a.v * b.v + c.v}; }
GLM5_INLINE F fnma(F a, F b, F c) { return {c.v - a.v * b.v}; }
GLM5_INLINE F max(F a, F b) { return {a.v > b.v ? a.v : b.v}; }
GLM5_INLINE F min(F a, F b) { return {a.v < b.v ? a.v : b.v}; }
GLM5_INLINE F sqrt(F a) {
  F r;
  for (int i = 0; i < 4; ++i) r.v[i] = __builtin_sqrtf(a.v[i]);
  return r;
}
GLM5_INLINE F load(const float* p) {
  F a;
  std::memcpy(&a.v, p, 16);
  return a;
}
GLM5_INLINE F load_n(const float* p, int64_t n) {
  if (n >= 4) return load(p);
  F a{};
  for (int64_t i = 0; i < n; ++i) a.v[i] = p[i];
  return a;
}
GLM5_INLINE void store(float* p, F a) { std::memcpy(p, &a.v, 16); }
GLM5_INLINE void store_n(float* p, F a, int64_t n) {
  if (n >= 4) return store(p, a);
  for (int64_t i = 0; i < n; ++i) p[i] = a.v[i];
}
GLM5_INLINE F load(const bf16* p) {
  F a;
  for (int i = 0; i < 4; ++i) a.v[i] = to_float(p[i]);
  return a;
}
GLM5_INLINE F load_n(const bf16* p, int64_t n) {
  F a{};
  for (int64_t i = 0; i < (n < 4 ? n : 4); ++i) a.v[i] = to_float(p[i]);
  return a;
}
GLM5_INLINE void store_n(bf16* p, F a, int64_t n) {
  for (int64_t i = 0; i < (n < 4 ? n : 4); ++i) p[i] = to_bf16(a.v[i]);
}
GLM5_INLINE void store(bf16* p, F a) { store_n(p, a, 4); }
GLM5_INLINE float sum(F a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
GLM5_INLINE float max_lane(F a) {
  const float x = a.v[0] > a.v[2] ? a.v[0] : a.v[2], y = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return x > y ? x : y;
}
GLM5_INLINE F where_lt(F x, F y, F a, F b) { return {x.v < y.v ? a.v : b.v}; }
GLM5_INLINE F scale_by_power_of_two(F x, F n) {
  F r;
  for (int i = 0; i < 4; ++i) r.v[i] = __builtin_ldexpf(x.v[i], static_cast<int>(n.v[i]));
  return r;
}
GLM5_INLINE F round_to_integer(F x) {
  // 1.5 * 2^23 pushes the fraction out of the mantissa; |x| < 2^22 is all that its users need.
  typename F::Native magic = {12582912.f, 12582912.f, 12582912.f, 12582912.f};
  return {(x.v + magic) - magic};
}

// D: two doubles, in the portable set only.
struct D {
  static constexpr int kLanes = 2;
  using Scalar = double;
  typedef double Native __attribute__((vector_size(16)));
  Native v;
};
GLM5_INLINE D operator+(D a, D b) { return {a.v + b.v}; }
GLM5_INLINE D operator-(D a, D b) { return {a.v - b.v}; }
GLM5_INLINE D operator*(D a, D b) { return {a.v * b.v}; }
GLM5_INLINE D operator/(D a, D b) { return {a.v / b.v}; }
GLM5_INLINE D fma(D a, D b, D c) { return {a.v * b.v + c.v}; }
GLM5_INLINE D fnma(D a, D b, D c) { return {c.v - a.v * b.v}; }
GLM5_INLINE D max(D a, D b) { return {a.v > b.v ? a.v : b.v}; }
GLM5_INLINE D min(D a, D b) { return {a.v < b.v ? a.v : b.v}; }
GLM5_INLINE D sqrt(D a) { return {D::Native{__builtin_sqrt(a.v[0]), __builtin_sqrt(a.v[1])}}; }
GLM5_INLINE D load(const double* p) {
  D a;
  std::memcpy(&a.v, p, 16);
  return a;
}
GLM5_INLINE D load_n(const double* p, int64_t n) {
  D a{};
  for (int64_t i = 0; i < (n < 2 ? n : 2); ++i) a.v[i] = p[i];
  return a;
}
GLM5_INLINE void store(double* p, D a) { std::memcpy(p, &a.v, 16); }
GLM5_INLINE void store_n(double* p, D a, int64_t n) {
  for (int64_t i = 0; i < (n < 2 ? n : 2); ++i) p[i] = a.v[i];
}
GLM5_INLINE double sum(D a) { return a.v[0] + a.v[1]; }
GLM5_INLINE double max_lane(D a) { return a.v[0] > a.v[1] ? a.v[0] : a.v[1]; }
GLM5_INLINE D where_lt(D x, D y, D a, D b) { return {x.v < y.v ? a.v : b.v}; }
GLM5_INLINE D exp(D x) { return {D::Native{__builtin_exp(x.v[0]), __builtin_exp(x.v[1])}}; }
template <class V>
GLM5_INLINE V splat(typename V::Scalar x);
template <>
GLM5_INLINE D splat<D>(double x) {
  return {D::Native{x, x}};
}

#endif

#if GLM5_ISA_LEVEL == 2
template <class V>
GLM5_INLINE V splat(typename V::Scalar x);
template <>
GLM5_INLINE F splat<F>(float x) {
  return {_mm512_set1_ps(x)};
}
#elif GLM5_ISA_LEVEL == 1
template <class V>
GLM5_INLINE V splat(typename V::Scalar x);
template <>
GLM5_INLINE F splat<F>(float x) {
  return {_mm256_set1_ps(x)};
}
#else
template <>
GLM5_INLINE F splat<F>(float x) {
  return {F::Native{x, x, x, x}};
}
#endif

// e^x = 2^n m for |x| < 89 or so, NaN for NaN: n, a whole number, and m, about 1 ulp. Cody-Waite reduction by n ln 2, then the
// degree-6 polynomial of Cephes' expf on |r| <= ln(2)/2.
GLM5_INLINE F exp_mantissa(F x, F* n) {
  *n = round_to_integer(x * splat<F>(1.44269504088896341f));
  F r = fnma(*n, splat<F>(0.693359375f), x);
  r = fnma(*n, splat<F>(-2.12194440e-4f), r);
  F p = splat<F>(1.9875691500e-4f);
  p = fma(p, r, splat<F>(1.3981999507e-3f));
  p = fma(p, r, splat<F>(8.3334519073e-3f));
  p = fma(p, r, splat<F>(4.1665795894e-2f));
  p = fma(p, r, splat<F>(1.6666665459e-1f));
  p = fma(p, r, splat<F>(5.0000001201e-1f));
  return fma(p, r * r, r + splat<F>(1.f));
}

// Below, e^x is no normal number.
inline constexpr float kLowestExponent = -87.336544f;

// e^x, about 1 ulp; exactly 0 below -87.34 (and for -inf), +inf above 88.73, NaN for NaN.
GLM5_INLINE F exp(F x) {
  const F lowest = splat<F>(kLowestExponent);
  // NaN survives: max/min return the second operand where either is NaN.
  F n;
  const F m = exp_mantissa(max(lowest, min(splat<F>(89.f), x)), &n);
  return where_lt(x, lowest, splat<F>(0.f), scale_by_power_of_two(m, n));
}

// The natural logarithm of normal positive numbers, about 1 ulp; of +inf and NaN, some large number or NaN. x = m 2^e with m in
// [sqrt(1/2), sqrt(2)), then the polynomial of Cephes' logf in m - 1.
GLM5_INLINE F log(F x) {
  F m, e;
#if GLM5_ISA_LEVEL == 2
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i power = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f3504f3)), 23);
  m.v = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(power, 23)));
  e.v = _mm512_cvtepi32_ps(power);
#elif GLM5_ISA_LEVEL == 1
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i power = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f3504f3)), 23);
  m.v = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(power, 23)));
  e.v = _mm256_cvtepi32_ps(power);
#else
  F::Ints bits;
  std::memcpy(&bits, &x.v, 16);
  const F::Ints power = (bits - 0x3f3504f3) >> 23;
  bits = bits - (power << 23);
  std::memcpy(&m.v, &bits, 16);
  for (int i = 0; i < 4; ++i) e.v[i] = static_cast<float>(power[i]);
#endif
  const F f = m - splat<F>(1.f), z = f * f;
  F p = splat<F>(7.0376836292e-2f);
  p = fma(p, f, splat<F>(-1.1514610310e-1f));
  p = fma(p, f, splat<F>(1.1676998740e-1f));
  p = fma(p, f, splat<F>(-1.2420140846e-1f));
  p = fma(p, f, splat<F>(1.4249322787e-1f));
  p = fma(p, f, splat<F>(-1.6668057665e-1f));
  p = fma(p, f, splat<F>(2.0000714765e-1f));
  p = fma(p, f, splat<F>(-2.4999993993e-1f));
  p = fma(p, f, splat<F>(3.3333331174e-1f));
  p = fma(e, splat<F>(-2.12194440e-4f), p * f * z);
  p = fnma(splat<F>(0.5f), z, p);
  return fma(e, splat<F>(0.693359375f), f + p);
}
#if GLM5_ISA_LEVEL == 0
GLM5_INLINE D log(D x) { return {D::Native{__builtin_log(x.v[0]), __builtin_log(x.v[1])}}; }
#endif

// The vector type that computes for storage type T: F for bf16 and float, D for double.
template <class T>
struct VectorFor {
  using Type = F;
};
#if GLM5_ISA_LEVEL == 0
template <>
struct VectorFor<double> {
  using Type = D;
};
#endif
template <class T>
using Vector = typename VectorFor<T>::Type;
// The scalar type that accumulates for storage type T.
template <class T>
using Acc = typename Vector<T>::Scalar;

template <class T>
GLM5_INLINE T round_to(Acc<T> x);
template <>
GLM5_INLINE bf16 round_to<bf16>(float x) {
  return to_bf16(x);
}
template <>
GLM5_INLINE float round_to<float>(float x) {
  return x;
}
#if GLM5_ISA_LEVEL == 0
template <>
GLM5_INLINE double round_to<double>(double x) {
  return x;
}
#endif

// The vector after a trip through storage type T: what a later reader of a stored value would see.
template <class T>
GLM5_INLINE Vector<T> through_storage(Vector<T> x) {
  if constexpr (sizeof(T) == 2) {
    T stored[Vector<T>::kLanes];
    store(stored, x);
    return load(stored);
  } else {
    return x;
  }
}

}  // namespace glm5::cpu::GLM5_ISA
