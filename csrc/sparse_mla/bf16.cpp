// Sparse MLA in bf16 on AVX-512's vdpbf16ps. Empty for the other instruction sets.
#include "sparse_mla/bf16.h"

#include "sparse_mla/bf16_attention.h"

#if GLM5_ISA_LEVEL == 2
namespace glm5::cpu::GLM5_ISA {

void sparse_mla_forward_bf16(const SparseMlaArgs& args) { pair_forward(args); }
void sparse_mla_backward_bf16(const SparseMlaArgs& args) { pair_backward(args); }
void sparse_mla_attn_target_bf16(const SparseMlaArgs& args) { pair_attn_target(args); }

}  // namespace glm5::cpu::GLM5_ISA
#endif
