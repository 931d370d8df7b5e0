// float8_e4m3fn as storage: sign, 4 exponent bits (bias 7), 3 mantissa bits; 0x7f is NaN, there are no infinities. Reading
// is exact. Storing rounds to nearest even, saturates at 448 and has one NaN, 0x7f; the same bits on every set.
#pragma once

#include "common/integers.h"
#include "common/simd.h"

namespace glm5::cpu::GLM5_ISA {

struct e4m3 {
  uint8_t bits;
};

GLM5_INLINE float to_float(e4m3 x) {
  const uint32_t magnitude = x.bits & 0x7fu, sign = static_cast<uint32_t>(x.bits & 0x80u) << 24;
  uint32_t bits = (magnitude << 20) + (120u << 23);
  if (magnitude == 0x7f) bits = 0x7fc00000u;
  if (magnitude < 8) {
    const float subnormal = static_cast<float>(magnitude) * 0x1p-9f;
    std::memcpy(&bits, &subnormal, 4);
  }
  bits |= sign;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

// How codes are found: with 2^e the power of two below |x|, at least 2^-6, adding 2^(e + 20) makes the float unit round to a
// multiple of 2^(e - 3), which is e4m3's; the multiple is the difference of the two floats' bits, and 8 (e + 6) more is the
// code.

#if GLM5_ISA_LEVEL == 2

GLM5_INLINE F widen_e4m3(__m128i codes) {
  const __m512 subnormal = _mm512_setr_ps(0, 0x1p-9f, 0x2p-9f, 0x3p-9f, 0x4p-9f, 0x5p-9f, 0x6p-9f, 0x7p-9f, 0, 0, 0, 0, 0, 0,
                                          0, 0);
  const __m512i x = _mm512_cvtepu8_epi32(codes), magnitude = _mm512_and_si512(x, _mm512_set1_epi32(0x7f));
  __m512 y = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(magnitude, 20), _mm512_set1_epi32(120 << 23)));
  y = _mm512_mask_permutexvar_ps(y, _mm512_cmplt_epu32_mask(magnitude, _mm512_set1_epi32(8)), magnitude, subnormal);
  y = _mm512_mask_mov_ps(y, _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7f)),
                         _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
  // The sign, or (0xf8: a | (b & c)).
  return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(y), _mm512_slli_epi32(x, 24),
                                                        _mm512_set1_epi32(static_cast<int>(0x80000000u)), 0xf8))};
}
GLM5_INLINE F load(const e4m3* p) { return widen_e4m3(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
GLM5_INLINE F load_n(const e4m3* p, int64_t n) { return widen_e4m3(_mm_maskz_loadu_epi8(first_n(n), p)); }
// Codes of 32 bits. kBounded: of finite numbers that round to 448 at most.
template <bool kBounded>
GLM5_INLINE I codes_e4m3(F a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  __m512 value = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
  if (!kBounded) value = _mm512_min_ps(_mm512_set1_ps(448.f), value);  // NaN stays
  const __m512i exponent = _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7f800000));
  const __m512i above = _mm512_subs_epu16(exponent, _mm512_set1_epi32(121 << 23));  // the lower halves are zero
  const __m512i unit = _mm512_add_epi32(above, _mm512_set1_epi32(141 << 23));
  const __m512i sum = _mm512_castps_si512(_mm512_add_ps(value, _mm512_castsi512_ps(unit)));
  __m512i code = _mm512_add_epi32(_mm512_sub_epi32(sum, unit), _mm512_srli_epi32(above, 20));
  code = _mm512_ternarylogic_epi32(code, _mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80), 0xf8);
  if (kBounded) return {code};
  return {_mm512_mask_mov_epi32(code, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7f))};
}
GLM5_INLINE __m128i narrow_e4m3(F a) { return _mm512_cvtepi32_epi8(codes_e4m3<false>(a).v); }
GLM5_INLINE void store(e4m3* p, F a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_e4m3(a)); }
GLM5_INLINE void store_n(e4m3* p, F a, int64_t n) { _mm_mask_storeu_epi8(p, first_n(n), narrow_e4m3(a)); }

#elif GLM5_ISA_LEVEL == 1

GLM5_INLINE F load(const e4m3* p) {
  const __m256 subnormal = _mm256_setr_ps(0, 0x1p-9f, 0x2p-9f, 0x3p-9f, 0x4p-9f, 0x5p-9f, 0x6p-9f, 0x7p-9f);
  const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m256i magnitude = _mm256_and_si256(x, _mm256_set1_epi32(0x7f));
  __m256 y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(magnitude, 20), _mm256_set1_epi32(120 << 23)));
  y = _mm256_blendv_ps(y, _mm256_permutevar8x32_ps(subnormal, magnitude),
                       _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude)));
  y = _mm256_blendv_ps(y, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)),
                       _mm256_castsi256_ps(_mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7f))));
  const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(x, 24), _mm256_set1_epi32(static_cast<int>(0x80000000u)));
  return {_mm256_or_ps(y, _mm256_castsi256_ps(sign))};
}
GLM5_INLINE F load_n(const e4m3* p, int64_t n) {
  if (n >= 8) return load(p);
  e4m3 some[8] = {};
  for (int64_t i = 0; i < n; ++i) some[i] = p[i];
  return load(some);
}
// Codes of 32 bits. kBounded: of finite numbers that round to 448 at most.
template <bool kBounded>
GLM5_INLINE I codes_e4m3(F a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  __m256 value = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
  if (!kBounded) value = _mm256_min_ps(_mm256_set1_ps(448.f), value);  // NaN stays
  const __m256i exponent = _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(0x7f800000));
  const __m256i above = _mm256_subs_epu16(exponent, _mm256_set1_epi32(121 << 23));  // the lower halves are zero
  const __m256i unit = _mm256_add_epi32(above, _mm256_set1_epi32(141 << 23));
  const __m256i sum = _mm256_castps_si256(_mm256_add_ps(value, _mm256_castsi256_ps(unit)));
  __m256i code = _mm256_add_epi32(_mm256_sub_epi32(sum, unit), _mm256_srli_epi32(above, 20));
  code = _mm256_or_si256(code, _mm256_and_si256(_mm256_srli_epi32(bits, 24), _mm256_set1_epi32(0x80)));
  if (kBounded) return {code};
  return {_mm256_blendv_epi8(code, _mm256_set1_epi32(0x7f), _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)))};
}
GLM5_INLINE void store(e4m3* p, F a) {
  const __m256i code = codes_e4m3<false>(a).v;
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
GLM5_INLINE void store_n(e4m3* p, F a, int64_t n) {
  if (n >= 8) return store(p, a);
  e4m3 some[8];
  store(some, a);
  for (int64_t i = 0; i < n; ++i) p[i] = some[i];
}

#else

GLM5_INLINE F load_n(const e4m3* p, int64_t n) {
  F a{};
  for (int64_t i = 0; i < (n < 4 ? n : 4); ++i) a.v[i] = to_float(p[i]);
  return a;
}
GLM5_INLINE F load(const e4m3* p) { return load_n(p, 4); }
// Codes of 32 bits. kBounded: of finite numbers that round to 448 at most.
template <bool kBounded>
GLM5_INLINE I codes_e4m3(F a) {
  F::Ints bits;
  std::memcpy(&bits, &a.v, 16);
  F::Ints value = bits & 0x7fffffff;
  const F::Ints is_nan = value > 0x7f800000;
  if (!kBounded) value = value > 0x43e00000 ? F::Ints{} + 0x43e00000 : value;  // 448
  const F::Ints exponent = (value & 0x7f800000) - (121 << 23);
  const F::Ints above = exponent & (exponent > 0), unit_bits = above + (141 << 23);
  F::Native unit, number;
  std::memcpy(&unit, &unit_bits, 16);
  std::memcpy(&number, &value, 16);
  const F::Native sum = number + unit;
  F::Ints code;
  std::memcpy(&code, &sum, 16);
  code = (code - unit_bits + (above >> 20)) | ((bits >> 24) & 0x80);
  if (!kBounded) code = (code & ~is_nan) | (is_nan & 0x7f);
  return {code};
}
GLM5_INLINE void store_n(e4m3* p, F a, int64_t n) {
  const I codes = codes_e4m3<false>(a);
  for (int64_t i = 0; i < (n < 4 ? n : 4); ++i) p[i].bits = static_cast<uint8_t>(codes.v[i]);
}
GLM5_INLINE void store(e4m3* p, F a) { store_n(p, a, 4); }

#endif

}  // namespace glm5::cpu::GLM5_ISA
