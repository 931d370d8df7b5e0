// The bf16 forms of the ops, for AVX-512 (bf16.cpp) and AMX (amx.cpp).
#pragma once

#include "sparse_mla/sparse_mla.h"

#define GLM5_DECLARE_BF16_KERNELS(isa) \
  namespace glm5::cpu::isa { \
  void sparse_mla_forward_bf16(const SparseMlaArgs& args); \
  void sparse_mla_backward_bf16(const SparseMlaArgs& args); \
  void sparse_mla_attn_target_bf16(const SparseMlaArgs& args); \
  }
GLM5_DECLARE_BF16_KERNELS(avx512)
GLM5_DECLARE_BF16_KERNELS(amx)
#undef GLM5_DECLARE_BF16_KERNELS
