// int4 weights times int8 activations: the contract between binding and kernels.
//
// A prepacked weight holds its n columns in blocks of 16 (the last one of n % 16), each block one piece of memory that a
// product reads from end to end. Of a block of c columns:
//   for each group:  lines of 8 k: byte [column][j], j < 4, holds k = j in its low nibble, k = 4 + j in its high one
//                    float32 scale [c]
//   then             uint8 zero [groups][c], if the weight has them
// A nibble is a code in 0..15 of value (code - zero) * scale; weights without zero points have zero = 8. A line of 16 columns
// is 64 bytes; its two halves are rows of VNNI operands and of AMX tiles alike, so one form serves every set.
//
// out[m, column] = x_scale[m] * sum over groups, in order, of scale * (exact int32 sum of x * (code - zero)): float32, each
// group added by one fused multiply-add, from 0. Every set gives the same bits.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace glm5 {

struct W4A8Weight {
  int64_t n, groups, group_size;
  bool zeros;
  int64_t row_bytes;  // of one column in one group: lines, scale, zero, and padding where 8 does not divide group_size
};

struct W4A8PackArgs {
  W4A8Weight weight;
  int64_t count;  // of weights, one after another in all four
  uint8_t* w;  // [count, n * groups * row_bytes]
  uint8_t* packed;  // [count, n, groups * group_size / 2], low nibble = even k; codes are signed where there are no zeros
  float* scale;  // [count, n, groups]
  uint8_t* zeros;  // [count, n, groups]
};

// Rows [first, first + m) of x times one weight.
struct W4A8Product {
  int64_t first, m;
  const uint8_t* w;
};

struct W4A8Args {
  W4A8Weight weight;  // what all products' weights are like
  bool out_bf16;  // else float32
  int64_t rows;  // of x
  const int8_t* x;  // [rows, groups * group_size]
  const float* x_scale;  // [rows]
  void* out;  // [rows, n]
  int64_t count;
  const W4A8Product* products;
};

}  // namespace glm5

// Packing writes w, unpacking the other three.
GLM5_DECLARE_KERNEL(void w4a8_pack(const W4A8PackArgs& args); void w4a8_unpack(const W4A8PackArgs& args);
                    void w4a8_gemm(const W4A8Args& args))
