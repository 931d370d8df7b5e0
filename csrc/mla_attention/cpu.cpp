// Dense attention forward on the CPU: an online softmax over key blocks counted from each row's own ks, so that a row's
// bits depend on its query and its keys alone. A task is one head of one tile of rows that share ks.
#include "mla_attention/mla_attention.h"
#include "mla_attention/product.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

// Rows whose scores and probabilities of one key block are held at a time: they stay in the first-level cache.
constexpr int64_t kGroupRows = 24;

template <class T>
struct ForwardScratch {
  using E = Operand<T>;
  using S = Acc<T>;
  E *q, *k, *v, *p;      // [rows][dk], packed K^T of a block, packed V of a block, [kGroupRows][kMlaKeyBlock]
  S *scores, *pv, *out;  // [kGroupRows][kMlaKeyBlock], [kGroupRows][dv], [rows][dv]
  S *largest, *total;    // [rows]: the running maximum of the scaled scores, and the sum of exp(score - maximum)

  ForwardScratch(Carver& carver, int64_t rows, int64_t dk, int64_t dv) {
    const int64_t wide_dv = round_up(dv, Vector<T>::kLanes);
    q = carver.take<E>(rows * round_up(dk, kPair<E>));
    k = carver.take<E>(packed_size<E>(kMlaKeyBlock, dk));
    v = carver.take<E>(packed_size<E>(dv, kMlaKeyBlock));
    scores = carver.take<S>(kGroupRows * kMlaKeyBlock);
    if constexpr (sizeof(E) == sizeof(S)) p = scores;
    else p = carver.take<E>(kGroupRows * kMlaKeyBlock);
    pv = carver.take<S>(kGroupRows * wide_dv);
    out = carver.take<S>(rows * wide_dv);
    largest = carver.take<S>(rows);
    total = carver.take<S>(rows);
  }
};

// One row of one key block: scores[0..n) become probabilities relative to the running maximum, which is updated with
// the running sum; zeros up to the end of the last vector. Returns what earlier sums are to be multiplied by.
template <class T>
Acc<T> softmax_row(const Acc<T>* scores, Operand<T>* p, int64_t n, Acc<T> scale, Acc<T>& largest, Acc<T>& total) {
  using V = Vector<T>;
  using S = Acc<T>;
  constexpr int L = V::kLanes;
  const S lowest = -__builtin_inf();
  const V scales = splat<V>(scale);
  alignas(64) S tail[L];
  const int64_t whole = n / L * L;
  for (int64_t i = 0; i < L; ++i) tail[i] = whole + i < n ? scores[whole + i] * scale : lowest;
  const V last = lanes(tail);
  // max() gives its second operand where either is NaN: a NaN score is skipped here and shows in the sum.
  V top = max(last, splat<V>(lowest));
  for (int64_t i = 0; i < whole; i += L) top = max(lanes(scores + i) * scales, top);
  const S before = largest, top_lane = max_lane(top), after = top_lane > before ? top_lane : before;
  const V shift = splat<V>(after == lowest ? S(0) : after);
  V sums = splat<V>(0);
  for (int64_t i = 0; i < whole; i += L) {
    const V weight = exp(lanes(scores + i) * scales - shift);
    sums = sums + weight;
    store(p + i, weight);
  }
  if (whole < n) {
    const V weight = exp(last - shift);
    sums = sums + weight;
    store(p + whole, weight);
  }
  S fade[L];
  store(fade, exp(splat<V>(before) - shift));
  largest = after;
  total = total * fade[0] + sum(sums);
  return fade[0];
}

template <class T>
void forward_tile(const MlaAttentionArgs& a, const MlaRowTile& tile, int64_t head) {
  using E = Operand<T>;
  using V = Vector<T>;
  using S = Acc<T>;
  constexpr int L = V::kLanes;
  const int64_t rows = tile.end - tile.begin, dk = round_up(a.dk, kPair<E>), dv = round_up(a.dv, L);
  const int64_t q_stride = a.heads * a.dk, v_stride = a.heads * a.dv;
  Carver count{nullptr};
  ForwardScratch<T>(count, rows, a.dk, a.dv);
  Carver carver{static_cast<char*>(thread_scratch(0, count.used))};
  const ForwardScratch<T> s(carver, rows, a.dk, a.dv);

  copy_rows(s.q, dk, static_cast<const T*>(a.q) + tile.begin * q_stride + head * a.dk, q_stride, rows, a.dk);
  for (int64_t r = 0; r < rows; ++r) s.largest[r] = -__builtin_inf(), s.total[r] = 0;

  for (int64_t block = 0; block < tile.ke - tile.ks; block += kMlaKeyBlock) {
    const int64_t first_key = tile.ks + block, width = smaller(kMlaKeyBlock, tile.ke - first_key);
    pack_transposed(s.k, panel_stride<E>(a.dk), static_cast<const T*>(a.k) + first_key * q_stride + head * a.dk,
                    q_stride, width, a.dk);
    pack_rows(s.v, panel_stride<E>(kMlaKeyBlock), static_cast<const T*>(a.v) + first_key * v_stride + head * a.dv,
              v_stride, width, a.dv);
    for (int64_t group = 0; group < rows; group += kGroupRows) {
      const int64_t count = smaller(kGroupRows, rows - group);
      int64_t num_keys[kGroupRows], most = 0;  // of this block, for each row
      for (int64_t r = 0; r < count; ++r) {
        const int64_t row = tile.begin + group + r;
        num_keys[r] = a.ks[row] < a.ke[row] ? larger(0, smaller(width, a.ke[row] - first_key)) : 0;
        most = larger(most, num_keys[r]);
      }
      if (most == 0) continue;
      product(count, (most + L - 1) / L, dk, s.q + group * dk, dk, s.k, panel_stride<E>(a.dk), s.scores, kMlaKeyBlock,
              Into::replace);
      S fade[kGroupRows];
      for (int64_t r = 0; r < count; ++r)
        if (num_keys[r] > 0)
          fade[r] = softmax_row<T>(s.scores + r * kMlaKeyBlock, s.p + r * kMlaKeyBlock, num_keys[r],
                                   static_cast<S>(a.scale), s.largest[group + r], s.total[group + r]);
      // A row multiplies its own keys only, since 0 * NaN of a later key would leak in: rows together as far as the
      // shortest of them goes, then one by one.
      for (int64_t r = 0; r < count; r += kTileRows) {
        const int64_t together = smaller(kTileRows, count - r);
        int64_t least = num_keys[r];
        for (int64_t i = 1; i < together; ++i) least = smaller(least, num_keys[r + i]);
        least = least / kPair<E> * kPair<E>;
        product(together, dv / L, least, s.p + r * kMlaKeyBlock, kMlaKeyBlock, s.v, panel_stride<E>(kMlaKeyBlock),
                s.pv + r * dv, dv, Into::replace);
        for (int64_t i = r; i < r + together; ++i)
          if (num_keys[i] > least)
            product(1, dv / L, num_keys[i] - least, s.p + i * kMlaKeyBlock + least, kMlaKeyBlock,
                    s.v + least * kPanel<E>, panel_stride<E>(kMlaKeyBlock), s.pv + i * dv, dv, Into::resume);
      }
      for (int64_t r = 0; r < count; ++r) {
        if (num_keys[r] == 0) continue;
        S* out = s.out + (group + r) * dv;
        const V keep = splat<V>(fade[r]);
        for (int64_t i = 0; i < dv; i += L) {
          const V term = lanes(s.pv + r * dv + i);
          store(out + i, block == 0 ? term : fma(lanes(out + i), keep, term));
        }
      }
    }
  }

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = tile.begin + r;
    T* out = static_cast<T*>(a.out) + row * v_stride + head * a.dv;
    S* lse = static_cast<S*>(a.lse) + row * a.heads + head;
    if (s.total[r] == 0) {  // no key, or every score -inf
      for (int64_t i = 0; i < a.dv; ++i) out[i] = T{};
      *lse = __builtin_inf();
      continue;
    }
    const V total = splat<V>(s.total[r]);
    for (int64_t i = 0; i < a.dv; i += L) store_n(out + i, lanes(s.out + r * dv + i) / total, a.dv - i);
    *lse = s.largest[r] + natural_log(s.total[r]);
  }
}

template <class T>
void forward(const MlaAttentionArgs& a) {
  parallel_tasks(a.num_tiles * a.heads,
                 [&](int64_t task) { forward_tile<T>(a, a.tiles[a.order[task / a.heads]], task % a.heads); });
}

}  // namespace

void mla_attention_forward(const MlaAttentionArgs& args) {
  if (args.dtype == 0) forward<bf16>(args);
  else if (args.dtype == 1) forward<float>(args);
#if GLM5_ISA_LEVEL == 0
  else forward<double>(args);
#endif
}

}  // namespace glm5::cpu::GLM5_ISA
