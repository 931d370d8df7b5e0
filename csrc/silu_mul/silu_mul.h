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

struct SiluMulQuantizeArgs {
  int dtype;            // Dtype of x: bf16 or float32
  int64_t rows, width;  // width = I
  bool to_int8;         // else to e4m3
  bool power_of_two;    // scales, of e4m3
  const void* x;        // [rows, 2 * width]: gate, then up
  void* q;              // [rows, width] int8 or e4m3
  float* scale;         // [rows] int8, [rows, ceil(width / 128)] e4m3
};

}  // namespace glm5

GLM5_DECLARE_KERNEL(void silu_mul_forward(const SiluMulArgs& args); void silu_mul_backward(const SiluMulArgs& args);
                    void silu_mul_quantize(const SiluMulQuantizeArgs& args))
