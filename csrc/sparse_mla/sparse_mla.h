// Sparse multi-query attention over latent rows: the contract between the binding and the kernels. Raw pointers, sizes
// in elements, no torch.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace glm5 {

// Every tensor is contiguous. "acc" stands for float, or double when dtype is float64.
struct SparseMlaArgs {
  int dtype;                // Dtype of q, kv, out and their gradients
  int64_t queries, keys;    // Tq, Tk
  int64_t heads;            // H
  int64_t dim, value_dim;   // Dk, d_v <= Dk
  int64_t topk;             // length of an index list
  double scale;             // score = scale * q . kv
  const void* q;            // [queries, heads, dim]
  const void* kv;           // [keys, dim]; value = the first value_dim of a row
  const int32_t* indices;   // [queries, topk], -1 = no key
  int64_t* bad_index;       // [1] out of find_bad_index: a flat position in indices outside [-1, keys), or -1
  void* out;                // [queries, heads, value_dim]            forward
  void* lse;                // [queries, heads] acc, natural log      forward: written; others: read
  const void* dout;         // [queries, heads, value_dim]            backward
  const void* dlse;         // [queries, heads] acc, or null for 0    backward
  void* dq;                 // [queries, heads, dim]                  backward
  void* dkv;                // [keys, dim]                            backward
  void* dkv_acc;            // [keys, dim] acc, dkv itself; for bf16 float [keys, dim rounded up to 32]   backward
  void* target;             // [queries, topk] acc                    attn_target
};

// A row's reductions run over blocks of this many list positions, counted from position 0.
inline constexpr int64_t kSparseMlaBlock = 64;

}  // namespace glm5

GLM5_DECLARE_KERNEL(void sparse_mla_find_bad_index(const SparseMlaArgs& args);
                    void sparse_mla_forward(const SparseMlaArgs& args); void sparse_mla_backward(const SparseMlaArgs& args);
                    void sparse_mla_attn_target(const SparseMlaArgs& args))
