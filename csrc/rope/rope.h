// Rotary position embedding: the contract between the binding and the kernels. Raw pointers, sizes in elements, no torch.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace glm5 {

struct RopeArgs {
  int dtype;                // Dtype of x and y
  bool interleaved;         // pairs (2i, 2i + 1), else (i, i + dim / 2)
  bool wide_positions;      // positions are int64_t, else int32_t
  double sign;              // +1 rotates by the angle, -1 by its negative (the backward)
  int64_t tokens, heads, dim;
  int64_t x_token_stride, x_head_stride;  // the last dimension of x is contiguous
  const void* x;            // [tokens, heads, dim], strided
  const void* cos;          // [positions, dim / 2] float, or double where x is
  const void* sin;          // [positions, dim / 2]
  const void* positions;    // [tokens], each a valid row of cos (the binding has looked)
  void* y;                  // [tokens, heads, dim]
};

}  // namespace glm5

GLM5_DECLARE_KERNEL(void rope(const RopeArgs& args))
