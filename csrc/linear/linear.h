// The matrix products of the model: the contract between binding and kernels. The products themselves are
// common/gemm/gemm.h, called with the strides that forward, dx and dw need; only the bias gradient has a kernel here.
#pragma once

#include <cstdint>

#include "common/gemm/gemm.h"
#include "common/isa.h"

namespace glm5 {

struct SumRowsArgs {
  int dtype;         // Dtype of x and out
  int64_t rows, cols;
  const void* x;     // [rows, cols], row stride x_row
  int64_t x_row;
  void* out;         // [cols]
};

// sum_rows adds this many rows, counted from row 0, before it adds to the total: the order is fixed and short.
inline constexpr int64_t kSumRowsBlock = 256;

}  // namespace glm5

GLM5_DECLARE_KERNEL(void sum_rows(const SumRowsArgs& args))
