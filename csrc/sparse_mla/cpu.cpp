// Sparse MLA on the CPU, plain form: every instruction set and dtype except bf16 on AVX-512 and AMX, which
// bf16_attention.h has; elsewhere bf16 is widened to float32 on the way in. A query is one task in the forward and sees
// only its own row, list and latent rows (row invariance).
//
// Layout: heads lie along the lanes. q is transposed once a query ([dim][padded heads]); scores and probabilities are
// [key][padded heads], so that softmax is vertical and both products that follow broadcast from it. Latent rows are used
// where they lie.
//
// The backward takes queries in chunks. First, query by query: probabilities p from lse, dP = dout . V,
// dS = p * (dP - sum_k p dP + dlse) * scale, dq = dS K; p and dS are kept for the chunk. Then, key range by key range: a
// row's dkv += dS^T q + p^T dout, queries ascending. One pass, no atomics: the inputs alone fix the order of every sum.
#include "sparse_mla/sparse_mla.h"

#include "common/parallel.h"
#include "common/simd.h"
#include "sparse_mla/bf16.h"
#include "sparse_mla/product.h"
#include "sparse_mla/scratch.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int64_t kBlock = kSparseMlaBlock;

GLM5_INLINE float log(float x) { return __builtin_logf(x); }
GLM5_INLINE double log(double x) { return __builtin_log(x); }

template <class V>
constexpr int64_t padded(int64_t n) {
  return (n + V::kLanes - 1) / V::kLanes * V::kLanes;
}

template <class T>
void widen(const T* from, Acc<T>* to, int64_t n) {
  using V = Vector<T>;
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) store(to + i, load(from + i));
  if (i < n) store_n(to + i, load_n(from + i, n - i), n - i);
}

// [heads][dim] -> [dim][padded heads], the padding zero.
template <class T>
void transpose(const T* x, Acc<T>* to, int64_t heads, int64_t dim, int64_t padded_heads) {
  for (int64_t d = 0; d < dim; ++d) {
    for (int64_t h = 0; h < heads; ++h) to[d * padded_heads + h] = to_float(x[h * dim + d]);
    for (int64_t h = heads; h < padded_heads; ++h) to[d * padded_heads + h] = 0;
  }
}

// The keys named in list[from, to), in list order. Returns how many.
int64_t compact(const int32_t* list, int64_t from, int64_t to, int32_t* keys) {
  int64_t n = 0;
  for (int64_t j = from; j < to; ++j)
    if (list[j] >= 0) keys[n++] = list[j];
  return n;
}

// Pointers to the rows of `keys` in Acc<T>: the rows themselves, or widened copies in `buffer` [n][dim].
template <class T>
void gather(const T* kv, int64_t dim, const int32_t* keys, int64_t n, Acc<T>* buffer, const Acc<T>** rows) {
  for (int64_t i = 0; i < n; ++i) {
    const T* row = kv + keys[i] * dim;
    if constexpr (sizeof(T) == sizeof(Acc<T>)) {
      rows[i] = row;
    } else {
      widen(row, buffer + i * dim, dim);
      rows[i] = buffer + i * dim;
    }
  }
}

template <class T>
struct Forward {
  using V = Vector<T>;
  using S = Acc<T>;
  static constexpr int L = V::kLanes;
  const SparseMlaArgs& a;
  const int64_t lanes = padded<V>(a.heads);  // padded heads

  // One query's working set.
  struct Scratch {
    S *qt, *rows, *p, *acc, *max, *sum, *alpha;
    const S** row_of;
    S **p_of, **acc_of;
    const S** a_of;
    int32_t* keys;
  };

  Scratch scratch() const {
    Scratch s{};
    carve_scratch(0, [&](Carver& c) {
      s.qt = c.take<S>(a.dim * lanes);
      s.rows = c.take<S>(sizeof(T) == sizeof(S) ? 0 : kBlock * a.dim);
      s.p = c.take<S>(kBlock * lanes);
      s.acc = c.take<S>(a.heads * a.value_dim);
      s.max = c.take<S>(lanes);
      s.sum = c.take<S>(lanes);
      s.alpha = c.take<S>(lanes);
      s.row_of = c.take<const S*>(kBlock);
      s.p_of = c.take<S*>(kBlock);
      s.acc_of = c.take<S*>(a.heads);
      s.a_of = c.take<const S*>(a.heads);
      s.keys = c.take<int32_t>(kBlock);
    });
    for (int64_t i = 0; i < kBlock; ++i) s.p_of[i] = s.p + i * lanes;
    for (int64_t h = 0; h < a.heads; ++h) s.acc_of[h] = s.acc + h * a.value_dim, s.a_of[h] = s.p + h;
    return s;
  }

  // Scores to probabilities relative to the running maximum, in place; updates maximum and sum, leaves in alpha what
  // earlier blocks are to be scaled by.
  void softmax(const Scratch& s, int64_t n, bool first) const {
    const V scale = splat<V>(static_cast<S>(a.scale)), lowest = splat<V>(-static_cast<S>(__builtin_inf()));
    for (int64_t h = 0; h < lanes; h += L) {
      V m = first ? lowest : load(s.max + h);
      const V before = m;
      for (int64_t i = 0; i < n; ++i) {
        const V x = load(s.p + i * lanes + h) * scale;
        store(s.p + i * lanes + h, x);
        m = max(x, m);  // keeps m where x is NaN: the NaN shows in the sum
      }
      store(s.max + h, m);
      const V base = where_lt(lowest, m, m, splat<V>(0));
      V total = splat<V>(0);
      for (int64_t i = 0; i < n; ++i) {
        const V p = exp(load(s.p + i * lanes + h) - base);
        store(s.p + i * lanes + h, p);
        total = total + p;
      }
      const V alpha = exp(before - base);
      store(s.alpha + h, alpha);
      store(s.sum + h, first ? total : fma(load(s.sum + h), alpha, total));
    }
  }

  void finish(const Scratch& s, int64_t query, bool empty) const {
    T* out = static_cast<T*>(a.out) + query * a.heads * a.value_dim;
    S* lse = static_cast<S*>(a.lse) + query * a.heads;
    for (int64_t h = 0; h < a.heads; ++h) {
      const bool nothing = empty || s.sum[h] == 0;  // no key, or scores of -inf alone
      lse[h] = nothing ? static_cast<S>(__builtin_inf()) : s.max[h] + log(s.sum[h]);
      const V inverse = splat<V>(nothing ? 0 : 1 / s.sum[h]);
      for (int64_t d = 0; d < a.value_dim; d += L) {
        const int64_t n = a.value_dim - d;
        store_n(out + h * a.value_dim + d, nothing ? splat<V>(0) : load_n(s.acc + h * a.value_dim + d, n) * inverse, n);
      }
    }
  }

  void query(int64_t t) const {
    const Scratch s = scratch();
    transpose(static_cast<const T*>(a.q) + t * a.heads * a.dim, s.qt, a.heads, a.dim, lanes);
    const int32_t* list = a.indices + t * a.topk;
    bool first = true;
    for (int64_t j = 0; j < a.topk; j += kBlock) {
      const int64_t n = compact(list, j, j + kBlock < a.topk ? j + kBlock : a.topk, s.keys);
      if (n == 0) continue;
      gather(static_cast<const T*>(a.kv), a.dim, s.keys, n, s.rows, s.row_of);
      multiply<V, false>({s.row_of, 1, nullptr, s.qt, lanes, s.p_of, Into::store, nullptr}, n, lanes, a.dim);
      softmax(s, n, first);
      multiply<V, true>({s.a_of, lanes, s.row_of, nullptr, 0, s.acc_of, first ? Into::store : Into::scale_add, s.alpha},
                        a.heads, a.value_dim, n);
      first = false;
    }
    finish(s, t, first);
  }

  void run() const {
    parallel_tasks(a.queries, [&](int64_t t) { query(t); });
  }
};

// Head-summed probabilities, normalised over the row.
template <class T>
void attn_target(const SparseMlaArgs& a) {
  using V = Vector<T>;
  using S = Acc<T>;
  constexpr int L = V::kLanes;
  const int64_t lanes = padded<V>(a.heads);
  parallel_tasks(a.queries, [&](int64_t t) {
    S *qt = nullptr, *rows = nullptr, *p = nullptr, *lse = nullptr;
    const S** row_of = nullptr;
    S** p_of = nullptr;
    int32_t* keys = nullptr;
    carve_scratch(0, [&](Carver& c) {
      qt = c.take<S>(a.dim * lanes);
      rows = c.take<S>(sizeof(T) == sizeof(S) ? 0 : kBlock * a.dim);
      p = c.take<S>(kBlock * lanes);
      lse = c.take<S>(lanes);
      row_of = c.take<const S*>(kBlock);
      p_of = c.take<S*>(kBlock);
      keys = c.take<int32_t>(kBlock);
    });
    for (int64_t i = 0; i < kBlock; ++i) p_of[i] = p + i * lanes;
    // Padded heads get p = exp(0 - inf) = 0.
    for (int64_t h = 0; h < lanes; ++h)
      lse[h] = h < a.heads ? static_cast<const S*>(a.lse)[t * a.heads + h] : static_cast<S>(__builtin_inf());
    transpose(static_cast<const T*>(a.q) + t * a.heads * a.dim, qt, a.heads, a.dim, lanes);
    const int32_t* list = a.indices + t * a.topk;
    S* target = static_cast<S*>(a.target) + t * a.topk;
    const V scale = splat<V>(static_cast<S>(a.scale));
    S total = 0;
    for (int64_t j = 0; j < a.topk; j += kBlock) {
      const int64_t end = j + kBlock < a.topk ? j + kBlock : a.topk;
      const int64_t n = compact(list, j, end, keys);
      S mass = 0;
      if (n > 0) {
        gather(static_cast<const T*>(a.kv), a.dim, keys, n, rows, row_of);
        multiply<V, false>({row_of, 1, nullptr, qt, lanes, p_of, Into::store, nullptr}, n, lanes, a.dim);
      }
      for (int64_t i = j, k = 0; i < end; ++i) {
        if (list[i] < 0) {
          target[i] = 0;
          continue;
        }
        V x = splat<V>(0);
        for (int64_t h = 0; h < lanes; h += L) x = x + exp(load(p + k * lanes + h) * scale - load(lse + h));
        target[i] = sum(x);
        mass += target[i];
        ++k;
      }
      total += mass;
    }
    const S inverse = total == 0 ? 0 : 1 / total;
    for (int64_t i = 0; i < a.topk; ++i)
      if (list[i] >= 0) target[i] *= inverse;
  });
}

template <class T>
struct Backward {
  using V = Vector<T>;
  using S = Acc<T>;
  static constexpr int L = V::kLanes;
  static constexpr bool kWiden = sizeof(T) != sizeof(S);
  const SparseMlaArgs& a;
  const int64_t lanes = padded<V>(a.heads);
  int64_t chunk = 0, range_shift = 0, ranges = 0;

  // Of the chunk's queries, [slot] outermost.
  S *p = nullptr, *ds = nullptr, *q_wide = nullptr, *dout_wide = nullptr;
  int32_t *keys = nullptr, *counts = nullptr;
  int32_t *order = nullptr, *starts = nullptr;  // positions sorted by key range; [ranges + 1] starts

  void plan() {
    // A range's dkv rows should stay in the second-level cache, but a range should see a few dozen keys of a query.
    const int64_t row_bytes = a.dim * sizeof(S);
    range_shift = 4;
    while ((int64_t{2} << range_shift) * row_bytes <= (1 << 20)) ++range_shift;
    while ((int64_t{1} << range_shift) * a.topk < a.keys * 24) ++range_shift;
    while (range_shift > 6 && (a.keys >> range_shift) < 8) --range_shift;
    ranges = (a.keys + (int64_t{1} << range_shift) - 1) >> range_shift;
    const int64_t bytes = a.topk * lanes * 2 * sizeof(S) + 1;
    chunk = (int64_t{32} << 20) / bytes;
    if (chunk < 8 * num_threads()) chunk = 8 * num_threads();
    if (chunk > a.queries) chunk = a.queries;
    carve_scratch(1, [&](Carver& c) {
      p = c.take<S>(chunk * a.topk * lanes);
      ds = c.take<S>(chunk * a.topk * lanes);
      q_wide = c.take<S>(kWiden ? chunk * a.heads * a.dim : 0);
      dout_wide = c.take<S>(kWiden ? chunk * a.heads * a.value_dim : 0);
      keys = c.take<int32_t>(chunk * a.topk);
      counts = c.take<int32_t>(chunk);
      order = c.take<int32_t>(chunk * a.topk);
      starts = c.take<int32_t>(chunk * (ranges + 1));
    });
  }

  // p, dS and dq of query t, kept in `slot`.
  void query(int64_t t, int64_t slot) const {
    S *qt = nullptr, *dt = nullptr, *rows = nullptr, *acc = nullptr, *lse = nullptr, *delta = nullptr;
    const S **row_of = nullptr, **a_of = nullptr;
    S **p_of = nullptr, **ds_of = nullptr, **acc_of = nullptr;
    carve_scratch(0, [&](Carver& c) {
      qt = c.take<S>(a.dim * lanes);
      dt = c.take<S>(a.value_dim * lanes);
      rows = c.take<S>(kWiden ? kBlock * a.dim : 0);
      acc = c.take<S>(a.heads * a.dim);
      lse = c.take<S>(lanes);
      delta = c.take<S>(lanes);
      row_of = c.take<const S*>(kBlock);
      a_of = c.take<const S*>(a.heads);
      p_of = c.take<S*>(kBlock);
      ds_of = c.take<S*>(kBlock);
      acc_of = c.take<S*>(a.heads);
    });
    const T* q = static_cast<const T*>(a.q) + t * a.heads * a.dim;
    const T* dout = static_cast<const T*>(a.dout) + t * a.heads * a.value_dim;
    const T* kv = static_cast<const T*>(a.kv);
    transpose(q, qt, a.heads, a.dim, lanes);
    transpose(dout, dt, a.heads, a.value_dim, lanes);
    if constexpr (kWiden) {
      widen(q, q_wide + slot * a.heads * a.dim, a.heads * a.dim);
      widen(dout, dout_wide + slot * a.heads * a.value_dim, a.heads * a.value_dim);
    }
    for (int64_t h = 0; h < lanes; ++h) {
      lse[h] = h < a.heads ? static_cast<const S*>(a.lse)[t * a.heads + h] : static_cast<S>(__builtin_inf());
      delta[h] = 0;
    }
    int32_t* list = keys + slot * a.topk;
    const int64_t n = compact(a.indices + t * a.topk, 0, a.topk, list);
    counts[slot] = static_cast<int32_t>(n);
    S *p_q = p + slot * a.topk * lanes, *ds_q = ds + slot * a.topk * lanes;
    const V scale = splat<V>(static_cast<S>(a.scale));
    for (int64_t j = 0; j < n; j += kBlock) {
      const int64_t m = n - j < kBlock ? n - j : kBlock;
      gather(kv, a.dim, list + j, m, rows, row_of);
      for (int64_t i = 0; i < m; ++i) p_of[i] = p_q + (j + i) * lanes, ds_of[i] = ds_q + (j + i) * lanes;
      multiply<V, false>({row_of, 1, nullptr, qt, lanes, p_of, Into::store, nullptr}, m, lanes, a.dim);
      multiply<V, false>({row_of, 1, nullptr, dt, lanes, ds_of, Into::store, nullptr}, m, lanes, a.value_dim);
      for (int64_t h = 0; h < lanes; h += L) {
        V total = splat<V>(0);
        const V minus = load(lse + h);
        for (int64_t i = 0; i < m; ++i) {
          const V x = exp(load(p_of[i] + h) * scale - minus);
          store(p_of[i] + h, x);
          total = fma(x, load(ds_of[i] + h), total);
        }
        store(delta + h, load(delta + h) + total);
      }
    }
    if (a.dlse)
      for (int64_t h = 0; h < a.heads; ++h) delta[h] -= static_cast<const S*>(a.dlse)[t * a.heads + h];
    for (int64_t h = 0; h < a.heads; ++h) acc_of[h] = acc + h * a.dim;
    for (int64_t j = 0; j < n; j += kBlock) {
      const int64_t m = n - j < kBlock ? n - j : kBlock;
      for (int64_t i = j; i < j + m; ++i)
        for (int64_t h = 0; h < lanes; h += L) {
          S* x = ds_q + i * lanes + h;
          store(x, load(p_q + i * lanes + h) * (load(x) - load(delta + h)) * scale);
        }
      if (kWiden ? n > kBlock || j > 0 : true) gather(kv, a.dim, list + j, m, rows, row_of);
      for (int64_t h = 0; h < a.heads; ++h) a_of[h] = ds_q + j * lanes + h;
      multiply<V, true>({a_of, lanes, row_of, nullptr, 0, acc_of, j ? Into::add : Into::store, nullptr}, a.heads, a.dim, m);
    }
    T* dq = static_cast<T*>(a.dq) + t * a.heads * a.dim;
    for (int64_t i = 0; i < a.heads * a.dim; i += L) {
      const int64_t left = a.heads * a.dim - i;
      store_n(dq + i, n ? load_n(acc + i, left) : splat<V>(0), left);
    }
    sort_by_range(list, n, order + slot * a.topk, starts + slot * (ranges + 1));
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
    S* dkv = static_cast<S*>(a.dkv_acc);
    const S* p_of[kBlock];
    const S* ds_of[kBlock];
    S* c_of[kBlock];
    for (int64_t slot = 0; slot < queries_here; ++slot) {
      const int32_t* start = starts + slot * (ranges + 1) + r;
      const int32_t* sorted = order + slot * a.topk;
      const S* q = kWiden ? q_wide + slot * a.heads * a.dim : static_cast<const S*>(a.q) + (t0 + slot) * a.heads * a.dim;
      const S* dout = kWiden ? dout_wide + slot * a.heads * a.value_dim
                             : static_cast<const S*>(a.dout) + (t0 + slot) * a.heads * a.value_dim;
      for (int64_t j = start[0]; j < start[1]; j += kBlock) {
        const int64_t m = start[1] - j < kBlock ? start[1] - j : kBlock;
        for (int64_t i = 0; i < m; ++i) {
          const int64_t at = slot * a.topk + sorted[j + i];
          p_of[i] = p + at * lanes;
          ds_of[i] = ds + at * lanes;
          c_of[i] = dkv + keys[at] * a.dim;
        }
        multiply<V, false>({ds_of, 1, nullptr, q, a.dim, c_of, Into::add, nullptr}, m, a.dim, a.heads);
        multiply<V, false>({p_of, 1, nullptr, dout, a.value_dim, c_of, Into::add, nullptr}, m, a.value_dim, a.heads);
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
    for (int64_t t0 = 0; t0 < a.queries; t0 += chunk) {
      const int64_t here = t0 + chunk < a.queries ? chunk : a.queries - t0;
      parallel_tasks(here, [&](int64_t slot) { query(t0 + slot, slot); });
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

void sparse_mla_find_bad_index(const SparseMlaArgs& a) {
  const int64_t total = a.queries * a.topk, step = 1 << 14;
  int64_t bad = -1;
  parallel_tasks((total + step - 1) / step, [&](int64_t task) {
    const int64_t end = (task + 1) * step < total ? (task + 1) * step : total;
    const uint32_t limit = static_cast<uint32_t>(a.keys) + 1u;
    uint32_t wrong = 0;
    for (int64_t i = task * step; i < end; ++i) wrong |= static_cast<uint32_t>(a.indices[i]) + 1u >= limit;
    if (!wrong) return;
    for (int64_t i = task * step; i < end; ++i)
      if (static_cast<uint32_t>(a.indices[i]) + 1u >= limit) {
        __atomic_store_n(&bad, i, __ATOMIC_RELAXED);
        return;
      }
  });
  *a.bad_index = bad;
}

void sparse_mla_forward(const SparseMlaArgs& args) {
#if GLM5_ISA_LEVEL == 2
  if (args.dtype == 0) return sparse_mla_forward_bf16(args);
#else
  if (args.dtype == 0) Forward<bf16>{args}.run();
#endif
  if (args.dtype == 1) Forward<float>{args}.run();
#if GLM5_ISA_LEVEL == 0
  if (args.dtype == 2) Forward<double>{args}.run();
#endif
}

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

void sparse_mla_attn_target(const SparseMlaArgs& args) {
#if GLM5_ISA_LEVEL == 2
  if (args.dtype == 0) return sparse_mla_attn_target_bf16(args);
#else
  if (args.dtype == 0) attn_target<bf16>(args);
#endif
  if (args.dtype == 1) attn_target<float>(args);
#if GLM5_ISA_LEVEL == 0
  if (args.dtype == 2) attn_target<double>(args);
#endif
}

}  // namespace glm5::cpu::GLM5_ISA
