// Sparse MLA in bf16 on AMX tiles.
#include "sparse_mla/bf16.h"

#include "sparse_mla/tile_backward.h"

namespace glm5::cpu::GLM5_ISA {

void sparse_mla_forward_bf16(const SparseMlaArgs& args) { TileForward(args).run(); }
void sparse_mla_backward_bf16(const SparseMlaArgs& args) { run_backward(TileBackward(args)); }
void sparse_mla_attn_target_bf16(const SparseMlaArgs& args) { pair_attn_target(args); }

}  // namespace glm5::cpu::GLM5_ISA
