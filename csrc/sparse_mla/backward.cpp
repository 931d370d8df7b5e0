// The gradient of sparse MLA, plain form (cpu.cpp).
//
// It takes queries in chunks. First, query by query: probabilities p from lse, dP = dout . V,
// dS = p * (dP - sum_k p dP + dlse) * scale, dq = dS K; p and dS are kept for the chunk. Then, key range by key range: a
// row's dkv += dS^T q + p^T dout, queries ascending. One pass, no atomics: the inputs alone fix the order of every sum.
#include "common/parallel.h"
#include "common/simd.h"
#include "sparse_mla/bf16.h"
#include "sparse_mla/rows.h"
#include "sparse_mla/sparse_mla.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

// x with zeros from lane n on.
template <class V>
GLM5_INLINE V first_lanes(V x, int64_t n) {
  typename V::Scalar lanes[V::kLanes];
  store(lanes, x);
  return load_n(lanes, n);
}

template <class T>
struct Backward {
  using V = Vector<T>;
  using S = Acc<T>;
  static constexpr int L = V::kLanes;
  static constexpr bool kWiden = sizeof(T) != sizeof(S);
  const SparseMlaArgs& a;
  const int64_t blocks = blocks_of(a.topk), kept = blocks * a.heads * kBlock;  // elements of a query's p
  int64_t chunk = 0, range_shift = 0, ranges = 0;

  // Of the chunk's queries, [slot] outermost.
  S *p = nullptr, *ds = nullptr;  // [blocks][heads][kBlock]
  S *q_wide = nullptr, *dout_wide = nullptr;
  int32_t* keys = nullptr;
  int32_t *order = nullptr, *starts = nullptr;  // positions sorted by key range; [ranges + 1] starts

  void plan() {
    // A range's dkv rows should stay in the second-level cache, but a range should see a few dozen keys of a query.
    const int64_t row_bytes = a.dim * sizeof(S);
    range_shift = 4;
    while ((int64_t{2} << range_shift) * row_bytes <= (1 << 20)) ++range_shift;
    while ((int64_t{1} << range_shift) * a.topk < a.keys * 24) ++range_shift;
    while (range_shift > 6 && (a.keys >> range_shift) < 8) --range_shift;
    ranges = (a.keys + (int64_t{1} << range_shift) - 1) >> range_shift;
    const int64_t bytes = kept * 2 * sizeof(S) + 1;
    chunk = (int64_t{32} << 20) / bytes;
    if (chunk < 8 * num_threads()) chunk = 8 * num_threads();
    if (chunk > a.queries) chunk = a.queries;
    carve_scratch(1, [&](Carver& c) {
      p = c.take<S>(chunk * kept);
      ds = c.take<S>(chunk * kept);
      q_wide = c.take<S>(kWiden ? chunk * a.heads * a.dim : 0);
      dout_wide = c.take<S>(kWiden ? chunk * a.heads * a.value_dim : 0);
      keys = c.take<int32_t>(chunk * a.topk);
      order = c.take<int32_t>(chunk * a.topk);
      starts = c.take<int32_t>(chunk * (ranges + 1));
    });
  }

  // Row t of q and dout in S.
  const S* q_of(int64_t t, int64_t slot) const {
    return kWiden ? q_wide + slot * a.heads * a.dim : static_cast<const S*>(a.q) + t * a.heads * a.dim;
  }
  const S* dout_of(int64_t t, int64_t slot) const {
    const int64_t size = a.heads * a.value_dim;
    return kWiden ? dout_wide + slot * size : static_cast<const S*>(a.dout) + t * size;
  }

  // From scores and dP of a block of n keys: p in place, zeros behind, and delta += sum of p * dP.
  void probabilities(S* p_block, S* dp_block, const S* lse, int64_t n, S* delta) const {
    const V scale = splat<V>(static_cast<S>(a.scale));
    for (int64_t h = 0; h < a.heads; ++h, p_block += kBlock, dp_block += kBlock, delta += L) {
      V total = load(delta);
      for (int64_t i = 0; i < n; i += L) {
        V x = exp(load(p_block + i) * scale - splat<V>(lse[h])), y = load(dp_block + i);
        if (i + L > n) x = first_lanes(x, n - i), y = first_lanes(y, n - i);
        store(p_block + i, x);
        store(dp_block + i, y);
        total = fma(x, y, total);
      }
      store(delta, total);
    }
  }

  // p, dS and dq of queries t0 + slot .. t0 + slot + count - 1, the first two kept in slot and on. In step, as in the
  // forward.
  void queries(int64_t t0, int64_t slot0, int64_t count) const {
    struct Walk {
      const S *q, *dout, *lse;
      S *p, *ds, *acc, *delta;
      int32_t* list;
      int64_t n;
    } walks[kTogether];
    Rows<T> rows{};
    carve_scratch(0, [&](Carver& c) {
      rows.carve(c, a.dim);
      for (int64_t g = 0; g < count; ++g) {
        walks[g].acc = c.take<S>(a.heads * a.dim);
        walks[g].delta = c.take<S>(a.heads * L);
      }
    });
    int64_t most = 0;
    for (int64_t g = 0; g < count; ++g) {
      Walk& w = walks[g];
      const int64_t slot = slot0 + g, t = t0 + slot, q_size = a.heads * a.dim, dout_size = a.heads * a.value_dim;
      w.q = widened(static_cast<const T*>(a.q) + t * q_size, q_wide + slot * q_size, q_size);
      w.dout = widened(static_cast<const T*>(a.dout) + t * dout_size, dout_wide + slot * dout_size, dout_size);
      w.lse = static_cast<const S*>(a.lse) + t * a.heads;
      for (int64_t i = 0; i < a.heads * L; ++i) w.delta[i] = 0;
      w.p = p + slot * kept;
      w.ds = ds + slot * kept;
      w.list = keys + slot * a.topk;
      w.n = compact(a.indices + t * a.topk, 0, a.topk, w.list);
      if (w.n > most) most = w.n;
    }
    const auto size = [](const Walk& w, int64_t j) { return j < 0 || j >= w.n ? 0 : least(w.n - j, kBlock); };
    const auto gather = [&](int64_t g, int64_t j, int64_t step) {  // rows of block j of walk g, and what follows it
      const bool wrap = g + 1 == count;
      const Walk& next = walks[wrap ? 0 : g + 1];
      const int64_t to = wrap ? j + step : j;
      rows.gather(a, walks[g].list + j, size(walks[g], j), next.list + to, size(next, to));
    };
    for (int64_t j = 0; j < most; j += kBlock)
      for (int64_t g = 0; g < count; ++g) {
        const Walk& w = walks[g];
        const int64_t m = size(w, j), at = j * a.heads;
        if (m == 0) continue;
        gather(g, j, kBlock);
        dots<V>(rows.rows, m, w.q, a.heads, a.dim, w.p + at, rows.to_fetch());
        dots<V>(rows.rows, m, w.dout, a.heads, a.value_dim, w.ds + at, rows.to_fetch(1));
        probabilities(w.p + at, w.ds + at, w.lse, m, w.delta);
      }
    for (int64_t g = 0; g < count; ++g)
      for (int64_t h = 0; h < a.heads; ++h) {
        S* delta = walks[g].delta;
        delta[h] = sum(load(delta + h * L));
        if (a.dlse) delta[h] -= static_cast<const S*>(a.dlse)[(t0 + slot0 + g) * a.heads + h];
      }
    const V scale = splat<V>(static_cast<S>(a.scale));
    // From the last block back: its rows are those that the caches still hold.
    for (int64_t j = (most - 1) / kBlock * kBlock; j >= 0 && most > 0; j -= kBlock)
      for (int64_t g = 0; g < count; ++g) {
        const Walk& w = walks[g];
        const int64_t m = size(w, j), at = j * a.heads;
        if (m == 0) continue;
        for (int64_t h = 0; h < a.heads; ++h)
          for (int64_t i = 0; i < m; i += L) {
            S* x = w.ds + at + h * kBlock + i;
            store(x, load(w.p + at + h * kBlock + i) * (load(x) - splat<V>(w.delta[h])) * scale);
          }
        gather(g, j, -kBlock);
        weighted<V>({w.ds + at, rows.rows, m, w.acc, a.dim, j + kBlock >= w.n ? Into::store : Into::add, nullptr,
                     rows.to_fetch(), 1},
                    a.heads, a.dim);
      }
    for (int64_t g = 0; g < count; ++g) {
      const Walk& w = walks[g];
      const int64_t slot = slot0 + g;
      T* dq = static_cast<T*>(a.dq) + (t0 + slot) * a.heads * a.dim;
      for (int64_t i = 0; i < a.heads * a.dim; i += L) {
        const int64_t left = a.heads * a.dim - i;
        store_n(dq + i, w.n ? load_n(w.acc + i, left) : splat<V>(0), left);
      }
      sort_by_range(w.list, w.n, order + slot * a.topk, starts + slot * (ranges + 1));
    }
  }

  // Positions of the list by key range, stable: a range walks its keys in list order.
  void sort_by_range(const int32_t* list, int64_t n, int32_t* sorted, int32_t* start) const {
    for (int64_t r = 0; r <= ranges; ++r) start[r] = 0;
    for (int64_t i = 0; i < n; ++i) ++start[(list[i] >> range_shift) + 1];
    for (int64_t r = 0; r < ranges; ++r) start[r + 1] += start[r];
    for (int64_t i = 0; i < n; ++i) sorted[start[list[i] >> range_shift]++] = static_cast<int32_t>(i);
    for (int64_t r = ranges; r > 0; --r) start[r] = start[r - 1];
    start[0] = 0;
  }

  // Adds the chunk's share to the dkv rows of one key range.
  void range(int64_t r, int64_t t0, int64_t queries_here) const {
    constexpr int64_t kRows = 96;
    S* dkv = static_cast<S*>(a.dkv_acc);
    int64_t at[kRows];
    S* c_of[kRows];
    for (int64_t slot = 0; slot < queries_here; ++slot) {
      const int32_t* start = starts + slot * (ranges + 1) + r;
      const int32_t* sorted = order + slot * a.topk;
      const int64_t t = t0 + slot;
      const bool more = slot + 1 < queries_here;
      for (int64_t j = start[0]; j < start[1]; j += kRows) {
        const int64_t m = least(start[1] - j, kRows);
        for (int64_t i = 0; i < m; ++i) {
          const int64_t position = sorted[j + i];
          at[i] = position / kBlock * a.heads * kBlock + position % kBlock;
          c_of[i] = dkv + keys[slot * a.topk + position] * a.dim;
        }
        const bool fetch = more && j == start[0];
        scatter<V>({ds + slot * kept, p + slot * kept, at, q_of(t, slot), dout_of(t, slot), a.heads, a.dim, a.value_dim,
                    c_of, fetch ? q_of(t + 1, slot + 1) : nullptr, fetch ? dout_of(t + 1, slot + 1) : nullptr},
                   m);
      }
    }
  }

  void run() {
    const int64_t rows_per_task = 64, row_tasks = (a.keys + rows_per_task - 1) / rows_per_task;
    S* dkv = static_cast<S*>(a.dkv_acc);
    const auto rows_of = [&](int64_t task) {
      return (task + 1) * rows_per_task < a.keys ? rows_per_task : a.keys - task * rows_per_task;
    };
    parallel_tasks(row_tasks, [&](int64_t task) {
      std::memset(dkv + task * rows_per_task * a.dim, 0, sizeof(S) * a.dim * rows_of(task));
    });
    if (a.topk == 0 || a.keys == 0) {
      std::memset(a.dq, 0, sizeof(T) * a.queries * a.heads * a.dim);
      if (kWiden) std::memset(a.dkv, 0, sizeof(T) * a.keys * a.dim);
      return;
    }
    plan();
    const int64_t together = queries_together(a);
    for (int64_t t0 = 0; t0 < a.queries; t0 += chunk) {
      const int64_t here = t0 + chunk < a.queries ? chunk : a.queries - t0;
      parallel_tasks((here + together - 1) / together,
                     [&](int64_t task) { queries(t0, task * together, least(together, here - task * together)); });
      parallel_tasks(ranges, [&](int64_t r) { range(r, t0, here); });
    }
    if constexpr (kWiden)
      parallel_tasks(row_tasks, [&](int64_t task) {
        const int64_t from = task * rows_per_task * a.dim, n = rows_of(task) * a.dim;
        for (int64_t i = 0; i < n; i += L) store_n(static_cast<T*>(a.dkv) + from + i, load_n(dkv + from + i, n - i), n - i);
      });
  }
};

}  // namespace

void sparse_mla_backward(const SparseMlaArgs& args) {
#if GLM5_ISA_LEVEL == 2
  if (args.dtype == 0) return sparse_mla_backward_bf16(args);
#else
  if (args.dtype == 0) Backward<bf16>{args}.run();
#endif
  if (args.dtype == 1) Backward<float>{args}.run();
#if GLM5_ISA_LEVEL == 0
  if (args.dtype == 2) Backward<double>{args}.run();
#endif
}

}  // namespace glm5::cpu::GLM5_ISA
