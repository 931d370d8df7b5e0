// The matrix product under every projection: C[m, n] (+)= sum_k A[m, k] B[k, n] (+ bias[n]), any strides, float32
// accumulation. Compiled once per instruction set; kernels of other families may call it.
//
// Order of summation, the same for every element and every call: k runs upwards inside blocks of kGemmBlockK counted from
// k = 0, each block from zero, block sums are added in order. Tile sizes, tails, threads, strides and the other rows and
// columns change no bit. (The AMX tile unit has its own fixed order: 32 products at a time, no blocks.)
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace glm5 {

inline constexpr int64_t kGemmBlockK = 512;

struct GemmArgs {
  int dtype;              // Dtype of a, b and bias
  int out_dtype;          // Dtype of c: that of a, or float32
  int64_t m, n, k;
  const void* a;          // [m, k], strides in elements
  int64_t a_row, a_col;
  const void* b;          // [k, n]
  int64_t b_row, b_col;
  void* c;                // [m, n], columns contiguous
  int64_t c_row;
  const void* bias;       // [n] or null
  bool accumulate;        // add to c instead of overwriting it; only where c holds the accumulator type
};

}  // namespace glm5

// gemm: `count` independent products, cut into tasks for all threads. Call it from outside parallel_tasks.
// gemm_serial: one product on the calling thread, for use inside a task.
// Both use thread_scratch slots 4 to 7.
GLM5_DECLARE_KERNEL(void gemm(const GemmArgs* products, int64_t count); void gemm_serial(const GemmArgs& product))
