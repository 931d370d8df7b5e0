// Dense attention of the un-absorbed form: the contract between the binding and the kernels. Raw pointers, sizes in
// elements, no torch. Every tensor is contiguous.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace glm5 {

// Most query rows of one forward task (on AMX, where packing a key block costs more beside the product), and of one step
// of the backward. They decide nothing but speed.
inline constexpr int64_t kMlaForwardRows = 192, kMlaForwardRowsAmx = 512, kMlaBackwardRows = 64;

// Consecutive query rows that one task treats together.
struct MlaRowTile {
  int64_t begin, end;  // rows [begin, end)
  int64_t ks, ke;      // forward: ks is every row's own and ke the largest; backward: the union of the rows' ranges
};

// Consecutive tiles whose keys no tile outside touches: what one backward task owns.
struct MlaSegment {
  int64_t begin, end;  // tiles [begin, end)
  int64_t ks, ke;
};

struct MlaAttentionArgs {
  int dtype;                   // Dtype of q, k, v, out and the gradients
  int64_t num_queries, num_keys, heads, dk, dv;
  double scale;
  const void* q;               // [num_queries, heads, dk]
  const void* k;               // [num_keys, heads, dk]
  const void* v;               // [num_keys, heads, dv], a key's v_stride elements behind the one before
  int64_t v_stride;            // heads * dv, but where v is a part of k (forward alone)
  const int32_t* ks;           // [num_queries]
  const int32_t* ke;           // [num_queries]
  const MlaRowTile* tiles;     // every row is in exactly one
  const int32_t* order;        // the order to run tiles (forward, target) or segments (backward) in: heavy ones first
  int64_t num_tiles;
  void* out;                   // [num_queries, heads, dv]                 forward
  void* lse;                   // [num_queries, heads] float|double        written forward, read by the others

  const MlaSegment* segments;  //                                          backward, from here on
  int64_t num_segments;
  const void* dout;            // [num_queries, heads, dv]
  const void* dlse;            // [num_queries, heads] float|double, may be null
  void* dq;                    // [num_queries, heads, dk]
  void* dk_out;                // [num_keys, heads, dk], zero on entry
  void* dv_out;                // [num_keys, heads, dv], zero on entry

  void* target;                // [num_queries, num_keys] float|double     mla_attn_target
};

}  // namespace glm5

GLM5_DECLARE_KERNEL(void mla_attention_forward(const MlaAttentionArgs& args);
                    void mla_attention_backward(const MlaAttentionArgs& args);
                    void mla_attn_target(const MlaAttentionArgs& args))

// bf16 alone.
namespace glm5::cpu::amx {
void mla_attention_forward(const MlaAttentionArgs& args);
void mla_attention_backward(const MlaAttentionArgs& args);
void mla_attn_target(const MlaAttentionArgs& args);
}  // namespace glm5::cpu::amx
