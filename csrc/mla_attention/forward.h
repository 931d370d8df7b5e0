// Dense attention forward: an online softmax over key blocks counted from each row's own ks, so that a row's bits depend
// on its query and its keys alone. A task is one head of one tile of rows that share ks.
#pragma once

#include "mla_attention/finite.h"
#include "mla_attention/mla_attention.h"
#include "mla_attention/softmax.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

// Keys are taken in blocks of this many, counted from the ks of the query row itself: the unit of the online softmax. And
// the rows whose scores and probabilities of one block are held at a time, so that they stay in the nearest caches.
constexpr int64_t kKeyBlock = 256, kGroupRows = 24;

template <class T>
struct ForwardScratch {
  using E = Operand<T>;
  using S = Acc<T>;
  int64_t dk, dv;        // rounded up to kStep; to a vector
  E *q, *k, *v, *p;      // [rows][dk], packed K^T of a block, packed V of a block, [kGroupRows][kKeyBlock]
  S* scores;             // [kGroupRows][kKeyBlock]
  S *pv, *out;           // [kGroupRows][dv], [rows][dv]
  S *largest, *total;    // [rows]: the running maximum of the scaled scores, and the sum of 2^(score - maximum)

  ForwardScratch(Carver& carver, const MlaAttentionArgs& a, int64_t rows) {
    dk = round_up(a.dk, kStep<E>), dv = round_up(a.dv, Vector<T>::kLanes);
    const int64_t places = round_up(rows, kGroupRows);
    q = carver.take<E>(places * dk);
    k = carver.take<E>(packed_size<E>(kKeyBlock, a.dk));
    v = carver.take<E>(packed_size<E>(a.dv, kKeyBlock));
    scores = carver.take<S>(kGroupRows * kKeyBlock);
    if constexpr (sizeof(E) == sizeof(S)) p = scores;
    else p = carver.take<E>(kGroupRows * kKeyBlock);
    pv = carver.take<S>(kGroupRows * dv);
    out = carver.take<S>(places * dv);
    largest = carver.take<S>(places + Vector<T>::kLanes);  // read by vectors
    total = carver.take<S>(places);
  }
};

// Some rows against one key block: the keys that each sees, and what its earlier sums are to be multiplied by.
template <class T>
struct Group {
  int64_t first, count;
  static constexpr int64_t kPlaces = (kGroupRows + 15) / 16 * 16;
  int64_t num_keys[kPlaces], most = 0;
  alignas(64) Acc<T> shift[kPlaces], fade[kPlaces];  // minus the new maximum; and the factor

  Group(const MlaAttentionArgs& a, const MlaRowTile& tile, int64_t first_row, int64_t rows, int64_t first_key, int64_t width)
      : first(first_row), count(smaller(kGroupRows, rows - first_row)) {
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = tile.begin + first + r;
      num_keys[r] = a.ks[row] < a.ke[row] ? larger(0, smaller(width, a.ke[row] - first_key)) : 0;
      most = larger(most, num_keys[r]);
    }
  }
};

// The online softmax's step, first half: the running maxima, and what follows from them.
template <class T>
void raise_maxima(const ForwardScratch<T>& s, Group<T>& g, Acc<T> scale) {
  using V = Vector<T>;
  using S = Acc<T>;
  const V lowest = splat<V>(static_cast<S>(-__builtin_inf())), zero = splat<V>(0);
  // The last vector may reach into the next group's rows, which it must leave as they are.
  for (int64_t r = 0; r < Group<T>::kPlaces; ++r)
    g.shift[r] = r < g.count && g.num_keys[r] ? largest_score<T>(s.scores + r * kKeyBlock, g.num_keys[r], scale)
                                              : static_cast<S>(-__builtin_inf());
  for (int64_t r = 0; r < g.count; r += V::kLanes) {
    S* largest = s.largest + g.first + r;
    const V before = lanes(largest), after = max(lanes(g.shift + r), before);
    const V shift = where_lt(lowest, after, after, zero);
    store(g.fade + r, pow2(before - shift));
    store(g.shift + r, zero - shift);
    store(largest, after);
  }
}

// The second half: scores become probabilities relative to the running maximum.
template <class T>
void weigh_rows(const ForwardScratch<T>& s, const Group<T>& g, Acc<T> scale) {
  for (int64_t r = 0; r < g.count; ++r) {
    if (g.num_keys[r] == 0) continue;
    Acc<T>& total = s.total[g.first + r];
    total = total * g.fade[r] + weigh<T>(s.scores + r * kKeyBlock, s.p + r * kKeyBlock, g.num_keys[r], scale, g.shift[r]);
  }
}

// out = out * fade + P V. A row multiplies its own keys only, since 0 * NaN of a later key would leak in: rows
// together as far as the shortest of them goes, then one by one.
template <class T>
void add_values(const ForwardScratch<T>& s, const Group<T>& g, bool first_block) {
  using E = Operand<T>;
  using V = Vector<T>;
  constexpr int L = V::kLanes;
  const int64_t stride = panel_stride<E>(kKeyBlock);
  for (int64_t r = 0; r < g.count; r += kTileRows) {
    const int64_t together = smaller(kTileRows, g.count - r);
    int64_t least = g.num_keys[r];
    for (int64_t i = 1; i < together; ++i) least = smaller(least, g.num_keys[r + i]);
    least = least / kPair<E> * kPair<E>;
    product(together, s.dv / L, least, s.p + r * kKeyBlock, kKeyBlock, s.v, stride, s.pv + r * s.dv, s.dv, Into::replace);
    for (int64_t i = r; i < r + together; ++i)
      if (g.num_keys[i] > least)
        product(1, s.dv / L, g.num_keys[i] - least, s.p + i * kKeyBlock + least, kKeyBlock, s.v + least * kPanel<E>, stride,
                s.pv + i * s.dv, s.dv, Into::resume);
  }
  for (int64_t r = 0; r < g.count; ++r) {
    if (g.num_keys[r] == 0) continue;
    auto* out = s.out + (g.first + r) * s.dv;
    const V keep = splat<V>(g.fade[r]);
    for (int64_t i = 0; i < s.dv; i += L) {
      const V term = lanes(s.pv + r * s.dv + i);
      store(out + i, first_block ? term : fma(lanes(out + i), keep, term));
    }
  }
}

template <class T>
void forward_tile(const MlaAttentionArgs& a, const MlaRowTile& tile, int64_t head) {
  using E = Operand<T>;
  using V = Vector<T>;
  using S = Acc<T>;
  constexpr int L = V::kLanes;
  const int64_t rows = tile.end - tile.begin, q_stride = a.heads * a.dk, out_stride = a.heads * a.dv;
  Carver count{nullptr};
  ForwardScratch<T>(count, a, rows);
  Carver carver{static_cast<char*>(thread_scratch(0, count.used))};
  const ForwardScratch<T> s(carver, a, rows);

  copy_rows(s.q, s.dk, static_cast<const T*>(a.q) + tile.begin * q_stride + head * a.dk, q_stride, rows, a.dk);
  for (int64_t r = 0; r < rows + L; ++r) s.largest[r] = -__builtin_inf();
  for (int64_t r = 0; r < rows; ++r) s.total[r] = 0;

  const S scale = static_cast<S>(a.scale * kLog2e);
  for (int64_t block = 0; block < tile.ke - tile.ks; block += kKeyBlock) {
    const int64_t first_key = tile.ks + block, width = smaller(kKeyBlock, tile.ke - first_key);
    const T* keys = static_cast<const T*>(a.k) + first_key * q_stride + head * a.dk;
    const T* values = static_cast<const T*>(a.v) + first_key * a.v_stride + head * a.dv;
    pack_transposed(s.k, panel_stride<E>(a.dk), keys, q_stride, width, a.dk);
    pack_rows(s.v, panel_stride<E>(kKeyBlock), values, a.v_stride, width, a.dv);
    for (int64_t first = 0; first < rows; first += kGroupRows) {
      Group<T> g(a, tile, first, rows, first_key, width);
      if (g.most == 0) continue;
      product(g.count, (g.most + L - 1) / L, s.dk, s.q + first * s.dk, s.dk, s.k, panel_stride<E>(a.dk), s.scores, kKeyBlock,
              Into::replace);
      raise_maxima(s, g, scale);
      weigh_rows(s, g, scale);
      add_values(s, g, block == 0);
    }
  }

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = tile.begin + r;
    T* out = static_cast<T*>(a.out) + row * out_stride + head * a.dv;
    S* lse = static_cast<S*>(a.lse) + row * a.heads + head;
    if (s.total[r] == 0) {  // no key, or every score -inf
      for (int64_t i = 0; i < a.dv; ++i) out[i] = T{};
      *lse = __builtin_inf();
      continue;
    }
    const V total = splat<V>(s.total[r]), plus_zero = splat<V>(0);
    for (int64_t i = 0; i < a.dv; i += L) store_n(out + i, (lanes(s.out + r * s.dv + i) + plus_zero) / total, a.dv - i);
    *lse = static_cast<S>(s.largest[r] * static_cast<S>(kLn2) + natural_log(s.total[r]));
  }
}

template <class T>
void forward(const MlaAttentionArgs& a) {
  parallel_tasks(a.num_tiles * a.heads,
                 [&](int64_t task) { forward_tile<T>(a, a.tiles[a.order[task / a.heads]], task % a.heads); });
}

}  // namespace
}  // namespace glm5::cpu::GLM5_ISA
