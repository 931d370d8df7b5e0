// What the indexer's forward ops do with scores, whatever computed them: write them out, or keep a strip of rows and leave
// its top-k and lse behind. Included by the kernel files after they define
//   score_block<T>(args, q0, q1, first, last, scores, stride)  and  score_selected<T>(args, t, indices, count, scores).
#pragma once

#include "lightning_indexer/tile.h"
#include "topk_indices/topk_indices.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

// Queries that share a packed key tile, and keys that one task scores for them.
constexpr int64_t kBlockQueries = 32;
constexpr int64_t kBlockKeys = 2048;

// Scores of the visible keys in [first, last) for the queries [q0, q1), at most kBlockQueries: key s of query t goes to
// scores[(t - q0) * stride + s - first].
template <class T>
void score_block(const LightningIndexerArgs& a, int64_t q0, int64_t q1, int64_t first, int64_t last, Real<T>* scores,
                 int64_t stride);

// Scores of the keys indices[0..count) for query t.
template <class T>
void score_selected(const LightningIndexerArgs& a, int64_t t, const int32_t* indices, int64_t count, Real<T>* scores);

// The keys of [first, last) that any of the queries [q0, q1) sees lie in [*low, *high); empty if *low >= *high.
inline void visible_range(const LightningIndexerArgs& a, int64_t q0, int64_t q1, int64_t first, int64_t last, int64_t* low,
                          int64_t* high) {
  *low = last, *high = first;
  for (int64_t t = q0; t < q1; ++t)
    if (a.ke[t] > a.ks[t]) *low = min_of(*low, a.ks[t]), *high = max_of(*high, a.ke[t]);
  *low = max_of(*low, first), *high = min_of(*high, last);
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
  parallel_tasks(a.num_queries, [&](int64_t t) {
    const int32_t* indices = a.indices + t * a.topk;
    R* out = static_cast<R*>(a.scores) + t * a.topk;
    int64_t count = 0;
    while (count < a.topk && indices[count] >= 0) ++count;
    score_selected<T>(a, t, indices, count, out);
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

// The scores of a strip of kBlockQueries rows live while one task leaves their top-k and lse behind. Where there are too
// few strips for the threads, the threads share the keys of one strip after the other; of few keys, so many strips at a
// time that there are up to four blocks of scores for each thread.
template <class T>
void topk(const LightningIndexerArgs& a) {
  using R = Real<T>;
  const auto finish = [&](int64_t t, const R* row, int64_t first, bool chooses = true, bool sums = true) {
    const int64_t n = max_of(a.ke[t] - a.ks[t], 0);
    const R* mine = row + (n ? a.ks[t] - first : 0);
    if (chooses) select_topk(mine, n, a.topk, a.ks[t], a.chosen + t * a.topk);
    if (sums) static_cast<R*>(a.lse)[t] = log_sum_exp(mine, n);
  };
  const int64_t blocks = (a.num_queries + kBlockQueries - 1) / kBlockQueries;
  if (num_threads() > 1 && blocks < 2 * num_threads()) {
    const int64_t all_key_blocks = max_of((a.num_keys + kBlockKeys - 1) / kBlockKeys, 1);
    const int64_t together = max_of(4 * num_threads() / all_key_blocks, 1) * kBlockQueries;
    for (int64_t begin = 0; begin < a.num_queries; begin += together) {
      const int64_t end = min_of(begin + together, a.num_queries);
      const int64_t strips = (end - begin + kBlockQueries - 1) / kBlockQueries;
      int64_t low, high;
      visible_range(a, begin, end, 0, a.num_keys, &low, &high);
      const int64_t stride = max_of(high - low, 0), key_blocks = (stride + kBlockKeys - 1) / kBlockKeys;
      R* scores = static_cast<R*>(thread_scratch(4, sizeof(R) * (stride * (end - begin) + 1)));
      parallel_tasks(strips * key_blocks, [&](int64_t task) {
        const int64_t q0 = begin + task % strips * kBlockQueries, q1 = min_of(q0 + kBlockQueries, end);
        const int64_t first = low + task / strips * kBlockKeys, last = min_of(first + kBlockKeys, high);
        score_block<T>(a, q0, q1, first, last, scores + (q0 - begin) * stride + first - low, stride);
      });
      // Choosing and summing apart, so that one row has work for two threads.
      parallel_tasks(2 * (end - begin), [&](int64_t task) {
        finish(begin + task / 2, scores + task / 2 * stride, low, task % 2 == 0, task % 2 == 1);
      });
    }
    return;
  }
  parallel_tasks(blocks, [&](int64_t task) {
    // Last rows first: with a causal mask they are the longest.
    const int64_t q0 = (blocks - 1 - task) * kBlockQueries, q1 = min_of(q0 + kBlockQueries, a.num_queries);
    int64_t low, high;
    visible_range(a, q0, q1, 0, a.num_keys, &low, &high);
    const int64_t stride = max_of(high - low, 0);
    R* strip = static_cast<R*>(thread_scratch(1, sizeof(R) * (stride * (q1 - q0) + 1)));
    if (stride) score_block<T>(a, q0, q1, low, high, strip, stride);
    for (int64_t t = q0; t < q1; ++t) finish(t, strip + (t - q0) * stride, low);
  });
}

}  // namespace
}  // namespace glm5::cpu::GLM5_ISA
