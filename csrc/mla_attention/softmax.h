// Exponentials and the row softmax of dense attention, in base 2: scores are scaled by scale * log2(e) in the same fused
// multiply-add that subtracts the maximum, and 2^x is cheaper than e^x.
#pragma once

#include "mla_attention/product.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

inline constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

GLM5_INLINE float natural_log(float x) { return __builtin_logf(x); }
GLM5_INLINE double natural_log(double x) { return __builtin_log(x); }

// 2^r for |r| <= 1/2: 1 + r q(r), q minimising the relative error (9.1e-8 before rounding); exactly 1 at 0.
GLM5_INLINE F pow2_fraction(F r) {
  F p = splat<F>(1.3264727313e-3f);
  p = fma(p, r, splat<F>(9.6715129912e-3f));
  p = fma(p, r, splat<F>(5.5507335812e-2f));
  p = fma(p, r, splat<F>(2.4022242427e-1f));
  p = fma(p, r, splat<F>(6.9314700365e-1f));
  return fma(p, r, splat<F>(1.f));
}

// 2^x; exactly 0 below 2^-126 (and for -inf), NaN for NaN.
#if GLM5_ISA_LEVEL == 2
GLM5_INLINE F pow2(F x) {
  const F n = round_to_integer(x);
  const __mmask16 kept = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_ps(kept, pow2_fraction(x - n).v, n.v)};
}
#else
GLM5_INLINE F pow2(F x) {
  const F lowest = splat<F>(-126.f);
  const F clamped = max(lowest, min(splat<F>(128.f), x));  // NaN survives
  const F n = round_to_integer(clamped);
  return where_lt(x, lowest, splat<F>(0.f), scale_by_power_of_two(pow2_fraction(clamped - n), n));
}
#endif
#if GLM5_ISA_LEVEL == 0
GLM5_INLINE D pow2(D x) { return {D::Native{__builtin_exp2(x.v[0]), __builtin_exp2(x.v[1])}}; }
#endif

// The numbers of the lanes, from 0.
template <class V>
GLM5_INLINE V lane_numbers() {
  typename V::Scalar n[V::kLanes];
  for (int i = 0; i < V::kLanes; ++i) n[i] = static_cast<typename V::Scalar>(i);
  return lanes(n);
}

// Stores an operand of a later product, rounded to nearest even.
template <class E>
GLM5_INLINE void store_operand(E* p, Vector<E> x) {
  store(p, x);
}
#if GLM5_ISA_LEVEL == 2
template <>
GLM5_INLINE void store_operand<bf16>(bf16* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v)));
}
#endif

// The largest of scores[0..n) times scale; NaNs are skipped here and show in the sum.
template <class T>
GLM5_INLINE Acc<T> largest_score(const Acc<T>* scores, int64_t n, Acc<T> scale) {
  using V = Vector<T>;
  using S = Acc<T>;
  constexpr int L = V::kLanes;
  const V scales = splat<V>(scale), none = splat<V>(static_cast<S>(-__builtin_inf()));
  V top[4] = {none, none, none, none};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) top[j] = max(lanes(scores + i + j * L) * scales, top[j]);  // max keeps top where it is NaN
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    if (i + j * L >= n) break;
    const V inside = splat<V>(static_cast<S>(n - i - j * L));
    top[j] = max(where_lt(lane_numbers<V>(), inside, lanes(scores + i + j * L) * scales, none), top[j]);
  }
  return max_lane(max(max(top[0], top[1]), max(top[2], top[3])));
}

// scores[0..n) become 2^(score * scale + shift) in p, with zeros up to the end of the last vector. Returns their sum,
// unrounded, in an order that depends on the position alone.
template <class T>
GLM5_INLINE Acc<T> weigh(const Acc<T>* scores, Operand<T>* p, int64_t n, Acc<T> scale, Acc<T> shift) {
  using V = Vector<T>;
  using S = Acc<T>;
  constexpr int L = V::kLanes;
  const V scales = splat<V>(scale), shifts = splat<V>(shift), zero = splat<V>(0);
  V sums[4] = {zero, zero, zero, zero};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const V weight = pow2(fma(lanes(scores + i + j * L), scales, shifts));
      sums[j] = sums[j] + weight;
      store_operand(p + i + j * L, weight);
    }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    if (i + j * L >= n) break;
    const V inside = splat<V>(static_cast<S>(n - i - j * L));
    const V weight = where_lt(lane_numbers<V>(), inside, pow2(fma(lanes(scores + i + j * L), scales, shifts)), zero);
    sums[j] = sums[j] + weight;
    store_operand(p + i + j * L, weight);
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace
}  // namespace glm5::cpu::GLM5_ISA
