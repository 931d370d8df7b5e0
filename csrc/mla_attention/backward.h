// Dense attention backward, with the probabilities recomputed from lse. A task is one head of one segment: a
// set of consecutive rows and the keys that they alone touch. It walks its row tiles in order and adds each tile's share
// of dk and dv to sums of its own, so every sum has one order whatever the thread count.
//
// Within a tile lanes are query rows: S^T = K Q^T and dP^T = V dO^T are kept for the tile's keys, so that delta (the sum
// of p * dP in float32 over all keys) is known before dS is formed and no product is taken twice.
//
// Rows and keys of a tile that do not see each other meet in these products with weight 0, which is harmless only while
// the numbers are finite. A tile where some are not takes the products with zeros in their place, and then adds
// what they give to those who see them: no other gradient changes by a bit.
#pragma once

#include "mla_attention/finite.h"
#include "mla_attention/mla_attention.h"
#include "mla_attention/softmax.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

// Rows and keys of one step.
constexpr int64_t kRows = kMlaBackwardRows, kBlock = 256;

template <class T>
struct BackwardScratch {
  using E = Operand<T>;
  using S = Acc<T>;
  int64_t dk, dv, wide_dk, wide_dv, key_width;  // dims rounded up to kStep; to a vector; the segment's keys to kStep
  E *k, *v, *k_transposed;                      // the segment's keys: [keys][dk], [keys][dv], [dk][key_width]
  S *dk_sum, *dv_sum;                           // [keys][wide_dk], [keys][wide_dv]
  S *p, *dp;                                    // the tile's: [keys][kRows], transposed
  E *q_t, *dout_t, *q_rows, *dout_rows;         // packed: Q^T, dO^T, Q, dO
  E *p_block, *ds_block, *ds_packed;            // a block's: [kBlock][kRows] twice, and dS^T packed as B
  S *dq, *dq_rows;                              // [dk][kRows], transposed; packed as B, which is [kRows][dk] in panels

  BackwardScratch(Carver& carver, const MlaAttentionArgs& a, int64_t keys) {
    dk = round_up(a.dk, kStep<E>), dv = round_up(a.dv, kStep<E>);
    wide_dk = round_up(a.dk, Vector<T>::kLanes), wide_dv = round_up(a.dv, Vector<T>::kLanes);
    key_width = round_up(keys + kStep<E> - 1, kStep<E>);  // a block may start at any key
    const int64_t places = keys + kRowStep<E> - 1, rows = round_up(a.dk, kRowStep<E>);
    k = carver.take<E>(places * dk);
    v = carver.take<E>(places * dv);
    k_transposed = carver.take<E>(rows * key_width);
    dk_sum = carver.take<S>(places * wide_dk);
    dv_sum = carver.take<S>(places * wide_dv);
    p = carver.take<S>(places * kRows);
    dp = carver.take<S>(places * kRows);
    q_t = carver.take<E>(packed_size<E>(kRows, a.dk));
    dout_t = carver.take<E>(packed_size<E>(kRows, a.dv));
    q_rows = carver.take<E>(packed_size<E>(a.dk, kRows));
    dout_rows = carver.take<E>(packed_size<E>(a.dv, kRows));
    p_block = carver.take<E>(kBlock * kRows);
    ds_block = carver.take<E>(kBlock * kRows);
    ds_packed = carver.take<E>(packed_size<E>(kRows, kBlock));
    dq = carver.take<S>(rows * kRows);
    dq_rows = carver.take<S>(packed_size<S>(a.dk, kRows));
  }
};

// The rows of a tile as lanes: the keys that each sees, counted from the tile's first, and its numbers.
template <class T>
struct TileRows {
  using S = Acc<T>;
  int64_t width;  // rows rounded up: the padding repeats the last row's keys, with lse +inf
  alignas(64) S from[kRows], to[kRows], shift[kRows], delta[kRows];
  // For each vector of rows: no row sees a key before `any_from` or from `any_to` on, every row sees
  // [all_from, all_to).
  int64_t any_from[kRows], all_from[kRows], all_to[kRows], any_to[kRows];

  TileRows(const MlaAttentionArgs& a, const MlaRowTile& tile, int64_t head) {
    constexpr int L = Vector<T>::kLanes;
    const int64_t rows = tile.end - tile.begin;
    width = round_up(rows, L);
    for (int64_t r = 0; r < width; ++r) {
      const int64_t row = smaller(tile.begin + r, tile.end - 1);
      const bool any = a.ks[row] < a.ke[row];
      const int64_t first = any ? a.ks[row] - tile.ks : 0, last = any ? a.ke[row] - tile.ks : 0;
      from[r] = static_cast<S>(first), to[r] = static_cast<S>(last);
      shift[r] = r < rows ? -static_cast<const S*>(a.lse)[row * a.heads + head] * static_cast<S>(kLog2e)
                          : static_cast<S>(-__builtin_inf());
      delta[r] = 0;
      const int64_t v = r / L;
      const bool start = r % L == 0;
      any_from[v] = start ? first : smaller(any_from[v], first);
      all_from[v] = start ? first : larger(all_from[v], first);
      all_to[v] = start ? last : smaller(all_to[v], last);
      any_to[v] = start ? last : larger(any_to[v], last);
    }
  }
};

// Probabilities and their slopes dP of keys [block, block + keys) from scores, in place; zeros where a row does not see
// the key, whatever that key holds. Adds to delta.
template <class T>
void probabilities(const TileRows<T>& t, Acc<T> factor, int64_t block, int64_t keys, Acc<T>* p, Acc<T>* dp, Acc<T>* delta) {
  using V = Vector<T>;
  using S = Acc<T>;
  constexpr int L = V::kLanes;
  const V scale = splat<V>(factor), zero = splat<V>(0);
  for (int64_t i = 0; i < t.width; i += L) {
    const int64_t v = i / L;
    const V lo = lanes(t.from + i), hi = lanes(t.to + i), shift = lanes(t.shift + i);
    V sums = zero;
    const int64_t none = smaller(keys, larger(0, t.any_from[v] - block));
    const int64_t some_end = larger(none, smaller(keys, t.any_to[v] - block));
    const int64_t all = smaller(some_end, larger(none, t.all_from[v] - block));
    const int64_t all_end = larger(all, smaller(some_end, t.all_to[v] - block));
    const auto clear = [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) store(p + j * kRows + i, zero), store(dp + j * kRows + i, zero);
    };
    const auto some = [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        const V key = splat<V>(static_cast<S>(block + j));
        const V weight = pow2(fma(lanes(p + j * kRows + i), scale, shift));
        const V inside = where_lt(key, lo, zero, where_lt(key, hi, weight, zero));
        const V slope = where_lt(key, lo, zero, where_lt(key, hi, lanes(dp + j * kRows + i), zero));
        store(p + j * kRows + i, inside);
        store(dp + j * kRows + i, slope);
        sums = fma(inside, slope, sums);
      }
    };
    clear(0, none);
    some(none, all);
    for (int64_t j = all; j < all_end; ++j) {
      const V weight = pow2(fma(lanes(p + j * kRows + i), scale, shift));
      store(p + j * kRows + i, weight);
      sums = fma(weight, lanes(dp + j * kRows + i), sums);
    }
    some(all_end, some_end);
    clear(some_end, keys);
    store(delta + i, lanes(delta + i) + sums);
  }
}

// For a tile with values that are not finite. Before the products of keys [block, block + keys): nothing but zeros between
// a row and the keys that it does not see.
template <class T>
void clear_unseen(const TileRows<T>& t, int64_t rows, int64_t block, int64_t keys, const BackwardScratch<T>& s) {
  for (int64_t j = 0; j < keys; ++j) {
    const auto key = static_cast<Acc<T>>(block + j);
    for (int64_t r = 0; r < t.width; ++r)
      if (r >= rows || key < t.from[r] || key >= t.to[r]) s.p_block[j * kRows + r] = s.ds_block[j * kRows + r] = {};
  }
}

// And after them: what the values that are not finite give to dq, dk and dv. `first` is the block's first key's place in
// the segment.
template <class T>
void add_seen_not_finite(const MlaAttentionArgs& a, const TileRows<T>& t, int64_t rows, int64_t block, int64_t keys,
                         const BackwardScratch<T>& s, int64_t first, const T* q, const T* dout) {
  using V = Vector<T>;
  using S = Acc<T>;
  constexpr int L = V::kLanes;
  const V zero = splat<V>(0);
  for (int64_t j = 0; j < keys; ++j) {
    const auto* k = s.k + (first + j) * s.dk;
    if (all_finite(k, 0, 1, a.dk)) continue;
    const V key = splat<V>(static_cast<S>(block + j));
    for (int64_t d = 0; d < a.dk; ++d) {
      const S value = to_float(k[d]);
      if (value - value == 0) continue;
      for (int64_t i = 0; i < t.width; i += L) {
        const V term = load_n(s.ds_block + j * kRows + i, L) * splat<V>(value);
        const V seen = where_lt(key, lanes(t.from + i), zero, where_lt(key, lanes(t.to + i), term, zero));
        store(s.dq + d * kRows + i, lanes(s.dq + d * kRows + i) + seen);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t from = larger(static_cast<int64_t>(t.from[r]) - block, 0);
    const int64_t to = smaller(static_cast<int64_t>(t.to[r]) - block, keys);
    const T *q_row = q + r * a.heads * a.dk, *dout_row = dout + r * a.heads * a.dv;
    if (!all_finite(q_row, 0, 1, a.dk))
      for (int64_t j = from; j < to; ++j)
        add_not_finite<T>(q_row, a.dk, to_float(s.ds_block[j * kRows + r]), s.dk_sum + (first + j) * s.wide_dk);
    if (!all_finite(dout_row, 0, 1, a.dv))
      for (int64_t j = from; j < to; ++j)
        add_not_finite<T>(dout_row, a.dv, to_float(s.p_block[j * kRows + r]), s.dv_sum + (first + j) * s.wide_dv);
  }
}

// One tile: rows [tile.begin, tile.end) against keys [tile.ks, tile.ke) of the segment that starts at key `origin`
// and whose k is finite or not.
template <class T>
void backward_tile(const MlaAttentionArgs& a, const BackwardScratch<T>& s, const MlaRowTile& tile, int64_t head,
                   int64_t origin, bool finite_keys) {
  using E = Operand<T>;
  using V = Vector<T>;
  using S = Acc<T>;
  constexpr int L = V::kLanes;
  const int64_t rows = tile.end - tile.begin, num_keys = tile.ke - tile.ks, first = tile.ks - origin;
  const int64_t q_stride = a.heads * a.dk, v_stride = a.heads * a.dv;
  const T* q = static_cast<const T*>(a.q) + tile.begin * q_stride + head * a.dk;
  const T* dout = static_cast<const T*>(a.dout) + tile.begin * v_stride + head * a.dv;
  TileRows<T> t(a, tile, head);
  const int64_t vectors = t.width / L;
  pack_transposed(s.q_t, panel_stride<E>(a.dk), q, q_stride, rows, a.dk);
  pack_transposed(s.dout_t, panel_stride<E>(a.dv), dout, v_stride, rows, a.dv);
  pack_rows(s.q_rows, panel_stride<E>(kRows), q, q_stride, rows, a.dk);
  pack_rows(s.dout_rows, panel_stride<E>(kRows), dout, v_stride, rows, a.dv);

  for (int64_t block = 0; block < num_keys; block += kBlock) {
    const int64_t keys = smaller(kBlock, num_keys - block);
    S *p = s.p + block * kRows, *dp = s.dp + block * kRows;
    product(keys, vectors, s.dk, s.k + (first + block) * s.dk, s.dk, s.q_t, panel_stride<E>(a.dk), p, kRows, Into::replace);
    product(keys, vectors, s.dv, s.v + (first + block) * s.dv, s.dv, s.dout_t, panel_stride<E>(a.dv), dp, kRows,
            Into::replace);
    probabilities(t, static_cast<S>(a.scale * kLog2e), block, keys, p, dp, t.delta);
  }
  if (a.dlse)
    for (int64_t r = 0; r < rows; ++r) t.delta[r] -= static_cast<const S*>(a.dlse)[(tile.begin + r) * a.heads + head];

  // A v, lse or dlse that is not finite, or a sum that overflows, shows in the delta of the rows that it belongs to.
  const bool finite = finite_keys && all_finite(t.delta, 0, 1, t.width) && all_finite(q, q_stride, rows, a.dk) &&
                      all_finite(dout, v_stride, rows, a.dv);
  if (!finite) {
    GLM5_COUNT_PATH("mla backward with values that are not finite");
    clear_not_finite(s.q_rows, packed_size<E>(a.dk, kRows));
    clear_not_finite(s.dout_rows, packed_size<E>(a.dv, kRows));
  }

  std::memset(s.dq, 0, sizeof(S) * static_cast<size_t>(a.dk * kRows));
  for (int64_t block = 0; block < num_keys; block += kBlock) {
    const int64_t keys = smaller(kBlock, num_keys - block);
    for (int64_t i = 0; i < t.width; i += L) {
      const V delta = lanes(t.delta + i);
      for (int64_t j = 0; j < keys; ++j) {
        const int64_t at = (block + j) * kRows + i;
        const V weight = lanes(s.p + at);
        store_operand(s.p_block + j * kRows + i, weight);
        store_operand(s.ds_block + j * kRows + i, weight * (lanes(s.dp + at) - delta));
      }
    }
    if (!finite) clear_unseen(t, rows, block, keys, s);
    if constexpr (kTiles<E>) {  // products read rows up to kStep and keys up to kRowStep
      const int64_t places = round_up(keys, kRowStep<E>);
      for (int64_t j = 0; j < places; ++j) {
        const int64_t filled = j < keys ? t.width : 0;
        std::memset(s.p_block + j * kRows + filled, 0, sizeof(E) * static_cast<size_t>(kRows - filled));
        std::memset(s.ds_block + j * kRows + filled, 0, sizeof(E) * static_cast<size_t>(kRows - filled));
      }
    }
    pack_rows(s.ds_packed, panel_stride<E>(kBlock), s.ds_block, kRows, keys, t.width);
    product(keys, s.wide_dv / L, rows, s.p_block, kRows, s.dout_rows, panel_stride<E>(kRows),
            s.dv_sum + (first + block) * s.wide_dv, s.wide_dv, Into::add);
    product(keys, s.wide_dk / L, rows, s.ds_block, kRows, s.q_rows, panel_stride<E>(kRows),
            s.dk_sum + (first + block) * s.wide_dk, s.wide_dk, Into::add);
    product(a.dk, vectors, keys, s.k_transposed + first + block, s.key_width, s.ds_packed, panel_stride<E>(kBlock), s.dq,
            kRows, Into::add);
    if (!finite) add_seen_not_finite(a, t, rows, block, keys, s, first + block, q, dout);
  }
  constexpr int W = kPanel<S>;
  pack_transposed(s.dq_rows, panel_stride<S>(kRows), s.dq, kRows, a.dk, rows);
  const V scale = splat<V>(static_cast<S>(a.scale));
  for (int64_t r = 0; r < rows; ++r) {
    T* dq = static_cast<T*>(a.dq) + (tile.begin + r) * q_stride + head * a.dk;
    for (int64_t i = 0; i < a.dk; i += L)
      store_n(dq + i, lanes(s.dq_rows + i / W * panel_stride<S>(kRows) + r * W + i % W) * scale, a.dk - i);
  }
}

template <class T>
void backward_segment(const MlaAttentionArgs& a, const MlaSegment& segment, int64_t head) {
  using V = Vector<T>;
  using S = Acc<T>;
  constexpr int L = V::kLanes;
  const int64_t keys = segment.ke - segment.ks;
  const int64_t k_stride = a.heads * a.dk, v_stride = a.heads * a.dv;
  Carver count{nullptr};
  BackwardScratch<T>(count, a, keys);
  Carver carver{static_cast<char*>(thread_scratch(0, count.used))};
  const BackwardScratch<T> s(carver, a, keys);
  copy_rows(s.k, s.dk, static_cast<const T*>(a.k) + segment.ks * k_stride + head * a.dk, k_stride, keys, a.dk);
  copy_rows(s.v, s.dv, static_cast<const T*>(a.v) + segment.ks * v_stride + head * a.dv, v_stride, keys, a.dv);
  copy_columns(s.k_transposed, s.key_width, s.k, s.dk, keys, a.dk);
  const bool finite_keys = all_finite(s.k, s.dk, keys, a.dk);
  if (!finite_keys) clear_not_finite(s.k_transposed, a.dk * s.key_width);
  std::memset(s.dk_sum, 0, sizeof(S) * static_cast<size_t>(keys * s.wide_dk));
  std::memset(s.dv_sum, 0, sizeof(S) * static_cast<size_t>(keys * s.wide_dv));
  const TileSession session;

  for (int64_t tile = segment.begin; tile < segment.end; ++tile)
    backward_tile(a, s, a.tiles[tile], head, segment.ks, finite_keys);

  const V scale = splat<V>(static_cast<S>(a.scale));
  for (int64_t j = 0; j < keys; ++j) {
    T* dk = static_cast<T*>(a.dk_out) + (segment.ks + j) * k_stride + head * a.dk;
    T* dv = static_cast<T*>(a.dv_out) + (segment.ks + j) * v_stride + head * a.dv;
    for (int64_t i = 0; i < a.dk; i += L) store_n(dk + i, lanes(s.dk_sum + j * s.wide_dk + i) * scale, a.dk - i);
    for (int64_t i = 0; i < a.dv; i += L) store_n(dv + i, lanes(s.dv_sum + j * s.wide_dv + i), a.dv - i);
  }
}

template <class T>
void backward(const MlaAttentionArgs& a) {
  parallel_tasks(a.num_segments * a.heads,
                 [&](int64_t task) { backward_segment<T>(a, a.segments[a.order[task / a.heads]], task % a.heads); });
}

}  // namespace

}  // namespace glm5::cpu::GLM5_ISA
