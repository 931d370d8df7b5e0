// Lines of an operand into registers, and finished sums out to a row of C: for cpu.cpp and few_rows.cpp.
#pragma once

#include "common/gemm/pack.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

// kLanes steps of one line (a row of A or a column of B), elements k_stride apart; elements past k_count give zero.
template <class T, class K>
GLM5_INLINE typename K::V read_line(const T* p, int64_t k_stride, int64_t k_count) {
  constexpr int L = K::V::kLanes;
  if (k_stride == 1) return K::along(p, k_count);
  typename K::S buffer[L];
  for (int s = 0; s < L; ++s) {
    const int64_t k = s * K::kPerStep;
    buffer[s] = k < k_count ? K::one(p + k * k_stride, k_stride, k_count - k) : 0;
  }
  return load(buffer);
}

// Keeps the compiler from splitting loops over a pointer, and from keeping all its offsets in (too few) registers.
template <class P>
GLM5_INLINE void as_it_is(P*& p) {
  __asm__("" : "+r"(p));
}

// kLanes neighbouring lines, line_stride apart; lines past num_lines give zero. ahead: what to prefetch for the first line.
template <class T, class K, int L>
GLM5_INLINE void read_lines(const T* p, int64_t line_stride, int64_t k_stride, int64_t num_lines, int64_t k_count,
                            const T* ahead, typename K::V (&r)[L]) {
  if (k_stride == 1 && num_lines >= L && k_count >= L * K::kPerStep) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      // Weights come from memory, in more streams than the hardware follows.
      __builtin_prefetch(ahead);
      r[i] = K::along(p);
      p += line_stride;
      ahead += line_stride;
      as_it_is(p);
      as_it_is(ahead);
    }
    return;
  }
  for (int i = 0; i < L; ++i)
    r[i] = i < num_lines ? read_line<T, K>(p + i * line_stride, k_stride, k_count) : splat<typename K::V>(0);
}

// One row of finished sums, `cols` of them, goes to c.
template <class T, class V, class S>
void finish_row(const S* sums, int64_t cols, const T* bias, void* out, bool out_is_accumulator) {
  constexpr int L = V::kLanes;
  for (int64_t n = 0; n < cols; n += L) {
    const int64_t left = cols - n;
    V v = load(sums + n);
    if (bias) v = v + load_n(bias + n, left);
    if (out_is_accumulator) store_n(static_cast<S*>(out) + n, v, left);
    else store_n(static_cast<T*>(out) + n, v, left);
  }
}

}  // namespace
}  // namespace glm5::cpu::GLM5_ISA
