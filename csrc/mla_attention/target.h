// The dense form of the indexer's teacher: attention probabilities recomputed from lse, summed over heads in ascending
// order and L1-normalised over each row's keys. A task is one tile of rows that share ks; heads are streamed through it.
#pragma once

#include "mla_attention/mla_attention.h"
#include "mla_attention/softmax.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int64_t kTargetBlock = 256;  // keys at a time, counted from ks

template <class T>
void target_tile(const MlaAttentionArgs& a, const MlaRowTile& tile) {
  using E = Operand<T>;
  using V = Vector<T>;
  using S = Acc<T>;
  constexpr int L = V::kLanes;
  const int64_t rows = tile.end - tile.begin, dk = round_up(a.dk, kStep<E>), stride = a.heads * a.dk;
  S* target = static_cast<S*>(a.target) + tile.begin * a.num_keys;
  for (int64_t i = 0; i < rows * a.num_keys; ++i) target[i] = 0;
  const auto num_keys = [&](int64_t r) {
    const int64_t row = tile.begin + r;
    return a.ks[row] < a.ke[row] ? static_cast<int64_t>(a.ke[row]) - tile.ks : int64_t{0};
  };

  Carver carver{nullptr};
  E *q, *k;
  S* scores;
  for (int pass = 0; pass < 2; ++pass) {
    if (pass == 1) carver = Carver{static_cast<char*>(thread_scratch(0, carver.used))};
    q = carver.take<E>(round_up(rows, kRowStep<E>) * dk);
    k = carver.take<E>(packed_size<E>(kTargetBlock, a.dk));
    scores = carver.take<S>(round_up(rows, kRowStep<E>) * kTargetBlock);
  }
  const TileSession session;
  const V scale = splat<V>(static_cast<S>(a.scale * kLog2e));
  for (int64_t block = 0; block < tile.ke - tile.ks; block += kTargetBlock) {
    const int64_t first_key = tile.ks + block, width = smaller(kTargetBlock, tile.ke - first_key);
    for (int64_t head = 0; head < a.heads; ++head) {
      copy_rows(q, dk, static_cast<const T*>(a.q) + tile.begin * stride + head * a.dk, stride, rows, a.dk);
      pack_transposed(k, panel_stride<E>(a.dk), static_cast<const T*>(a.k) + first_key * stride + head * a.dk, stride, width,
                      a.dk);
      product(rows, (width + L - 1) / L, dk, q, dk, k, panel_stride<E>(a.dk), scores, kTargetBlock, Into::replace);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t n = smaller(width, num_keys(r) - block);
        const V shift = splat<V>(-static_cast<const S*>(a.lse)[(tile.begin + r) * a.heads + head] * static_cast<S>(kLog2e));
        S* sums = target + r * a.num_keys + first_key;
        for (int64_t i = 0; i < n; i += L)
          store_n(sums + i, load_n(sums + i, n - i) + pow2(fma(lanes(scores + r * kTargetBlock + i), scale, shift)), n - i);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t n = num_keys(r);
    S* row = target + r * a.num_keys + tile.ks;
    S total = 0;
    for (int64_t block = 0; block < n; block += kTargetBlock) {
      const int64_t end = smaller(n, block + kTargetBlock);
      V sums = splat<V>(0);
      for (int64_t i = block; i < end; i += L) sums = sums + load_n(row + i, end - i);
      total += sum(sums);
    }
    if (total == 0) continue;
    const V divisor = splat<V>(total);
    for (int64_t i = 0; i < n; i += L) store_n(row + i, load_n(row + i, n - i) / divisor, n - i);
  }
}

template <class T>
void target(const MlaAttentionArgs& a) {
  parallel_tasks(a.num_tiles, [&](int64_t task) { target_tile<T>(a, a.tiles[a.order[task]]); });
}

}  // namespace

}  // namespace glm5::cpu::GLM5_ISA
