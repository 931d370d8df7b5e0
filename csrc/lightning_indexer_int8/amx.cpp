// The int8 indexer's scores on AMX tiles.
#include "lightning_indexer/amx.h"
#include "lightning_indexer_int8/pack.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

template <>
struct TileProduct<i8> {
  static constexpr bool kInteger = true;
  using Dot = int32_t;
};

}  // namespace

void lightning_indexer_logits_int8(const LightningIndexerArgs& args) { logits<i8>(args); }
void lightning_indexer_topk_int8(const LightningIndexerArgs& args) { topk<i8>(args); }

}  // namespace glm5::cpu::GLM5_ISA
