// Where things are inside a prepacked weight (w4a8_gemm.h says what they are). Compiled once per instruction set.
#pragma once

#include "common/simd.h"
#include "w4a8_gemm/w4a8_gemm.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int64_t kBlock = 16;  // columns
constexpr int64_t kLineK = 8;

GLM5_INLINE int64_t group_lines(const W4A8Weight& w) { return (w.group_size + kLineK - 1) / kLineK; }
GLM5_INLINE int64_t inner(const W4A8Weight& w) { return w.groups * w.group_size; }
GLM5_INLINE int64_t num_blocks(const W4A8Weight& w) { return (w.n + kBlock - 1) / kBlock; }

struct Block {
  const uint8_t* data;
  int64_t columns;     // 0: a block past the last, of which nothing is read
  int64_t line_bytes;  // 4 a column
  int64_t group_bytes;
  const uint8_t* zeros;  // null where there are none
};

GLM5_INLINE Block block_of(const W4A8Weight& w, const uint8_t* data, int64_t block) {
  const int64_t left = w.n - block * kBlock;
  Block b;
  b.columns = left < 0 ? 0 : left < kBlock ? left : kBlock;
  b.data = b.columns ? data + block * kBlock * w.groups * w.row_bytes : data;
  b.line_bytes = 4 * b.columns;
  b.group_bytes = b.line_bytes * (group_lines(w) + 1);
  b.zeros = w.zeros ? b.data + w.groups * b.group_bytes : nullptr;
  return b;
}

GLM5_INLINE const float* scales_of(const Block& b, int64_t g) {
  return reinterpret_cast<const float*>(b.data + (g + 1) * b.group_bytes - b.line_bytes);
}

}  // namespace
}  // namespace glm5::cpu::GLM5_ISA
