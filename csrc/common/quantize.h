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

// codes[i] = e4m3(x[i] / scale).
template <class T>
GLM5_INLINE void encode_fp8(const T* x, int64_t n, float scale, e4m3* codes) {
  const F s = splat<F>(scale);
  int64_t i = 0;
  for (; i + F::kLanes <= n; i += F::kLanes) store(codes + i, load(x + i) / s);
  if (i < n) store_n(codes + i, load_n(x + i, n - i) / s, n - i);
}

GLM5_INLINE bool is_finite(float x) { return magnitude_bits(x) < 0x7f800000u; }

// max(amax, 1e-10) / 127; NaN of NaN, inf of inf.
GLM5_INLINE float int8_scale(float amax) { return (amax < 1e-10f ? 1e-10f : amax) / 127.f; }

// codes[i] = rint(x[i] / scale), 0 where the scale is not finite. A scale is at least amax / 127 less half a unit: the ratio
// rounds to 127 at most, and nothing need be cut off.
template <class T>
GLM5_INLINE void encode_int8(const T* x, int64_t n, float scale, int8_t* codes) {
  if (!is_finite(scale)) {
    std::memset(codes, 0, static_cast<size_t>(n));
    return;
  }
  const F s = splat<F>(scale);
  int64_t i = 0;
  for (; i + F::kLanes <= n; i += F::kLanes) store_bytes(codes + i, to_integers(load(x + i) / s));
  if (i < n) {
    int8_t rest[F::kLanes];
    store_bytes(rest, to_integers(load_n(x + i, n - i) / s));
    std::memcpy(codes + i, rest, static_cast<size_t>(n - i));
  }
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
