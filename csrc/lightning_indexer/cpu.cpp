// The indexer's scores on the CPU, a register block of heads and keys at a time. A score is the weighted sum over heads in
// the order 0, 1, ..., H-1 of dot products from tile.h, in one vector lane: a function of its query and its key alone (row
// invariance).
#include "lightning_indexer/forward.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

// Adds NH heads to NV vectors of scores.
template <int NH, int NV, class E, class V>
GLM5_INLINE void add_heads(const E* heads, const typename V::Scalar* weights, int64_t steps, const E* keys, V (&total)[NV]) {
  V dots[NH][NV];
  dot_products<NH, NV>(heads, steps, keys, dots);
#pragma GCC unroll 8
  for (int h = 0; h < NH; ++h) {
    const V weight = splat<V>(weights[h]);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) total[v] = fma(weight, max(splat<V>(0), dots[h][v]), total[v]);  // relu(NaN) is NaN
  }
}

template <int NV, class E, class R>
void score_vectors(const E* heads, const R* weights, int64_t num_heads, int64_t steps, const E* keys, R* scores) {
  using V = Vector<R>;
  V total[NV];
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) total[v] = splat<V>(0);
  int64_t h = 0;
  for (; h + kHeads <= num_heads; h += kHeads) add_heads<kHeads, NV>(heads + h * steps, weights + h, steps, keys, total);
  if (h < num_heads) GLM5_COUNT_PATH("lightning_indexer: single head");
  for (; h < num_heads; ++h) add_heads<1, NV>(heads + h * steps, weights + h, steps, keys, total);
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) store(scores + v * V::kLanes, total[v]);
}

// scores[i] for the keys i of a tile in [first, last), and perhaps for their neighbours in the same vectors.
template <class E, class R>
void score_tile(const E* heads, const R* weights, int64_t num_heads, int64_t steps, const E* keys, int64_t first,
                int64_t last, R* scores) {
  constexpr int64_t L = Vector<R>::kLanes;
  int64_t i = first / L * L;
  for (; i + kVectors * L <= kTileKeys && i + (kVectors - 1) * L < last; i += kVectors * L) {
    GLM5_COUNT_PATH("lightning_indexer: full register block");
    score_vectors<kVectors>(heads, weights, num_heads, steps, keys + i, scores + i);
  }
  for (; i < last; i += L) {
    GLM5_COUNT_PATH("lightning_indexer: single vector of keys");
    score_vectors<1>(heads, weights, num_heads, steps, keys + i, scores + i);
  }
}

template <class T>
void score_block(const LightningIndexerArgs& a, int64_t q0, int64_t q1, int64_t first, int64_t last, Real<T>* scores,
                 int64_t stride) {
  using R = Real<T>;
  const int64_t steps = Packing<T>::steps(a.dim);
  const Scratch<T> scratch(a, kBlockQueries);
  const Element<T>* heads[kBlockQueries];
  int64_t low, high;
  visible_range(a, q0, q1, first, last, &low, &high);
  for (int64_t t = q0; t < q1; ++t)
    heads[t - q0] = pack_heads(static_cast<const T*>(a.q) + t * a.num_heads * a.dim, a.num_heads, a.dim,
                               scratch.heads + (t - q0) * a.num_heads * steps);
  TileKeys<T> keys(a);
  alignas(64) R tile_scores[kTileKeys];
  for (int64_t tile = low / kTileKeys * kTileKeys; tile < high; tile += kTileKeys) {
    keys.pack(tile, low, high, scratch.keys);
    for (int64_t t = q0; t < q1; ++t) {
      const int64_t begin = max_of(max_of(a.ks[t], first), tile), end = min_of(min_of(a.ke[t], last), tile + kTileKeys);
      if (begin >= end) continue;
      score_tile(heads[t - q0], static_cast<const R*>(a.weights) + t * a.num_heads, a.num_heads, steps, scratch.keys,
                 begin - tile, end - tile, tile_scores);
      R* out = scores + (t - q0) * stride - first;
      if (keys.scale)
        for (int64_t s = begin; s < end; ++s) out[s] = tile_scores[s - tile] * keys.scale[s - tile];
      else std::memcpy(out + begin, tile_scores + begin - tile, sizeof(R) * (end - begin));
    }
  }
}

template <class T>
void score_selected(const LightningIndexerArgs& a, int64_t t, const int32_t* indices, int64_t count, Real<T>* scores) {
  using R = Real<T>;
  const int64_t steps = Packing<T>::steps(a.dim);
  const Scratch<T> scratch(a, 1);
  const Element<T>* heads = pack_heads(static_cast<const T*>(a.q) + t * a.num_heads * a.dim, a.num_heads, a.dim,
                                       scratch.heads);
  alignas(64) R tile_scores[kTileKeys];
  for (int64_t i = 0; i < count; i += kTileKeys) {
    const int64_t n = min_of(kTileKeys, count - i);
    pack_keys(KeyRows<T>{static_cast<const T*>(a.k), a.dim, indices + i}, n, scratch.keys);
    score_tile(heads, static_cast<const R*>(a.weights) + t * a.num_heads, a.num_heads, steps, scratch.keys, 0, n,
               tile_scores);
    std::memcpy(scores + i, tile_scores, sizeof(R) * n);
  }
}

}  // namespace

#define GLM5_FOR_DTYPE(fn) \
  if (args.dtype == 0) fn<bf16>(args); \
  else if (args.dtype == 1) fn<float>(args); \
  else if (args.dtype == kE4m3) fn<e4m3>(args); \
  GLM5_INDEXER_DOUBLE(fn)

void lightning_indexer_logits(const LightningIndexerArgs& args) { GLM5_FOR_DTYPE(logits) }
void lightning_indexer_selected_logits(const LightningIndexerArgs& args) { GLM5_FOR_DTYPE(selected_logits) }
void lightning_indexer_topk(const LightningIndexerArgs& args) { GLM5_FOR_DTYPE(topk) }

}  // namespace glm5::cpu::GLM5_ISA
