// The indexer's forward on the CPU: scores of every visible key, of selected keys, or straight to the top-k and the lse.
// A score is the weighted sum over heads in the order 0, 1, ..., H-1 of dot products from tile.h, in one vector lane: a
// function of its query and its key alone (row invariance).
#include "lightning_indexer/tile.h"
#include "topk_indices/topk_indices.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

// Queries that share a packed key tile, and keys that one task scores for them.
constexpr int64_t kBlockQueries = 16;
constexpr int64_t kBlockKeys = 2048;

// Adds NH heads to NV vectors of scores.
template <int NH, int NV, class E, class V>
GLM5_INLINE void add_heads(const E* heads, const typename V::Scalar* weights, int64_t steps, const E* keys,
                           V (&total)[NV]) {
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

template <class T> struct Scratch {
  Element<T>* keys;   // [steps][kTileKeys]
  Element<T>* heads;  // [queries][num_heads][steps]
  Scratch(const LightningIndexerArgs& a, int64_t queries) {
    const int64_t steps = Packing<T>::steps(a.dim);
    keys = static_cast<Element<T>*>(
        thread_scratch(0, sizeof(Element<T>) * (steps * (kTileKeys + queries * a.num_heads) + 1)));
    heads = keys + steps * kTileKeys;
  }
};

// Scores of the visible keys in [first, last) for the queries [q0, q1): key s of query t goes to
// scores[(t - q0) * stride + s - first].
template <class T>
void score_block(const LightningIndexerArgs& a, int64_t q0, int64_t q1, int64_t first, int64_t last, Real<T>* scores,
                 int64_t stride) {
  using R = Real<T>;
  const int64_t steps = Packing<T>::steps(a.dim);
  const Scratch<T> scratch(a, kBlockQueries);
  const Element<T>* heads[kBlockQueries];
  int64_t low = last, high = first;
  for (int64_t t = q0; t < q1; ++t) {
    if (a.ke[t] > a.ks[t]) low = min_of(low, a.ks[t]), high = max_of(high, a.ke[t]);
    heads[t - q0] = pack_heads(static_cast<const T*>(a.q) + t * a.num_heads * a.dim, a.num_heads, a.dim,
                               scratch.heads + (t - q0) * a.num_heads * steps);
  }
  low = max_of(low, first), high = min_of(high, last);
  alignas(64) R tile_scores[kTileKeys];
  for (int64_t tile = low / kTileKeys * kTileKeys; tile < high; tile += kTileKeys) {
    pack_keys(static_cast<const T*>(a.k), nullptr, tile, min_of(kTileKeys, a.num_keys - tile), a.dim, scratch.keys);
    for (int64_t t = q0; t < q1; ++t) {
      const int64_t begin = max_of(max_of(a.ks[t], first), tile), end = min_of(min_of(a.ke[t], last), tile + kTileKeys);
      if (begin >= end) continue;
      score_tile(heads[t - q0], static_cast<const R*>(a.weights) + t * a.num_heads, a.num_heads, steps, scratch.keys,
                 begin - tile, end - tile, tile_scores);
      R* out = scores + (t - q0) * stride - first;
      if (a.k_scale)
        for (int64_t s = begin; s < end; ++s) out[s] = tile_scores[s - tile] * a.k_scale[s];
      else
        std::memcpy(out + begin, tile_scores + begin - tile, sizeof(R) * (end - begin));
    }
  }
}

template <class R>
void fill_unseen(R* out, int64_t first, int64_t last) {
  for (int64_t s = first; s < last; ++s) out[s] = -static_cast<R>(__builtin_inf());
}

template <class T>
void logits(const LightningIndexerArgs& a) {
  using R = Real<T>;
  const int64_t query_blocks = (a.num_queries + kBlockQueries - 1) / kBlockQueries;
  const int64_t key_blocks = (a.num_keys + kBlockKeys - 1) / kBlockKeys;
  parallel_tasks(query_blocks * key_blocks, [&](int64_t task) {
    const int64_t q0 = task / key_blocks * kBlockQueries, q1 = min_of(q0 + kBlockQueries, a.num_queries);
    const int64_t first = task % key_blocks * kBlockKeys, last = min_of(first + kBlockKeys, a.num_keys);
    R* scores = static_cast<R*>(a.scores);
    score_block<T>(a, q0, q1, first, last, scores + q0 * a.num_keys + first, a.num_keys);
    for (int64_t t = q0; t < q1; ++t) {
      const bool sees = a.ke[t] > a.ks[t];
      fill_unseen(scores + t * a.num_keys, first, sees ? min_of(a.ks[t], last) : last);
      if (sees) fill_unseen(scores + t * a.num_keys, max_of(a.ke[t], first), last);
    }
  });
}

template <class T>
void selected_logits(const LightningIndexerArgs& a) {
  using R = Real<T>;
  const int64_t steps = Packing<T>::steps(a.dim);
  parallel_tasks(a.num_queries, [&](int64_t t) {
    const Scratch<T> scratch(a, 1);
    const int32_t* indices = a.indices + t * a.topk;
    R* out = static_cast<R*>(a.scores) + t * a.topk;
    int64_t count = 0;
    while (count < a.topk && indices[count] >= 0) ++count;
    const Element<T>* heads =
        pack_heads(static_cast<const T*>(a.q) + t * a.num_heads * a.dim, a.num_heads, a.dim, scratch.heads);
    alignas(64) R tile_scores[kTileKeys];
    for (int64_t i = 0; i < count; i += kTileKeys) {
      const int64_t n = min_of(kTileKeys, count - i);
      pack_keys(static_cast<const T*>(a.k), indices + i, 0, n, a.dim, scratch.keys);
      score_tile(heads, static_cast<const R*>(a.weights) + t * a.num_heads, a.num_heads, steps, scratch.keys, 0, n,
                 tile_scores);
      std::memcpy(out + i, tile_scores, sizeof(R) * n);
    }
    fill_unseen(out, count, a.topk);
  });
}

// Natural-log sum of exponentials of row[0..n): lanes and blocks are counted from row[0]. +inf where nothing is above
// -inf, NaN where anything is NaN.
template <class R>
R log_sum_exp(const R* row, int64_t n) {
  using V = Vector<R>;
  constexpr int L = V::kLanes;
  constexpr int64_t kBlock = 64 * L;
  const R infinity = static_cast<R>(__builtin_inf());
  R rest[L];  // the last, partial vector, filled up with -inf
  const int64_t whole = n / L * L;
  for (int i = 0; i < L; ++i) rest[i] = whole + i < n ? row[whole + i] : -infinity;
  V most = max(load(rest), splat<V>(-infinity));  // of a NaN and x, max is the second: NaN drops out
  for (int64_t i = 0; i < whole; i += L) most = max(load(row + i), most);
  const R largest = max_lane(most);
  if (largest == -infinity || largest == infinity) {
    for (int64_t i = 0; i < n; ++i)
      if (row[i] != row[i]) return row[i];
    return infinity;
  }
  const V shift = splat<V>(largest);
  V total = splat<V>(0);
  for (int64_t b = 0; b < whole; b += kBlock) {
    V part = splat<V>(0);
    for (int64_t i = b; i < min_of(b + kBlock, whole); i += L) part = part + exp(load(row + i) - shift);
    total = total + part;
  }
  total = total + exp(load(rest) - shift);
  if constexpr (sizeof(R) == 8) return __builtin_log(sum(total)) + largest;
  else return __builtin_logf(sum(total)) + largest;
}

// One task holds the scores of a strip of kBlockQueries rows at a time and leaves their top-k and lse behind.
template <class T>
void topk(const LightningIndexerArgs& a) {
  using R = Real<T>;
  const int64_t blocks = (a.num_queries + kBlockQueries - 1) / kBlockQueries;
  parallel_tasks(blocks, [&](int64_t task) {
    // Last rows first: with a causal mask they are the longest.
    const int64_t q0 = (blocks - 1 - task) * kBlockQueries, q1 = min_of(q0 + kBlockQueries, a.num_queries);
    int64_t low = a.num_keys, high = 0;
    for (int64_t t = q0; t < q1; ++t)
      if (a.ke[t] > a.ks[t]) low = min_of(low, a.ks[t]), high = max_of(high, a.ke[t]);
    const int64_t stride = max_of(high - low, 0);
    R* strip = static_cast<R*>(thread_scratch(1, sizeof(R) * (stride * (q1 - q0) + 1)));
    if (stride) score_block<T>(a, q0, q1, low, high, strip, stride);
    for (int64_t t = q0; t < q1; ++t) {
      const int64_t n = max_of(a.ke[t] - a.ks[t], 0);
      const R* row = strip + (t - q0) * stride + (n ? a.ks[t] - low : 0);
      select_topk(row, n, a.topk, a.ks[t], a.chosen + t * a.topk);
      static_cast<R*>(a.lse)[t] = log_sum_exp(row, n);
    }
  });
}

}  // namespace

#define GLM5_FOR_DTYPE(fn)                       \
  if (args.dtype == 0) fn<bf16>(args);           \
  else if (args.dtype == 1) fn<float>(args);     \
  else if (args.dtype == kE4m3) fn<e4m3>(args);  \
  GLM5_INDEXER_DOUBLE(fn)

void lightning_indexer_logits(const LightningIndexerArgs& args) { GLM5_FOR_DTYPE(logits) }
void lightning_indexer_selected_logits(const LightningIndexerArgs& args) { GLM5_FOR_DTYPE(selected_logits) }
void lightning_indexer_topk(const LightningIndexerArgs& args) { GLM5_FOR_DTYPE(topk) }

}  // namespace glm5::cpu::GLM5_ISA
