// Routing, permutation and weighted return of a mixture of experts: the contract between the binding and the kernels.
// Raw pointers, sizes in elements, no torch.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace glm5 {

struct MoeRouterArgs {
  bool is_float64;           // logits, bias, weights and gradients are double, else float
  bool renormalize;
  int64_t tokens, experts, topk, groups, topk_groups;  // groups divides experts; topk <= topk_groups * experts / groups
  double scaling;
  const void* logits;        // [tokens, experts]
  const void* bias;          // [experts]                                        forward
  const int32_t* replay;     // [tokens, topk], or null: used as ids unchanged       forward
  void* weights;             // [tokens, topk]                                   forward
  int32_t* ids;              // [tokens, topk] ascending, -1 padded              forward: out, backward: in
  const void* dweights;      // [tokens, topk]                                   backward
  void* dlogits;             // [tokens, experts]                                backward
};

struct MoePermuteArgs {
  int64_t tokens, topk, experts, row_bytes;
  const void* x;             // [tokens] rows
  const int32_t* ids;        // [tokens, topk], each in [0, experts) or -1: takes no slot
  void* xp;                  // [tokens * topk] rows; slots left over hold 0
  int32_t* row_of_slot;      // [tokens * topk]: the token in each slot; -1 in those left over
  int32_t* slot_of_row;      // [tokens, topk]: the slot of each choice, or -1
  int32_t* group_ends;       // [experts]: one past the last slot of each expert
};

// What a dispatch sends where: experts lie evenly on ranks in order, ranks on nodes in order.
struct MoeDispatchLayoutArgs {
  int64_t tokens, topk, experts, ranks, ranks_per_node;  // ranks divides experts, ranks_per_node divides ranks
  const int32_t* ids;        // [tokens, topk], each in [0, experts) or -1
  int32_t* tokens_per_rank;    // [ranks]: a token counts once for each rank that it goes to
  int32_t* tokens_per_node;    // [ranks / ranks_per_node]: and once for each node
  int32_t* tokens_per_expert;  // [experts]
  bool* is_token_in_rank;    // [tokens, ranks]
};

// Sums rows back to tokens, in ascending slot order, which is expert order.
struct MoeCombineArgs {
  int dtype;                 // Dtype of y, out, dout, dy; weights are float, or double where y is
  int64_t tokens, topk, slots, dim;
  const int32_t* slot_of_row;  // [tokens, topk], each slot at most once; -1 adds nothing
  const void* weights;       // [tokens, topk]; null means 1
  const void* y;             // [slots, dim]
  void* out;                 // [tokens, dim]            forward
  const void* dout;          // [tokens, dim]            backward
  void* dy;                  // [slots, dim]             backward
  void* dweights;            // [tokens, topk]           backward
};

}  // namespace glm5

GLM5_DECLARE_KERNEL(void moe_router_forward(const MoeRouterArgs& args); void moe_router_backward(const MoeRouterArgs& args))
GLM5_DECLARE_KERNEL(void moe_permute(const MoePermuteArgs& args))
GLM5_DECLARE_KERNEL(void moe_dispatch_layout(const MoeDispatchLayoutArgs& args))
GLM5_DECLARE_KERNEL(void moe_combine_forward(const MoeCombineArgs& args);
                    void moe_combine_backward(const MoeCombineArgs& args))
