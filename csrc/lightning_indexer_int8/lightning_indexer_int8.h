// The lightning indexer on int8 queries and keys: the contract between the binding and the kernels. Arguments are those of
// lightning_indexer.h with dtype kInt8 and k_scale given; scores and lse are float32. Dot products are exact int32; then, in
// float32, relu, one fma for each head in the order 0, 1, ..., H-1, and a product with k_scale: the same bits on every
// instruction set.
#pragma once

#include "lightning_indexer/lightning_indexer.h"

namespace glm5 {

inline constexpr int64_t kInt8MaxDim = 131071;  // times 128 * 128, the largest product, is within int32

}  // namespace glm5

GLM5_DECLARE_KERNEL(void lightning_indexer_logits_int8(const LightningIndexerArgs& args);
                    void lightning_indexer_topk_int8(const LightningIndexerArgs& args))

namespace glm5::cpu::amx {
void lightning_indexer_logits_int8(const LightningIndexerArgs& args);
void lightning_indexer_topk_int8(const LightningIndexerArgs& args);
}  // namespace glm5::cpu::amx
