// How rows of independent elements, or of blocks of them, are cut into tasks: several rows where they are short, else pieces
// of one. No bit depends on it.
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

}  // namespace
}  // namespace glm5::cpu::GLM5_ISA
