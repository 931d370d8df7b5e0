// Hadamard rotation: the contract between the binding and the kernels. Raw pointers, sizes in elements, no torch.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace glm5 {

struct HadamardArgs {
  int dtype;         // Dtype of x and y
  int64_t rows, dim;  // dim is a power of two
  const void* x;     // [rows, dim]
  void* y;           // [rows, dim]
};

}  // namespace glm5

GLM5_DECLARE_KERNEL(void rotate_hadamard(const HadamardArgs& args))
