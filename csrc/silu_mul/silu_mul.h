// The gated activation of an expert: the contract between the binding and the kernels. No torch.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace glm5 {

struct SiluMulArgs {
  int dtype;            // Dtype of every tensor
  int64_t rows, width;  // width = I
  const void* x;        // [rows, 2 * width]: gate, then up
  void* y;              // [rows, width]       forward
  const void* dy;       // [rows, width]       backward
  void* dx;             // [rows, 2 * width]   backward
};

}  // namespace glm5

GLM5_DECLARE_KERNEL(void silu_mul_forward(const SiluMulArgs& args); void silu_mul_backward(const SiluMulArgs& args))
