// The indexer's scores in bf16, and in e4m3 decoded to it, on AMX tiles.
#include "lightning_indexer/amx.h"

namespace glm5::cpu::GLM5_ISA {

void lightning_indexer_logits(const LightningIndexerArgs& args) {
  if (args.dtype == kE4m3) logits<e4m3>(args);
  else logits<bf16>(args);
}
void lightning_indexer_selected_logits(const LightningIndexerArgs& args) {
  if (args.dtype == kE4m3) selected_logits<e4m3>(args);
  else selected_logits<bf16>(args);
}
void lightning_indexer_topk(const LightningIndexerArgs& args) {
  if (args.dtype == kE4m3) topk<e4m3>(args);
  else topk<bf16>(args);
}

}  // namespace glm5::cpu::GLM5_ISA
