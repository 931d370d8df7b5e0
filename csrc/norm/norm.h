// RMS and layer normalisation: the contract between the binding and the kernels. Raw pointers, sizes in elements, no torch.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace glm5 {

struct RmsNormArgs {
  int dtype;            // Dtype of x, weight, y and their gradients
  int64_t rows, dim;
  double eps;
  const void* x;        // [rows, dim]
  const void* weight;   // [dim]
  void* y;              // [rows, dim]                                      forward
  const void* dy;       // [rows, dim]                                      backward
  void* dx;             // [rows, dim]                                      backward
  void* dweight;        // [dim]                                            backward
  void* partial;        // [ceil(rows / kRmsNormRowBlock), dim] float|double  backward: dweight of each block of rows
};

// Rows are cut into blocks of this many, counted from row 0, to sum dweight in an order free of the thread count.
inline constexpr int64_t kRmsNormRowBlock = 64;

struct LayerNormArgs {
  int dtype;            // Dtype of x, weight, bias, y and their gradients
  int64_t rows, dim;
  double eps;
  const void* x;        // [rows, dim]
  const void* weight;   // [dim]
  const void* bias;     // [dim]                                            forward
  void* y;              // [rows, dim]                                      forward
  const void* dy;       // [rows, dim]                                      backward
  void* dx;             // [rows, dim]                                      backward
  void* dweight;        // [dim]                                            backward
  void* dbias;          // [dim]                                            backward
  void* partial;        // [ceil(rows / kRmsNormRowBlock), 2, dim] float|double  backward: dweight, dbias of each block
};

}  // namespace glm5

GLM5_DECLARE_KERNEL(void rms_norm_forward(const RmsNormArgs& args); void rms_norm_backward(const RmsNormArgs& args))
GLM5_DECLARE_KERNEL(void layer_norm_forward(const LayerNormArgs& args); void layer_norm_backward(const LayerNormArgs& args))
