// What keeps infinities and NaN at home: 0 times one of them is NaN, so a product must not meet those of a row or key that
// it does not belong to, not even with weight 0.
#pragma once

#include "mla_attention/product.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

template <class T>
bool all_finite(const T* src, int64_t stride, int64_t rows, int64_t columns) {
  using V = Vector<T>;
  const V zero = splat<V>(0);
  V found = zero;  // 0, or NaN
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < columns; i += V::kLanes) found = fma(load_n(src + r * stride + i, columns - i), zero, found);
  return sum(found) == 0;
}

#if GLM5_ISA_LEVEL == 2
template <>
bool all_finite<bf16>(const bf16* src, int64_t stride, int64_t rows, int64_t columns) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 found = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < columns; i += 32) {
      const __mmask32 here = columns - i >= 32 ? ~0u : (1u << (columns - i)) - 1u;
      const __m512i x = _mm512_maskz_loadu_epi16(here, src + r * stride + i);
      found |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
    }
  return found == 0;
}
#endif

// Puts 0 in the place of every value that is not finite.
template <class E>
void clear_not_finite(E* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const auto x = to_float(p[i]);
    p[i] = x - x == 0 ? p[i] : E{};
  }
}

// sums[0..n) += factor * x[0..n), where x is not finite; whole vectors of sums are written.
template <class T>
void add_not_finite(const T* x, int64_t n, Acc<T> factor, Acc<T>* sums) {
  using V = Vector<T>;
  using S = Acc<T>;
  const V zero = splat<V>(0), f = splat<V>(factor), inf = splat<V>(static_cast<S>(__builtin_inf()));
  for (int64_t i = 0; i < n; i += V::kLanes) {
    const V value = load_n(x + i, n - i), term = value * f;
    store(sums + i, lanes(sums + i) + where_lt(zero - inf, value, where_lt(value, inf, zero, term), term));
  }
}

}  // namespace
}  // namespace glm5::cpu::GLM5_ISA
