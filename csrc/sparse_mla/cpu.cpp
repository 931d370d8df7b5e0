// Sparse MLA on the CPU, plain form: every instruction set and dtype except bf16 on AVX-512 and AMX, which
// bf16_attention.h has; elsewhere bf16 is widened to float32 on the way in. The forward and the indexer's teacher; the
// gradient is in backward.cpp. A query sees only its own row, list and latent rows (row invariance).
//
// Scores and probabilities are [head][key] by blocks of kBlock list positions; latent rows are used where they lie, and
// the next block's are fetched while this one is multiplied.
//
// The forward works by segments of kSegment list positions, each with a maximum, a sum and an output of its own, which are
// then folded into the first in order. A task is a few queries where there are queries enough; else segments and groups of
// heads are tasks, with the same arithmetic.
#include "sparse_mla/sparse_mla.h"

#include "common/parallel.h"
#include "common/simd.h"
#include "sparse_mla/bf16.h"
#include "sparse_mla/rows.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int64_t kSegment = 4 * kBlock;
constexpr int64_t kHeadGroup = 8;  // heads of a task where a query is cut

template <class T>
struct Forward {
  using V = Vector<T>;
  using S = Acc<T>;
  static constexpr int L = V::kLanes;
  const SparseMlaArgs& a;
  const int64_t segments = (a.topk + kSegment - 1) / kSegment;

  // What is known of some heads after some keys: [heads][value_dim], [heads], [heads].
  struct State {
    S *acc, *max, *sum;
    void carve(Carver& c, int64_t heads, int64_t value_dim) {
      acc = c.take<S>(heads * value_dim);
      max = c.take<S>(heads);
      sum = c.take<S>(heads);
    }
    State from_head(int64_t h, int64_t value_dim) const { return {acc + h * value_dim, max + h, sum + h}; }
  };

  // One query, or some heads of it, on the way through its list.
  struct Walk {
    State total, part;  // of earlier segments, of this one; the first segment with a key works in `total`
    bool any, any_here;
    const S* q;
    S* q_buffer;
    int32_t *keys, *counts;  // [blocks][kBlock], [blocks + 1]
  };

  struct Scratch {
    Walk walks[kTogether];
    Rows<T> rows;
    S *p, *alpha;
  };

  Scratch scratch(int64_t walks, int64_t heads, int64_t positions, bool own_state) const {
    Scratch s{};
    carve_scratch(0, [&](Carver& c) {
      for (int64_t i = 0; i < walks; ++i) {
        Walk& w = s.walks[i];
        w.total.carve(c, own_state ? heads : 0, a.value_dim);
        w.part.carve(c, own_state ? heads : 0, a.value_dim);
        w.q_buffer = c.take<S>(Rows<T>::kWiden ? heads * a.dim : 0);
        w.keys = c.take<int32_t>(blocks_of(positions) * kBlock);
        w.counts = c.take<int32_t>(blocks_of(positions) + 1);
      }
      s.rows.carve(c, a.dim);
      s.p = c.take<S>(heads * kBlock);
      s.alpha = c.take<S>(heads);
    });
    return s;
  }

  // Sets out with the list positions [from, to) of heads h0 and on of query t.
  void begin(Walk& w, int64_t t, int64_t h0, int64_t heads, int64_t from, int64_t to) const {
    const int32_t* list = a.indices + t * a.topk;
    int64_t block = 0;
    for (int64_t j = from; j < to; j += kBlock, ++block)
      w.counts[block] = static_cast<int32_t>(compact(list, j, least(j + kBlock, to), w.keys + block * kBlock));
    w.counts[block] = 0;
    w.q = widened(static_cast<const T*>(a.q) + (t * a.heads + h0) * a.dim, w.q_buffer, heads * a.dim);
    w.any = w.any_here = false;
  }

  // Scores to probabilities relative to the running maximum, in place; updates maximum and sum, leaves in alpha what
  // earlier blocks are to be scaled by.
  void softmax(S* p, S* alpha, const State& state, int64_t heads, int64_t n, bool first) const {
    const S lowest = -static_cast<S>(__builtin_inf());
    const V scale = splat<V>(static_cast<S>(a.scale));
    const int64_t end = (n + L - 1) / L * L;
    // In three passes over the heads, so that no head waits for another's maximum or exponential.
    for (int64_t h = 0; h < heads; ++h) {
      S* row = p + h * kBlock;
      for (int64_t i = 0; i < n; i += L) store(row + i, load(row + i) * scale);
      for (int64_t i = n; i < end; ++i) row[i] = lowest;
      V m = splat<V>(lowest);
      for (int64_t i = 0; i < n; i += L) m = max(load(row + i), m);  // m where the score is NaN: the NaN shows in the sum
      const S before = first ? lowest : state.max[h], seen = max_lane(m), now = seen > before ? seen : before;
      alpha[h] = before - (now > lowest ? now : 0);
      state.max[h] = now;
    }
    for (int64_t h = 0; h < heads; h += L) store_n(alpha + h, exp(load_n(alpha + h, heads - h)), heads - h);
    for (int64_t h = 0; h < heads; ++h) {
      S* row = p + h * kBlock;
      const V base = splat<V>(state.max[h] > lowest ? state.max[h] : 0);
      V total = splat<V>(0);
      for (int64_t i = 0; i < n; i += L) {
        const V x = exp(load(row + i) - base);
        store(row + i, x);
        total = total + x;
      }
      state.sum[h] = first ? sum(total) : state.sum[h] * alpha[h] + sum(total);
    }
  }

  // One block; `next` is the walk, and next_block its block, that will be multiplied after it.
  void block(const Scratch& s, Walk& w, int64_t heads, int64_t i, const Walk& next, int64_t next_block) const {
    const int64_t n = w.counts[i];
    if (n == 0) return;
    const State& state = w.any ? w.part : w.total;
    s.rows.gather(a, w.keys + i * kBlock, n, next.keys + next_block * kBlock, next.counts[next_block]);
    dots<V>(s.rows.rows, n, w.q, heads, a.dim, s.p, s.rows.to_fetch());
    softmax(s.p, s.alpha, state, heads, n, !w.any_here);
    weighted<V>({s.p, s.rows.rows, n, state.acc, a.value_dim, w.any_here ? Into::scale_add : Into::store, s.alpha,
                 s.rows.to_fetch(1), 2},
                heads, a.value_dim);
    w.any_here = true;
  }

  void end_segment(Walk& w, int64_t heads) const {
    if (w.any && w.any_here) fold(w.total, w.part, heads);
    w.any |= w.any_here;
    w.any_here = false;
  }

  // total, part: of consecutive segments, both with keys. To total.
  void fold(const State& total, const State& part, int64_t heads) const {
    const S lowest = -static_cast<S>(__builtin_inf());
    for (int64_t h = 0; h < heads; ++h) {
      const S now = part.max[h] > total.max[h] ? part.max[h] : total.max[h], base = now > lowest ? now : 0;
      S of_total[L], of_part[L];
      store(of_total, exp(splat<V>(total.max[h] - base)));
      store(of_part, exp(splat<V>(part.max[h] - base)));
      total.max[h] = now;
      total.sum[h] = total.sum[h] * of_total[0] + part.sum[h] * of_part[0];
      const V x = splat<V>(of_total[0]), y = splat<V>(of_part[0]);
      S *to = total.acc + h * a.value_dim, *from = part.acc + h * a.value_dim;
      for (int64_t d = 0; d < a.value_dim; d += L) {
        const int64_t n = a.value_dim - d;
        if (n >= L) store(to + d, fma(load(from + d), y, load(to + d) * x));
        else store_n(to + d, fma(load_n(from + d, n), y, load_n(to + d, n) * x), n);
      }
    }
  }

  void finish(const State& state, int64_t t, int64_t h0, int64_t heads, bool empty) const {
    T* out = static_cast<T*>(a.out) + (t * a.heads + h0) * a.value_dim;
    S* lse = static_cast<S*>(a.lse) + t * a.heads + h0;
    for (int64_t h = 0; h < heads; ++h) {
      const bool nothing = empty || state.sum[h] == 0;  // no key, or scores of -inf alone
      lse[h] = nothing ? static_cast<S>(__builtin_inf()) : state.max[h] + log_of(state.sum[h]);
      const V inverse = splat<V>(nothing ? 0 : 1 / state.sum[h]);
      for (int64_t d = 0; d < a.value_dim; d += L) {
        const int64_t n = a.value_dim - d;
        store_n(out + h * a.value_dim + d, nothing ? splat<V>(0) : load_n(state.acc + h * a.value_dim + d, n) * inverse, n);
      }
    }
  }
  static float log_of(float x) { return __builtin_logf(x); }
  static double log_of(double x) { return __builtin_log(x); }

  // Queries t0 .. t0 + n - 1, block by block in step.
  void queries(int64_t t0, int64_t n) const {
    Scratch s = scratch(n, a.heads, a.topk, true);
    for (int64_t g = 0; g < n; ++g) begin(s.walks[g], t0 + g, 0, a.heads, 0, a.topk);
    const int64_t blocks = blocks_of(a.topk);
    for (int64_t i = 0; i < blocks; ++i) {
      for (int64_t g = 0; g < n; ++g)
        block(s, s.walks[g], a.heads, i, s.walks[g + 1 < n ? g + 1 : 0], g + 1 < n ? i : i + 1);
      if ((i + 1) % (kSegment / kBlock) == 0 || i + 1 == blocks)
        for (int64_t g = 0; g < n; ++g) end_segment(s.walks[g], a.heads);
    }
    for (int64_t g = 0; g < n; ++g) finish(s.walks[g].total, t0 + g, 0, a.heads, !s.walks[g].any);
  }

  // Few queries: every segment of every group of heads is a task, then every group is folded.
  void run_in_parts() const {
    GLM5_COUNT_PATH("sparse_mla forward in parts");
    const int64_t groups = (a.heads + kHeadGroup - 1) / kHeadGroup, states = a.queries * segments;
    State parts{};  // [query][segment][heads]
    char* any = nullptr;
    carve_scratch(1, [&](Carver& c) {
      parts.carve(c, states * a.heads, a.value_dim);
      any = c.take<char>(states * groups);
    });
    const auto heads_of = [&](int64_t group) { return least(kHeadGroup, a.heads - group * kHeadGroup); };
    parallel_tasks(states * groups, [&](int64_t task) {
      const int64_t group = task % groups, part = task / groups, t = part / segments, j = part % segments * kSegment;
      const int64_t heads = heads_of(group), h0 = group * kHeadGroup, end = least(j + kSegment, a.topk);
      Scratch s = scratch(1, heads, kSegment, false);
      Walk& w = s.walks[0];
      begin(w, t, h0, heads, j, end);
      w.total = parts.from_head(part * a.heads + h0, a.value_dim);
      for (int64_t i = 0; i < blocks_of(end - j); ++i) block(s, w, heads, i, w, i + 1);
      any[task] = w.any_here;
    });
    parallel_tasks(a.queries * groups, [&](int64_t task) {
      const int64_t group = task % groups, t = task / groups, h0 = group * kHeadGroup;
      State total{};
      bool found = false;
      for (int64_t i = 0; i < segments; ++i) {
        if (!any[(t * segments + i) * groups + group]) continue;
        const State part = parts.from_head((t * segments + i) * a.heads + h0, a.value_dim);
        if (found) fold(total, part, heads_of(group));
        else total = part;
        found = true;
      }
      finish(total, t, h0, heads_of(group), !found);
    });
  }

  void run() const {
    const int threads = num_threads();
    if (threads > 1 && a.queries < 4 * threads && (segments > 1 || a.heads > kHeadGroup)) return run_in_parts();
    const int64_t together = queries_together(a);
    parallel_tasks((a.queries + together - 1) / together,
                   [&](int64_t task) { queries(task * together, least(together, a.queries - task * together)); });
  }
};

// Head-summed probabilities, normalised over the row.
template <class T>
void attn_target(const SparseMlaArgs& a) {
  using V = Vector<T>;
  using S = Acc<T>;
  constexpr int L = V::kLanes;
  parallel_tasks(a.queries, [&](int64_t t) {
    Rows<T> rows{};
    S *q_wide = nullptr, *p = nullptr;
    int32_t* keys = nullptr;
    carve_scratch(0, [&](Carver& c) {
      rows.carve(c, a.dim);
      q_wide = c.take<S>(Rows<T>::kWiden ? a.heads * a.dim : 0);
      p = c.take<S>(a.heads * kBlock);
      keys = c.take<int32_t>(kBlock);
    });
    const S* q = widened(static_cast<const T*>(a.q) + t * a.heads * a.dim, q_wide, a.heads * a.dim);
    const S* lse = static_cast<const S*>(a.lse) + t * a.heads;
    const int32_t* list = a.indices + t * a.topk;
    S* target = static_cast<S*>(a.target) + t * a.topk;
    const V scale = splat<V>(static_cast<S>(a.scale));
    S total = 0;
    for (int64_t j = 0; j < a.topk; j += kBlock) {
      const int64_t end = least(j + kBlock, a.topk), n = compact(list, j, end, keys);
      S mass = 0;
      if (n > 0) {
        rows.gather(a, keys, n, nullptr, 0);
        dots<V>(rows.rows, n, q, a.heads, a.dim, p, nullptr);
        for (int64_t i = 0; i < n; i += L) {
          V x = splat<V>(0);
          for (int64_t h = 0; h < a.heads; ++h) x = x + exp(load(p + h * kBlock + i) * scale - splat<V>(lse[h]));
          store(p + i, x);
        }
      }
      for (int64_t i = j, k = 0; i < end; ++i) {
        target[i] = list[i] < 0 ? 0 : p[k++];
        mass += target[i];
      }
      total += mass;
    }
    const S inverse = total == 0 ? 0 : 1 / total;
    for (int64_t i = 0; i < a.topk; ++i)
      if (list[i] >= 0) target[i] *= inverse;
  });
}

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
