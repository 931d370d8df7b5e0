// Dense attention backward on the CPU, with the probabilities recomputed from lse. A task is one head of one segment: a
// set of consecutive rows and the keys that they alone touch. It walks its row tiles in order and adds each tile's share
// of dk and dv to sums of its own, so every sum has one order whatever the thread count.
//
// Within a tile lanes are query rows: S^T = K Q^T and dP^T = V dO^T are kept for the tile's keys, so that delta (the sum
// of p * dP in float32 over all keys) is known before dS is formed and no product is taken twice.
#include "mla_attention/mla_attention.h"
#include "mla_attention/product.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int64_t kRows = kMlaBackwardRows, kBlock = kMlaKeyBlock;

template <class T>
struct BackwardScratch {
  using E = Operand<T>;
  using S = Acc<T>;
  int64_t dk, dv, wide_dk, wide_dv;  // rounded up to a pair; to a vector
  E *k, *v, *k_transposed;           // the segment's keys: [keys][dk], [keys][dv], [dk][keys]
  S *dk_sum, *dv_sum;                // [keys][wide_dk], [keys][wide_dv]
  S *p, *dp;                         // the tile's: [keys][kRows], transposed
  E *q_t, *dout_t, *q_rows, *dout_rows;  // packed: Q^T, dO^T, Q, dO
  E *p_block, *ds_block, *ds_packed;     // a block's: [kBlock][kRows] twice, and dS^T packed as B
  S *dq;                                 // [dk][kRows], transposed

  BackwardScratch(Carver& carver, const MlaAttentionArgs& a, int64_t keys) {
    dk = round_up(a.dk, kPair<E>), dv = round_up(a.dv, kPair<E>);
    wide_dk = round_up(a.dk, Vector<T>::kLanes), wide_dv = round_up(a.dv, Vector<T>::kLanes);
    k = carver.take<E>(keys * dk);
    v = carver.take<E>(keys * dv);
    k_transposed = carver.take<E>(a.dk * round_up(keys, kPair<E>));
    dk_sum = carver.take<S>(keys * wide_dk);
    dv_sum = carver.take<S>(keys * wide_dv);
    p = carver.take<S>(keys * kRows);
    dp = carver.take<S>(keys * kRows);
    q_t = carver.take<E>(packed_size<E>(kRows, a.dk));
    dout_t = carver.take<E>(packed_size<E>(kRows, a.dv));
    q_rows = carver.take<E>(packed_size<E>(a.dk, kRows));
    dout_rows = carver.take<E>(packed_size<E>(a.dv, kRows));
    p_block = carver.take<E>(kBlock * kRows);
    ds_block = carver.take<E>(kBlock * kRows);
    ds_packed = carver.take<E>(packed_size<E>(kRows, kBlock));
    dq = carver.take<S>(a.dk * kRows);
  }
};

// One tile: rows [tile.begin, tile.end) against keys [tile.ks, tile.ke) of the segment that starts at key `origin`.
template <class T>
void backward_tile(const MlaAttentionArgs& a, const BackwardScratch<T>& s, const MlaRowTile& tile, int64_t head,
                   int64_t origin, int64_t key_width) {
  using E = Operand<T>;
  using V = Vector<T>;
  using S = Acc<T>;
  constexpr int L = V::kLanes;
  const int64_t rows = tile.end - tile.begin, vectors = (rows + L - 1) / L, width = vectors * L;
  const int64_t q_stride = a.heads * a.dk, v_stride = a.heads * a.dv;
  const T* q = static_cast<const T*>(a.q) + tile.begin * q_stride + head * a.dk;
  const T* dout = static_cast<const T*>(a.dout) + tile.begin * v_stride + head * a.dv;
  pack_transposed(s.q_t, panel_stride<E>(a.dk), q, q_stride, rows, a.dk);
  pack_transposed(s.dout_t, panel_stride<E>(a.dv), dout, v_stride, rows, a.dv);
  pack_rows(s.q_rows, panel_stride<E>(kRows), q, q_stride, rows, a.dk);
  pack_rows(s.dout_rows, panel_stride<E>(kRows), dout, v_stride, rows, a.dv);

  // Ranges relative to the tile's first key, as floating numbers so that lanes can compare; padding rows have no keys.
  const int64_t num_keys = tile.ke - tile.ks, first = tile.ks - origin;
  alignas(64) S from[kRows], to[kRows], lse[kRows], delta[kRows];
  for (int64_t r = 0; r < width; ++r) {
    const int64_t row = tile.begin + r;
    const bool any = r < rows && a.ks[row] < a.ke[row];
    from[r] = any ? static_cast<S>(a.ks[row] - tile.ks) : S(0);
    to[r] = any ? static_cast<S>(a.ke[row] - tile.ks) : S(0);
    lse[r] = r < rows ? static_cast<const S*>(a.lse)[row * a.heads + head] : S(0);
    delta[r] = 0;
  }

  const V scale = splat<V>(static_cast<S>(a.scale)), zero = splat<V>(0);
  for (int64_t block = 0; block < num_keys; block += kBlock) {
    const int64_t keys = smaller(kBlock, num_keys - block);
    S *p = s.p + block * kRows, *dp = s.dp + block * kRows;
    product(keys, vectors, s.dk, s.k + (first + block) * s.dk, s.dk, s.q_t, panel_stride<E>(a.dk), p, kRows,
            Into::replace);
    product(keys, vectors, s.dv, s.v + (first + block) * s.dv, s.dv, s.dout_t, panel_stride<E>(a.dv), dp, kRows,
            Into::replace);
    for (int64_t i = 0; i < width; i += L) {
      const V lo = lanes(from + i), hi = lanes(to + i), shift = lanes(lse + i);
      V sums = zero;
      for (int64_t j = 0; j < keys; ++j) {
        const V key = splat<V>(static_cast<S>(block + j));
        const V weight = exp(lanes(p + j * kRows + i) * scale - shift);
        const V inside = where_lt(key, lo, zero, where_lt(key, hi, weight, zero));
        const V slope = where_lt(key, lo, zero, where_lt(key, hi, lanes(dp + j * kRows + i), zero));
        store(p + j * kRows + i, inside);
        store(dp + j * kRows + i, slope);
        sums = fma(inside, slope, sums);
      }
      store(delta + i, lanes(delta + i) + sums);
    }
  }
  if (a.dlse)
    for (int64_t r = 0; r < rows; ++r) delta[r] -= static_cast<const S*>(a.dlse)[(tile.begin + r) * a.heads + head];

  for (int64_t i = 0; i < a.dk * kRows; ++i) s.dq[i] = 0;
  for (int64_t block = 0; block < num_keys; block += kBlock) {
    const int64_t keys = smaller(kBlock, num_keys - block);
    for (int64_t j = 0; j < keys; ++j)
      for (int64_t i = 0; i < width; i += L) {
        const int64_t at = (block + j) * kRows + i;
        const V weight = lanes(s.p + at);
        store(s.p_block + j * kRows + i, weight);
        store(s.ds_block + j * kRows + i, weight * (lanes(s.dp + at) - lanes(delta + i)));
      }
    pack_rows(s.ds_packed, panel_stride<E>(kBlock), s.ds_block, kRows, keys, width);
    product(keys, s.wide_dv / L, rows, s.p_block, kRows, s.dout_rows, panel_stride<E>(kRows),
            s.dv_sum + (first + block) * s.wide_dv, s.wide_dv, Into::add);
    product(keys, s.wide_dk / L, rows, s.ds_block, kRows, s.q_rows, panel_stride<E>(kRows),
            s.dk_sum + (first + block) * s.wide_dk, s.wide_dk, Into::add);
    product(a.dk, vectors, keys, s.k_transposed + first + block, key_width, s.ds_packed, panel_stride<E>(kBlock), s.dq,
            kRows, Into::add);
  }
  for (int64_t r = 0; r < rows; ++r) {
    T* dq = static_cast<T*>(a.dq) + (tile.begin + r) * q_stride + head * a.dk;
    for (int64_t i = 0; i < a.dk; ++i) dq[i] = round_to<T>(s.dq[i * kRows + r] * static_cast<S>(a.scale));
  }
}

template <class T>
void backward_segment(const MlaAttentionArgs& a, const MlaSegment& segment, int64_t head) {
  using E = Operand<T>;
  using V = Vector<T>;
  using S = Acc<T>;
  constexpr int L = V::kLanes;
  const int64_t keys = segment.ke - segment.ks, key_width = round_up(keys, kPair<E>);
  const int64_t k_stride = a.heads * a.dk, v_stride = a.heads * a.dv;
  Carver count{nullptr};
  BackwardScratch<T>(count, a, keys);
  Carver carver{static_cast<char*>(thread_scratch(0, count.used))};
  const BackwardScratch<T> s(carver, a, keys);
  copy_rows(s.k, s.dk, static_cast<const T*>(a.k) + segment.ks * k_stride + head * a.dk, k_stride, keys, a.dk);
  copy_rows(s.v, s.dv, static_cast<const T*>(a.v) + segment.ks * v_stride + head * a.dv, v_stride, keys, a.dv);
  for (int64_t j = 0; j < keys; ++j)
    for (int64_t i = 0; i < a.dk; ++i) s.k_transposed[i * key_width + j] = s.k[j * s.dk + i];
  for (int64_t i = 0; i < keys * s.wide_dk; ++i) s.dk_sum[i] = 0;
  for (int64_t i = 0; i < keys * s.wide_dv; ++i) s.dv_sum[i] = 0;

  for (int64_t tile = segment.begin; tile < segment.end; ++tile)
    backward_tile(a, s, a.tiles[tile], head, segment.ks, key_width);

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
  parallel_tasks(a.num_segments * a.heads, [&](int64_t task) {
    backward_segment<T>(a, a.segments[a.order[task / a.heads]], task % a.heads);
  });
}

}  // namespace

void mla_attention_backward(const MlaAttentionArgs& args) {
  if (args.dtype == 0) backward<bf16>(args);
  else if (args.dtype == 1) backward<float>(args);
#if GLM5_ISA_LEVEL == 0
  else backward<double>(args);
#endif
}

}  // namespace glm5::cpu::GLM5_ISA
