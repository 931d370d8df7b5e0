// The lightning indexer (DeepSeek-V3.2, eq. 1): the contract between the binding and the kernels. Raw pointers, sizes in
// elements, no torch. The score of key s for query t is sum_h weights[t,h] * relu(q[t,h] . k[s]) (* k_scale[s]).
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace glm5 {

// Where the keys of one sequence lie, if not one after the other: key s is row s % page_size of page table[s / page_size] of
// k. A page holds page_size rows and, of e4m3, page_size float32 scales behind them. Entries of pages that no query sees are
// not read, or, where they lie between two queries' ranges, may be anything.
struct LightningIndexerPages {
  const int32_t* table;  // [ceil(num_keys / page_size)] or null
  int64_t page_size, num_pages, page_bytes;
};

struct LightningIndexerArgs {
  int dtype;                // Dtype of q and k, kE4m3 or kInt8; "real" below is double for float64, else float
  int64_t num_queries, num_keys, num_heads, dim;
  const void* q;            // [num_queries, num_heads, dim]
  const void* k;            // [num_keys, dim]
  LightningIndexerPages pages;  // lightning_indexer_topk alone
  const float* k_scale;     // [num_keys] or null
  const void* weights;      // [num_queries, num_heads]        real
  const int32_t* ks;        // [num_queries]                   keys of query t: [ks[t], ke[t])
  const int32_t* ke;        // [num_queries]
  void* scores;             // [num_queries, num_keys]         real; [num_queries, topk] for selected keys
  int64_t topk;
  int32_t* chosen;          // [num_queries, topk]             lightning_indexer_topk
  void* lse;                // [num_queries]                   real; lightning_indexer_topk
  const int32_t* indices;   // [num_queries, topk] or null     ascending, -1 padded: these keys alone
  const void* grad;         // shape of scores, real           backward
  void* dq;                 // [num_queries, num_heads, dim]   backward
  void* dk;                 // [num_keys, dim]                 backward
  void* dweights;           // [num_queries, num_heads], real  backward
};

inline constexpr int kE4m3 = 3;
inline constexpr int kInt8 = 4;

}  // namespace glm5

GLM5_DECLARE_KERNEL(void lightning_indexer_logits(const LightningIndexerArgs& args);
                    void lightning_indexer_selected_logits(const LightningIndexerArgs& args);
                    void lightning_indexer_topk(const LightningIndexerArgs& args);
                    void lightning_indexer_logits_backward(const LightningIndexerArgs& args))

// Kernels of their own for bf16 and e4m3 on AMX tiles; every other op and dtype runs as AVX-512 there.
namespace glm5::cpu::amx {
void lightning_indexer_logits(const LightningIndexerArgs& args);
void lightning_indexer_selected_logits(const LightningIndexerArgs& args);
void lightning_indexer_topk(const LightningIndexerArgs& args);
}  // namespace glm5::cpu::amx
