// What every op that quantises shares: the largest magnitude of a run, and the scale and codes in FP8 or int8 that follow
// from it (python/glm5/reference/quantize.py). Exact: the same bits on every set.
#pragma once

#include "common/e4m3.h"
#include "common/integers.h"

namespace glm5::cpu::GLM5_ISA {

GLM5_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
GLM5_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
GLM5_INLINE uint32_t magnitude_bits(float x) { return bits_of(x) & 0x7fffffffu; }
GLM5_INLINE uint32_t magnitude_bits(bf16 x) { return static_cast<uint32_t>(x.bits & 0x7fffu) << 16; }

// The largest magnitude among what was added, 0 of nothing, NaN if a NaN was. Magnitudes are compared as integers, which
// orders them as numbers and NaN above all.
template <class T>
struct LargestMagnitude {
#if GLM5_ISA_LEVEL == 2
  __m512i lanes = _mm512_setzero_si512();
  GLM5_INLINE void add(const float* p, int64_t n) {
    for (int64_t i = 0; i < n; i += 16)
      lanes = _mm512_max_epu32(
          lanes, _mm512_and_si512(_mm512_maskz_loadu_epi32(first_n(n - i), p + i), _mm512_set1_epi32(0x7fffffff)));
  }
  GLM5_INLINE void add(const bf16* p, int64_t n) {
    for (int64_t i = 0; i < n; i += 32) {
      const __mmask32 there = n - i >= 32 ? 0xffffffffu : (1u << (n - i)) - 1u;
      lanes = _mm512_max_epu16(lanes, _mm512_and_si512(_mm512_maskz_loadu_epi16(there, p + i), _mm512_set1_epi16(0x7fff)));
    }
  }
  GLM5_INLINE float value() const {
    const __m512i low = sizeof(T) == 2 ? _mm512_slli_epi32(lanes, 16) : lanes;
    return finish(_mm512_reduce_max_epu32(_mm512_max_epu32(low, lanes)));
  }
#else
  uint32_t largest = 0;
#if GLM5_ISA_LEVEL == 1
  __m256i lanes = _mm256_setzero_si256();
  GLM5_INLINE void add(const float* p, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
      lanes = _mm256_max_epu32(lanes, _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i)),
                                                       _mm256_set1_epi32(0x7fffffff)));
    add_each(p + i, n - i);
  }
  GLM5_INLINE void add(const bf16* p, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
      lanes = _mm256_max_epu16(
          lanes, _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i)), _mm256_set1_epi16(0x7fff)));
    add_each(p + i, n - i);
  }
  GLM5_INLINE float value() const {
    const __m256i low = sizeof(T) == 2 ? _mm256_max_epu32(_mm256_slli_epi32(lanes, 16), lanes) : lanes;
    __m128i q = _mm_max_epu32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    q = _mm_max_epu32(q, _mm_shuffle_epi32(q, 0x4e));
    q = _mm_max_epu32(q, _mm_shuffle_epi32(q, 0xb1));
    const uint32_t lane = static_cast<uint32_t>(_mm_cvtsi128_si32(q)) & (sizeof(T) == 2 ? 0xffff0000u : 0xffffffffu);
    return finish(lane > largest ? lane : largest);
  }
#else
  GLM5_INLINE void add(const T* p, int64_t n) { add_each(p, n); }
  GLM5_INLINE float value() const { return finish(largest); }
#endif
  GLM5_INLINE void add_each(const T* p, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t bits = magnitude_bits(p[i]);
      largest = bits > largest ? bits : largest;
    }
  }
#endif

 private:
  GLM5_INLINE static float finish(uint32_t bits) {
    if (sizeof(T) == 2) bits &= 0xffff0000u;
    return float_of(bits > 0x7f800000u ? 0x7fc00000u : bits);
  }
};

template <class T>
GLM5_INLINE float largest_magnitude(const T* p, int64_t n) {
  LargestMagnitude<T> largest;
  largest.add(p, n);
  return largest.value();
}

// max(amax, 1e-4) / 448, rounded up to a power of two if asked; NaN of NaN, inf of inf.
GLM5_INLINE float fp8_scale(float amax, bool power_of_two) {
  const float scale = (amax < 1e-4f ? 1e-4f : amax) / 448.f;
  if (!power_of_two || bits_of(scale) >= 0x7f800000u) return scale;
  return float_of((bits_of(scale) + 0x7fffffu) & 0xff800000u);
}

// ---- codes ----

// The largest magnitudes of so many blocks are found before the first block is encoded: the way from a block's numbers to
// its scale is long, and the processor walks several at once.
constexpr int64_t kBlocksAhead = 16;

GLM5_INLINE bool is_finite(float x) { return magnitude_bits(x) < 0x7f800000u; }

// Whether `ratio` may multiply: 2^-80 <= scale < 2^121. Then nothing that bears on a code underflows or overflows.
GLM5_INLINE bool inverse_serves(float scale) { return GLM5_ISA_LEVEL > 0 && bits_of(scale) - (47u << 23) < (201u << 23); }

// x / scale, rounded once. kByInverse multiplies with inverse = 1 / scale, rounded, and corrects twice, which costs half the
// time of a division: the first correction comes within a unit of the last place, from where the second gives the rounded
// quotient (Markstein, IBM J. Res. Dev. 34, 1990), but for the sign of a zero.
template <bool kByInverse>
GLM5_INLINE F ratio(F x, F scale, F inverse) {
  if constexpr (kByInverse) {
    F q = x * inverse;
    q = fma(fnma(q, scale, x), inverse, q);
    return fma(fnma(q, scale, x), inverse, q);
  } else {
    return x / scale;
  }
}

// x / scale as e4m3 codes of 32 bits; the scale is finite, and x no larger than the block's largest magnitude.
GLM5_INLINE I quotient_codes(F x, F scale) { return codes_e4m3<true>(x / scale); }

#if GLM5_ISA_LEVEL == 2
// The same by products, where `inverse_serves`; zeros get their sign back.
GLM5_INLINE I product_codes(F x, F scale, F inverse) {
  const __m512i magnitude = _mm512_castps_si512(ratio<true>(x, scale, inverse).v);
  const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  const __m512i value = _mm512_ternarylogic_epi32(magnitude, _mm512_castps_si512(x.v), sign, 0xf8);  // a | (b & c)
  return codes_e4m3<true>({_mm512_castsi512_ps(value)});
}
#endif

// codes[i] = e4m3(x[i] / scale).
template <class T>
GLM5_INLINE void encode_fp8(const T* x, int64_t n, float scale, e4m3* codes) {
  constexpr int64_t kLanes = F::kLanes;
  const F s = splat<F>(scale);
  int64_t i = 0;
#if GLM5_ISA_LEVEL == 2
  // Half of the quotients come from the divider and half from products: then both are busy.
  const F y = splat<F>(1.f / scale);
  if (inverse_serves(scale))
    for (; i + 4 * kLanes <= n; i += 4 * kLanes)
      store_bytes(&codes[i].bits, product_codes(load(x + i), s, y), quotient_codes(load(x + i + kLanes), s),
                  product_codes(load(x + i + 2 * kLanes), s, y), quotient_codes(load(x + i + 3 * kLanes), s));
#endif
  if (is_finite(scale))
    for (; i + 4 * kLanes <= n; i += 4 * kLanes)
      store_bytes(&codes[i].bits, quotient_codes(load(x + i), s), quotient_codes(load(x + i + kLanes), s),
                  quotient_codes(load(x + i + 2 * kLanes), s), quotient_codes(load(x + i + 3 * kLanes), s));
  for (; i < n; i += kLanes) store_n(codes + i, load_n(x + i, n - i) / s, n - i);
}

// A row in blocks of 128: n codes and ceil(n / 128) scales.
template <class T>
inline void row_to_fp8(const T* x, int64_t n, bool power_of_two, e4m3* codes, float* scales) {
  constexpr int64_t kBlock = 128;
  while (n > 0) {
    float scale[kBlocksAhead] = {};
    const int64_t whole = n / kBlock < kBlocksAhead ? n / kBlock : kBlocksAhead;
    const int64_t rest = whole < kBlocksAhead ? n % kBlock : 0;
    for (int64_t b = 0; b < whole; ++b) scale[b] = largest_magnitude(x + b * kBlock, kBlock);
    if (rest) scale[whole] = largest_magnitude(x + whole * kBlock, rest);
    for (int64_t b = 0; b < kBlocksAhead; ++b) scale[b] = fp8_scale(scale[b], power_of_two);
    for (int64_t b = 0; b < whole; ++b) encode_fp8(x + b * kBlock, kBlock, scale[b], codes + b * kBlock);
    if (rest) encode_fp8(x + whole * kBlock, rest, scale[whole], codes + whole * kBlock);
    const int64_t blocks = whole + (rest > 0), taken = whole * kBlock + rest;
    std::memcpy(scales, scale, static_cast<size_t>(blocks) * sizeof(float));
    x += taken, n -= taken, codes += taken, scales += blocks;
  }
}

// max(amax, 1e-10) / 127; NaN of NaN, inf of inf.
GLM5_INLINE float int8_scale(float amax) { return (amax < 1e-10f ? 1e-10f : amax) / 127.f; }

template <bool kByInverse, class T>
GLM5_INLINE void encode_int8_as(const T* x, int64_t n, float scale, int8_t* codes) {
  constexpr int64_t kFour = 4 * F::kLanes;
  const F s = splat<F>(scale), y = splat<F>(1.f / scale);
  int64_t i = 0;
  for (; i + kFour <= n; i += kFour) {
    I four[4];
    for (int k = 0; k < 4; ++k) four[k] = to_integers(ratio<kByInverse>(load(x + i + k * F::kLanes), s, y));
    store_bytes(codes + i, four[0], four[1], four[2], four[3]);
  }
  for (; i < n; i += F::kLanes) {
    int8_t some[F::kLanes];
    store_bytes(some, to_integers(ratio<kByInverse>(load_n(x + i, n - i), s, y)));
    std::memcpy(codes + i, some, static_cast<size_t>(n - i < F::kLanes ? n - i : F::kLanes));
  }
}

// codes[i] = rint(x[i] / scale), 0 where the scale is not finite. A scale is at least amax / 127 less half a unit: the ratio
// rounds to 127 at most, and nothing need be cut off.
template <class T>
GLM5_INLINE void encode_int8(const T* x, int64_t n, float scale, int8_t* codes) {
  if (inverse_serves(scale)) encode_int8_as<true>(x, n, scale, codes);
  else if (is_finite(scale)) encode_int8_as<false>(x, n, scale, codes);
  else std::memset(codes, 0, static_cast<size_t>(n));
}

// Of finite numbers and infinities, as they are; every NaN becomes the positive quiet one.
GLM5_INLINE F one_nan(F x) {
#if GLM5_ISA_LEVEL == 2
  return {_mm512_mask_mov_ps(x.v, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q),
                             _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)))};
#elif GLM5_ISA_LEVEL == 1
  return {_mm256_blendv_ps(x.v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q))};
#else
  for (int i = 0; i < 4; ++i)
    if (x.v[i] != x.v[i]) x.v[i] = __builtin_nanf("");
  return x;
#endif
}

// Storing in bfloat16 has one NaN of its own.
GLM5_INLINE void store_one_nan(bf16* p, F x) { store(p, x); }
GLM5_INLINE void store_one_nan(float* p, F x) { store(p, one_nan(x)); }
GLM5_INLINE void store_one_nan_n(bf16* p, F x, int64_t n) { store_n(p, x, n); }
GLM5_INLINE void store_one_nan_n(float* p, F x, int64_t n) { store_n(p, one_nan(x), n); }

}  // namespace glm5::cpu::GLM5_ISA
