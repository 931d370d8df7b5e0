// Products of e4m3 matrices with block scales: the contract between binding and kernels.
//
// c[m, n] = sum over blocks b of a_scale[m, b] * b_scale[n / 128, b] * (sum over k in block b of a[m, k] b[n, k]).
//
// Order of summation, the same for every element and every call: blocks of kFp8Block counted from k = 0. A block's sum is a
// float32 chain from zero, in an order that the instruction set fixes (products of e4m3 values are exact); it is multiplied
// by the rounded product of the two scales and added to the blocks before it, in one fused step where the set has one.
// Rows, columns, tiles and threads change no bit.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace glm5 {

inline constexpr int64_t kFp8Block = 128;

struct Fp8GemmArgs {
  int64_t m, n, k;
  const void* a;  // [m, k] e4m3, rows a_row apart
  int64_t a_row;
  const float* a_scale;  // [m, ceil(k / 128)]
  const void* b;  // [n, k] e4m3, rows b_row apart
  int64_t b_row;
  const float* b_scale;  // [ceil(n / 128), ceil(k / 128)]
  void* c;  // [m, n] bf16 or float32
  bool out_float32;
};

}  // namespace glm5

// `count` independent products, cut into tasks for all threads. Uses thread_scratch slots 4 to 7.
GLM5_DECLARE_KERNEL(void fp8_gemm(const Fp8GemmArgs* products, int64_t count))

namespace glm5::cpu::amx {
void fp8_gemm(const Fp8GemmArgs* products, int64_t count);
}
