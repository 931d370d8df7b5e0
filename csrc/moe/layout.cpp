// Who gets which token of a mixture of experts on several ranks. One pass over the choices.
#include <cstring>

#include "common/parallel.h"
#include "moe/moe.h"

namespace glm5::cpu::GLM5_ISA {

void moe_dispatch_layout(const MoeDispatchLayoutArgs& a) {
  const int64_t nodes = a.ranks / a.ranks_per_node, experts_a_rank = a.experts / a.ranks;
  std::memset(a.tokens_per_rank, 0, sizeof(int32_t) * a.ranks);
  std::memset(a.tokens_per_node, 0, sizeof(int32_t) * nodes);
  std::memset(a.tokens_per_expert, 0, sizeof(int32_t) * a.experts);
  if (a.tokens > 0) std::memset(a.is_token_in_rank, 0, sizeof(bool) * a.tokens * a.ranks);
  int64_t* last_token = static_cast<int64_t*>(thread_scratch(0, sizeof(int64_t) * nodes));
  for (int64_t node = 0; node < nodes; ++node) last_token[node] = -1;
  for (int64_t t = 0; t < a.tokens; ++t) {
    bool* in_rank = a.is_token_in_rank + t * a.ranks;
    for (int64_t j = 0; j < a.topk; ++j) {
      const int64_t expert = a.ids[t * a.topk + j];
      if (expert < 0) continue;
      ++a.tokens_per_expert[expert];
      const int64_t rank = expert / experts_a_rank, node = rank / a.ranks_per_node;
      if (in_rank[rank]) continue;
      in_rank[rank] = true;
      ++a.tokens_per_rank[rank];
      if (last_token[node] == t) continue;
      last_token[node] = t;
      ++a.tokens_per_node[node];
    }
  }
}

}  // namespace glm5::cpu::GLM5_ISA
