// Dense attention in bf16 on the AMX tile unit.
#define GLM5_MLA_TILES

#include "mla_attention/backward.h"
#include "mla_attention/forward_tiles.h"
#include "mla_attention/target.h"

namespace glm5::cpu::amx {

void mla_attention_forward(const MlaAttentionArgs& args) { forward_in_tiles(args); }
void mla_attention_backward(const MlaAttentionArgs& args) { backward<bf16>(args); }
void mla_attn_target(const MlaAttentionArgs& args) { target<bf16>(args); }

}  // namespace glm5::cpu::amx
