// How the work is cut: by rows where they are short, else at multiples of a unit of columns. No bit depends on it.
#pragma once

#include "common/parallel.h"
#include "common/simd.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int64_t kTaskElements = 1 << 14;

// Runs fn(row, begin, end) over pieces of about kTaskElements columns, cut at multiples of `unit`.
template <class Fn>
void over_pieces(int64_t rows, int64_t columns, int64_t unit, const Fn& fn) {
  if (rows == 0 || columns == 0) return;
  if (columns > kTaskElements) {
    const int64_t width = kTaskElements < unit ? unit : kTaskElements / unit * unit;
    const int64_t pieces = (columns + width - 1) / width;
    parallel_tasks(rows * pieces, [&](int64_t task) {
      const int64_t begin = task % pieces * width;
      fn(task / pieces, begin, begin + width < columns ? begin + width : columns);
    });
    return;
  }
  const int64_t block = kTaskElements / columns;
  parallel_tasks((rows + block - 1) / block, [&](int64_t task) {
    const int64_t end = (task + 1) * block < rows ? (task + 1) * block : rows;
    for (int64_t row = task * block; row < end; ++row) fn(row, int64_t{0}, columns);
  });
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

}  // namespace
}  // namespace glm5::cpu::GLM5_ISA
