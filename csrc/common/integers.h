// I: as many 32-bit integers as a vector has floats, for codes; how they are stored in a byte each, or two to a byte.
// Storing four at once costs a third of storing one four times.
#pragma once

#include "common/simd.h"

namespace glm5::cpu::GLM5_ISA {

#if GLM5_ISA_LEVEL == 2

struct I {
  __m512i v;
};
GLM5_INLINE I to_integers(F x) { return {_mm512_cvtps_epi32(x.v)}; }  // ties to even
GLM5_INLINE F to_floats(I x) { return {_mm512_cvtepi32_ps(x.v)}; }
GLM5_INLINE I splat_integer(int x) { return {_mm512_set1_epi32(x)}; }
GLM5_INLINE I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
GLM5_INLINE I operator-(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
GLM5_INLINE I operator^(I a, I b) { return {_mm512_xor_si512(a.v, b.v)}; }
GLM5_INLINE I operator&(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
GLM5_INLINE I at_most(I x, int high) { return {_mm512_min_epi32(x.v, _mm512_set1_epi32(high))}; }
GLM5_INLINE I within(I x, int low, int high) {
  return {_mm512_min_epi32(_mm512_max_epi32(x.v, _mm512_set1_epi32(low)), _mm512_set1_epi32(high))};
}
GLM5_INLINE void store_bytes(int8_t* p, I x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.v)); }
// Two to a byte, the even one in the low nibble.
GLM5_INLINE void store_nibbles(uint8_t* p, I x) {
  const __m512i nibbles = _mm512_and_si512(x.v, _mm512_set1_epi32(15));
  const __m512i pairs = _mm512_or_si512(nibbles, _mm512_srli_epi64(nibbles, 28));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm512_cvtepi64_epi8(pairs));
}
GLM5_INLINE I load_nibbles(const uint8_t* p) {
  const __m512i pairs = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return {_mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi64(pairs, 28)), _mm512_set1_epi32(15))};
}

// The 64 lowest bytes in order, where packing pairs of vectors has put dword v of 128-bit lane l: 4 v + l from 4 l + v.
GLM5_INLINE __m512i in_order(__m512i x) {
  const __m512i from = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(from, x);
}
GLM5_INLINE void store_bytes(int8_t* p, I a, I b, I c, I d) {
  const __m512i ab = _mm512_packs_epi32(a.v, b.v), cd = _mm512_packs_epi32(c.v, d.v);
  _mm512_storeu_si512(p, in_order(_mm512_packs_epi16(ab, cd)));
}
GLM5_INLINE void store_bytes(uint8_t* p, I a, I b, I c, I d) {
  const __m512i ab = _mm512_packus_epi32(a.v, b.v), cd = _mm512_packus_epi32(c.v, d.v);
  _mm512_storeu_si512(p, in_order(_mm512_packus_epi16(ab, cd)));
}
GLM5_INLINE void store_nibbles(uint8_t* p, I a, I b, I c, I d) {
  const __m512i ab = _mm512_packs_epi32(a.v, b.v), cd = _mm512_packs_epi32(c.v, d.v);
  const __m512i codes = _mm512_and_si512(_mm512_packs_epi16(ab, cd), _mm512_set1_epi8(15));
  const __m512i pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(0x1001));  // even + 16 odd
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi16_epi8(in_order(pairs)));
}

#elif GLM5_ISA_LEVEL == 1

struct I {
  __m256i v;
};
GLM5_INLINE I to_integers(F x) { return {_mm256_cvtps_epi32(x.v)}; }
GLM5_INLINE F to_floats(I x) { return {_mm256_cvtepi32_ps(x.v)}; }
GLM5_INLINE I splat_integer(int x) { return {_mm256_set1_epi32(x)}; }
GLM5_INLINE I operator+(I a, I b) { return {_mm256_add_epi32(a.v, b.v)}; }
GLM5_INLINE I operator-(I a, I b) { return {_mm256_sub_epi32(a.v, b.v)}; }
GLM5_INLINE I operator^(I a, I b) { return {_mm256_xor_si256(a.v, b.v)}; }
GLM5_INLINE I operator&(I a, I b) { return {_mm256_and_si256(a.v, b.v)}; }
GLM5_INLINE I at_most(I x, int high) { return {_mm256_min_epi32(x.v, _mm256_set1_epi32(high))}; }
GLM5_INLINE I within(I x, int low, int high) {
  return {_mm256_min_epi32(_mm256_max_epi32(x.v, _mm256_set1_epi32(low)), _mm256_set1_epi32(high))};
}
GLM5_INLINE void store_bytes(int8_t* p, I x) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
GLM5_INLINE void store_nibbles(uint8_t* p, I x) {
  const __m256i nibbles = _mm256_and_si256(x.v, _mm256_set1_epi32(15));
  const __m256i pairs = _mm256_or_si256(nibbles, _mm256_srli_epi64(nibbles, 28));
  // Byte 0 of each 64-bit lane.
  const __m128i low = _mm256_castsi256_si128(pairs), high = _mm256_extracti128_si256(pairs, 1);
  const __m128i words = _mm_castps_si128(_mm_shuffle_ps(_mm_castsi128_ps(low), _mm_castsi128_ps(high), 0x88));
  const __m128i bytes = _mm_shuffle_epi8(words, _mm_set1_epi32(0x0c080400));
  const int32_t four = _mm_cvtsi128_si32(bytes);
  std::memcpy(p, &four, 4);
}
GLM5_INLINE I load_nibbles(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  const __m256i pairs = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
  return {_mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi64(pairs, 28)), _mm256_set1_epi32(15))};
}

// The same for two 128-bit lanes.
GLM5_INLINE __m256i in_order(__m256i x) { return _mm256_permutevar8x32_epi32(x, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)); }
GLM5_INLINE void store_bytes(int8_t* p, I a, I b, I c, I d) {
  const __m256i ab = _mm256_packs_epi32(a.v, b.v), cd = _mm256_packs_epi32(c.v, d.v);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), in_order(_mm256_packs_epi16(ab, cd)));
}
GLM5_INLINE void store_bytes(uint8_t* p, I a, I b, I c, I d) {
  const __m256i ab = _mm256_packus_epi32(a.v, b.v), cd = _mm256_packus_epi32(c.v, d.v);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), in_order(_mm256_packus_epi16(ab, cd)));
}
GLM5_INLINE void store_nibbles(uint8_t* p, I a, I b, I c, I d) {
  const __m256i ab = _mm256_packs_epi32(a.v, b.v), cd = _mm256_packs_epi32(c.v, d.v);
  const __m256i codes = _mm256_and_si256(_mm256_packs_epi16(ab, cd), _mm256_set1_epi8(15));
  const __m256i pairs = in_order(_mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x1001)));  // even + 16 odd
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
}

#else

struct I {
  F::Ints v;
};
GLM5_INLINE I to_integers(F x) {
  I r;
  for (int i = 0; i < 4; ++i) r.v[i] = static_cast<int32_t>(__builtin_lrintf(x.v[i]));
  return r;
}
GLM5_INLINE F to_floats(I x) {
  F r;
  for (int i = 0; i < 4; ++i) r.v[i] = static_cast<float>(x.v[i]);
  return r;
}
GLM5_INLINE I splat_integer(int x) { return {F::Ints{x, x, x, x}}; }
GLM5_INLINE I operator+(I a, I b) { return {a.v + b.v}; }
GLM5_INLINE I operator-(I a, I b) { return {a.v - b.v}; }
GLM5_INLINE I operator^(I a, I b) { return {a.v ^ b.v}; }
GLM5_INLINE I operator&(I a, I b) { return {a.v & b.v}; }
GLM5_INLINE I at_most(I x, int high) {
  const F::Ints h = {high, high, high, high};
  return {x.v > h ? h : x.v};
}
GLM5_INLINE I within(I x, int low, int high) {
  const F::Ints l = {low, low, low, low}, h = {high, high, high, high};
  x.v = x.v < l ? l : x.v;
  return {x.v > h ? h : x.v};
}
GLM5_INLINE void store_bytes(int8_t* p, I x) {
  for (int i = 0; i < 4; ++i) p[i] = static_cast<int8_t>(x.v[i]);
}
GLM5_INLINE void store_nibbles(uint8_t* p, I x) {
  for (int i = 0; i < 2; ++i) p[i] = static_cast<uint8_t>((x.v[2 * i] & 15) | (x.v[2 * i + 1] & 15) << 4);
}
GLM5_INLINE I load_nibbles(const uint8_t* p) { return {F::Ints{p[0] & 15, p[0] >> 4, p[1] & 15, p[1] >> 4}}; }

template <class Byte>
GLM5_INLINE void store_bytes(Byte* p, I a, I b, I c, I d) {
  const I four[4] = {a, b, c, d};
  for (int i = 0; i < 16; ++i) p[i] = static_cast<Byte>(four[i / 4].v[i % 4]);
}
GLM5_INLINE void store_nibbles(uint8_t* p, I a, I b, I c, I d) {
  store_nibbles(p, a), store_nibbles(p + 2, b), store_nibbles(p + 4, c), store_nibbles(p + 6, d);
}

#endif

}  // namespace glm5::cpu::GLM5_ISA
