// Dense attention on the vector units, in every dtype.
#include "mla_attention/backward.h"
#include "mla_attention/forward.h"
#include "mla_attention/target.h"

namespace glm5::cpu::GLM5_ISA {

void mla_attention_forward(const MlaAttentionArgs& args) {
  if (args.dtype == 0) forward<bf16>(args);
  else if (args.dtype == 1) forward<float>(args);
#if GLM5_ISA_LEVEL == 0
  else forward<double>(args);
#endif
}

void mla_attention_backward(const MlaAttentionArgs& args) {
  if (args.dtype == 0) backward<bf16>(args);
  else if (args.dtype == 1) backward<float>(args);
#if GLM5_ISA_LEVEL == 0
  else backward<double>(args);
#endif
}

void mla_attn_target(const MlaAttentionArgs& args) {
  if (args.dtype == 0) target<bf16>(args);
  else if (args.dtype == 1) target<float>(args);
#if GLM5_ISA_LEVEL == 0
  else target<double>(args);
#endif
}

}  // namespace glm5::cpu::GLM5_ISA
