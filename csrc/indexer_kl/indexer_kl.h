// The indexer's training loss, KL(attention || softmax(indexer)) per query: the contract between the binding and the
// kernels. Raw pointers, sizes in elements, no torch. `real` is float, or double where the inputs are.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace glm5 {

// Queries [begin, end), at most kKlTileRows of them, whose non-empty ranges all start at ks; ke is their largest end.
struct KlTile {
  int64_t begin, end, ks, ke;
};

inline constexpr int64_t kKlTileRows = 64;
// The backward sums dk in this many parts at most, each a fixed share of the tiles, and adds the parts in order. Long
// documents get fewer: as many as fit in kKlPartsBytes, but kKlFewestParts, since no more threads than parts find work.
inline constexpr int64_t kKlParts = 16, kKlFewestParts = 4, kKlPartsBytes = 256 << 20;

struct LightningIndexerKlArgs {
  int dtype;                // Dtype of q, k, attn_q, attn_k and their gradients
  int64_t num_queries, num_keys, heads, dim, attn_heads, attn_dim, topk;
  double scale;
  const void* q;            // [num_queries, heads, dim]
  const void* k;            // [num_keys, dim]
  const void* weights;      // [num_queries, heads] real
  const int32_t* ks;        // [num_queries]; 0 <= ks, ke <= num_keys
  const int32_t* ke;        // [num_queries]
  const void* attn_q;       // [num_queries, attn_heads, attn_dim]
  const void* attn_k;       // [num_keys, attn_heads, attn_dim]; with indices [num_keys, attn_dim], shared by the heads
  const void* attn_lse;     // [num_queries, attn_heads] real
  const int32_t* indices;   // [num_queries, topk] ascending, -1 padded, inside [ks, ke); null: all keys in range
  const KlTile* tiles;      // with indices: any cut of the queries
  const int32_t* order;     // [num_tiles]: which tile starts when
  int64_t num_tiles;
  void* kl;                 // [num_queries] real                                forward
  double* stats;            // [num_queries, 2]: attention mass, lse of the indexer   forward: out, backward: in
  void* mass;               // [num_queries, topk] real, only with indices       forward: out, backward: in
  const void* dkl;          // [num_queries] real                                backward
  void* dq;                 // [num_queries, heads, dim]                         backward
  void* dk;                 // [num_keys, dim]                                   backward
  void* dweights;           // [num_queries, heads] real                         backward
  void* dk_parts;           // [num_parts, num_keys, dim] real                   backward
  int64_t num_parts;
};

struct IndexerKlLossArgs {
  bool is_float64;
  int64_t rows, columns, topk;  // without indices topk = columns
  const void* logits;       // [rows, columns]; -inf where a key may not be seen
  const void* target;       // [rows, topk]
  const int32_t* indices;   // [rows, topk], -1 selects nothing; null: all columns
  void* kl;                 // [rows]                forward
  const void* dkl;          // [rows]                backward
  void* dlogits;            // [rows, columns]       backward
};

}  // namespace glm5

GLM5_DECLARE_KERNEL(void lightning_indexer_kl_forward(const LightningIndexerKlArgs& args);
                    void lightning_indexer_kl_backward(const LightningIndexerKlArgs& args))
GLM5_DECLARE_KERNEL(void indexer_kl_loss_forward(const IndexerKlLossArgs& args);
                    void indexer_kl_loss_backward(const IndexerKlLossArgs& args))
