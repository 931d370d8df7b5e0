// How elements become the steps of a product's inner loop, and square transposes in registers. Per instruction set.
#pragma once

#include "common/simd.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

// ---- How elements of type T become steps of the inner loop --------------------------------------------------------
// A step is one Scalar-sized slot of a packed row: one element, or (AVX-512 bf16) a pair of neighbours along k.

template <class T>
struct Plain {
  using V = Vector<T>;
  using S = Acc<T>;
  static constexpr int kPerStep = 1;
  // kLanes steps along contiguous k; the second form: or as many as are left.
  static GLM5_INLINE V along(const T* p) { return load(p); }
  static GLM5_INLINE V along(const T* p, int64_t k_left) { return load_n(p, k_left); }
  // One step of up to kLanes neighbours along m or n.
  static GLM5_INLINE V across(const T* p, int64_t, int64_t, int64_t lanes) { return load_n(p, lanes); }
  static GLM5_INLINE S one(const T* p, int64_t, int64_t) { return static_cast<S>(to_float(*p)); }
  static GLM5_INLINE V step(V a, V b, V c) { return fma(a, b, c); }
  // A slot is what one vector reads of a line; kPerSlot steps come out of it, in order.
  static constexpr int kPerSlot = 1;
  static GLM5_INLINE V slots(const T* p) { return load(p); }
  static GLM5_INLINE V from_slot(V slot, int) { return slot; }
};

#if GLM5_ISA_LEVEL == 1
// Pairs are transposed as they lie in memory and widened afterwards.
struct Widened : Plain<bf16> {
  static constexpr int kPerSlot = 2;
  static GLM5_INLINE F slots(const bf16* p) { return {_mm256_loadu_ps(reinterpret_cast<const float*>(p))}; }
  static GLM5_INLINE F from_slot(F slot, int which) {
    const __m256i pair = _mm256_castps_si256(slot.v);
    return {_mm256_castsi256_ps(which == 0 ? _mm256_slli_epi32(pair, 16)
                                           : _mm256_and_si256(pair, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
};
#endif

#if GLM5_ISA_LEVEL == 2
struct Pairs {
  using V = F;
  using S = float;
  static constexpr int kPerStep = 2;
  static GLM5_INLINE F along(const bf16* p) { return {_mm512_loadu_ps(reinterpret_cast<const float*>(p))}; }
  static GLM5_INLINE F along(const bf16* p, int64_t k_left) {
    const __mmask32 mask = k_left >= 32 ? 0xffffffffu : (1u << k_left) - 1u;
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p))};
  }
  static GLM5_INLINE F across(const bf16* p, int64_t k_stride, int64_t k_left, int64_t lanes) {
    const __mmask16 mask = first_n(lanes);
    const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
    if (k_left < 2) return {_mm512_castsi512_ps(even)};
    const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p + k_stride));
    return {_mm512_castsi512_ps(_mm512_or_si512(even, _mm512_slli_epi32(odd, 16)))};
  }
  static GLM5_INLINE float one(const bf16* p, int64_t k_stride, int64_t k_left) {
    const uint32_t bits = p[0].bits | (k_left < 2 ? 0u : static_cast<uint32_t>(p[k_stride].bits) << 16);
    float pair;
    std::memcpy(&pair, &bits, 4);
    return pair;
  }
  static GLM5_INLINE F step(F a, F b, F c) {
    return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(b.v), reinterpret_cast<__m512bh>(a.v))};
  }
  static constexpr int kPerSlot = 1;
  static GLM5_INLINE F slots(const bf16* p) { return along(p); }
  static GLM5_INLINE F from_slot(F slot, int) { return slot; }
};
#endif

template <class T>
struct KindFor {
  using Type = Plain<T>;
};
#if GLM5_ISA_LEVEL == 2
template <>
struct KindFor<bf16> {
  using Type = Pairs;
};
#elif GLM5_ISA_LEVEL == 1
template <>
struct KindFor<bf16> {
  using Type = Widened;
};
#endif

// r[i][j] <-> r[j][i].
#if GLM5_ISA_LEVEL == 2
GLM5_INLINE void transpose(F (&r)[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v);
  }
  __m512 u[16];  // u[4 q + j]: 128-bit lane l holds column 4 l + j of rows 4 q .. 4 q + 3
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const __m512d t0 = _mm512_castps_pd(t[4 * q]), t1 = _mm512_castps_pd(t[4 * q + 1]);
    const __m512d t2 = _mm512_castps_pd(t[4 * q + 2]), t3 = _mm512_castps_pd(t[4 * q + 3]);
    u[4 * q] = _mm512_castpd_ps(_mm512_unpacklo_pd(t0, t2));
    u[4 * q + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(t0, t2));
    u[4 * q + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(t1, t3));
    u[4 * q + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(t1, t3));
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88), b = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88), d = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
    r[j].v = _mm512_shuffle_f32x4(a, c, 0x88);
    r[8 + j].v = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[4 + j].v = _mm512_shuffle_f32x4(b, d, 0x88);
    r[12 + j].v = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}
#elif GLM5_ISA_LEVEL == 1
GLM5_INLINE void transpose(F (&r)[8]) {
  __m256 u[8];
#pragma GCC unroll 2
  for (int q = 0; q < 2; ++q) {
    const __m256 t0 = _mm256_unpacklo_ps(r[4 * q].v, r[4 * q + 1].v), t1 = _mm256_unpackhi_ps(r[4 * q].v, r[4 * q + 1].v);
    const __m256 t2 = _mm256_unpacklo_ps(r[4 * q + 2].v, r[4 * q + 3].v);
    const __m256 t3 = _mm256_unpackhi_ps(r[4 * q + 2].v, r[4 * q + 3].v);
    u[4 * q] = _mm256_shuffle_ps(t0, t2, 0x44);
    u[4 * q + 1] = _mm256_shuffle_ps(t0, t2, 0xee);
    u[4 * q + 2] = _mm256_shuffle_ps(t1, t3, 0x44);
    u[4 * q + 3] = _mm256_shuffle_ps(t1, t3, 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    r[j].v = _mm256_permute2f128_ps(u[j], u[4 + j], 0x20);
    r[4 + j].v = _mm256_permute2f128_ps(u[j], u[4 + j], 0x31);
  }
}
#else
template <class V, int L>
GLM5_INLINE void transpose(V (&r)[L]) {
  for (int i = 0; i < L; ++i)
    for (int j = 0; j < i; ++j) {
      const auto t = r[i].v[j];
      r[i].v[j] = r[j].v[i];
      r[j].v[i] = t;
    }
}
#endif

}  // namespace
}  // namespace glm5::cpu::GLM5_ISA
