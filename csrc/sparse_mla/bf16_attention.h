// Sparse MLA in bf16 on the products of pairs.h: the same steps as cpu.cpp, heads along the lanes, but with every
// operand in bf16. Probabilities are rounded to bf16 for the product with the values, and the sum of the rounded ones
// divides it, so that their rounding cancels where one key dominates; lse comes from the unrounded ones. In the backward
// p and dS are rounded for the products, after the sum of p * dP and its subtraction in float32.
//
// bf16.cpp compiles this for AVX-512, amx.cpp for AMX.
#pragma once

#include "sparse_mla/pairs.h"
#include "sparse_mla/scratch.h"
#include "sparse_mla/sparse_mla.h"

#if GLM5_ISA_LEVEL == 2

namespace glm5::cpu::GLM5_ISA {
namespace {

// Tiles want longer sums between two visits of the accumulators.
inline constexpr int64_t kPairBlock = kTiles ? 256 : 128;

inline const uint16_t* words_of(const void* p) { return static_cast<const uint16_t*>(p); }

struct Shape {
  const SparseMlaArgs& a;
  int64_t lanes, dim32, value32, topk32;
  explicit Shape(const SparseMlaArgs& args)
      : a(args),
        lanes(round_up(args.heads, 16)),
        dim32(round_up(args.dim, 32)),
        value32(round_up(args.value_dim, 32)),
        topk32(round_up(args.topk, 32)) {}
  int64_t block() const { return topk32 < kPairBlock ? topk32 : kPairBlock; }
};

// Where there are fewer queries than threads a query's heads are cut into so many groups of whole lanes, each of which is a
// call of its own: no sum runs over heads. 1 where they are not to be cut.
inline int64_t head_groups(const SparseMlaArgs& a) {
  const int64_t tiles = (a.heads + 15) / 16, threads = num_threads();
  if (a.queries < 1 || a.queries >= threads) return 1;
  int64_t groups = (threads + a.queries - 1) / a.queries;
  if (groups > tiles) groups = tiles;
  // A last group of few heads would be summed in another way.
  const auto last = [&] { return a.heads - (groups - 1) * ((tiles + groups - 1) / groups * 16); };
  while (groups > 1 && (last() < 1 || few_heads(last()))) --groups;
  return groups;
}

// part(arguments of one query and one group of its heads) for all of them.
template <class Part>
void for_each_head_group(const SparseMlaArgs& a, int64_t groups, const Part& part) {
  GLM5_COUNT_PATH("sparse_mla heads as tasks");
  const int64_t size = ((a.heads + 15) / 16 + groups - 1) / groups * 16;
  parallel_tasks(a.queries * groups, [&](int64_t task) {
    const int64_t first = task % groups * size, row = task / groups * a.heads + first;
    SparseMlaArgs mine = a;
    mine.queries = 1;
    mine.heads = a.heads - first < size ? a.heads - first : size;
    mine.q = words_of(a.q) + row * a.dim;
    mine.indices = a.indices + task / groups * a.topk;
    mine.out = static_cast<uint16_t*>(a.out) + row * a.value_dim;
    mine.lse = static_cast<float*>(a.lse) + row;
    part(mine);
  });
}

#if !defined(__AMX_BF16__)  // tile_forward.h has the forward on tiles

struct PairForward : Shape {
  using Shape::Shape;

  struct Scratch {
    uint32_t *q, *words, *p;
    uint16_t* rows;
    float *s, *acc, *max, *sum, *rounded_sum, *alpha;
    int32_t* keys;
  };

  Scratch scratch() const {
    Scratch s{};
    carve_scratch(0, [&](Carver& c) {
      s.q = c.take<uint32_t>(dim32 / 2 * lanes);
      s.words = c.take<uint32_t>(block() / 2 * value32);
      s.p = c.take<uint32_t>(block() / 2 * lanes);
      s.rows = c.take<uint16_t>(block() * dim32);
      s.s = c.take<float>(block() * lanes);
      s.acc = c.take<float>(lanes * value32);
      s.max = c.take<float>(lanes);
      s.sum = c.take<float>(lanes);
      s.rounded_sum = c.take<float>(lanes);
      s.alpha = c.take<float>(lanes);
      s.keys = c.take<int32_t>(a.topk);
    });
    return s;
  }

  // Scores to pairs of probabilities relative to the running maximum.
  void softmax(const Scratch& s, int64_t n, bool first) const {
    const F scale = splat<F>(static_cast<float>(a.scale)), lowest = splat<F>(-__builtin_inff());
    const int64_t n32 = round_up(n, 32);
    for (int64_t h = 0; h < lanes; h += 16) {
      const F before = first ? lowest : load(s.max + h);
      F m = before;
      for (int64_t i = 0; i < n; ++i) m = max(load(s.s + i * lanes + h) * scale, m);  // m where the score is NaN
      store(s.max + h, m);
      const F base = where_lt(lowest, m, m, splat<F>(0));
      F sum = splat<F>(0), rounded = splat<F>(0);
      for (int64_t i = 0; i < n; i += 2) {
        const float* x = s.s + i * lanes + h;
        const F even = exp(load(x) * scale - base);
        const F odd = i + 1 < n ? exp(load(x + lanes) * scale - base) : splat<F>(0);
        const __m512i words = pair(even.v, odd.v);
        _mm512_storeu_si512(s.p + i / 2 * lanes + h, words);
        sum = sum + (even + odd);
        rounded = rounded + (F{low_half(words)} + F{high_half(words)});
      }
      for (int64_t i = (n + 1) / 2; i < n32 / 2; ++i) _mm512_storeu_si512(s.p + i * lanes + h, _mm512_setzero_si512());
      const F alpha = exp(before - base);
      store(s.alpha + h, alpha);
      store(s.sum + h, first ? sum : fma(load(s.sum + h), alpha, sum));
      store(s.rounded_sum + h, first ? rounded : fma(load(s.rounded_sum + h), alpha, rounded));
    }
  }

  void finish(const Scratch& s, int64_t t, bool empty) const {
    uint16_t* out = static_cast<uint16_t*>(a.out) + t * a.heads * a.value_dim;
    float* lse = static_cast<float*>(a.lse) + t * a.heads;
    for (int64_t h = 0; h < a.heads; ++h) {
      if (empty || s.sum[h] == 0) {  // no key, or scores of -inf alone
        lse[h] = __builtin_inff();
        std::memset(out + h * a.value_dim, 0, sizeof(uint16_t) * a.value_dim);
      } else {
        lse[h] = s.max[h] + __builtin_logf(s.sum[h]);
        store_natural(s.acc + h * value32, 1 / s.rounded_sum[h], a.value_dim, out + h * a.value_dim);
      }
    }
  }

  void query(int64_t t) const {
    const Scratch s = scratch();
    pack_for_scores(words_of(a.q) + t * a.heads * a.dim, a.heads, a.dim, lanes, s.q);
    const int32_t* list = a.indices + t * a.topk;
    // Keys of the block that starts at list position j, to keys + from.
    const auto compact = [&](int64_t j, int64_t from) {
      int64_t n = 0;
      for (int64_t i = j; i < a.topk && i < j + kPairBlock; ++i) {
        s.keys[from + n] = list[i];
        n += list[i] >= 0;
      }
      return n;
    };
    bool first = true;
    int64_t from = 0, n = compact(0, 0);
    for (int64_t j = 0; j < a.topk; j += kPairBlock) {
      const int64_t next = j + kPairBlock < a.topk ? compact(j + kPairBlock, from + n) : 0;
      if (n > 0) {
        const int32_t* keys = s.keys + from;
        gather_rows(words_of(a.kv), a.dim, keys, n, s.rows, s.words, value32);
        scores(s.rows, dim32, n, s.q, a.heads, lanes, dim32 / 2, s.s, {words_of(a.kv), a.dim, keys + n, next});
        softmax(s, n, first);
        weighted(s.p, lanes, a.heads, n, s.words, value32, s.acc, !first, s.alpha);
        first = false;
      }
      from += n;
      n = next;
    }
    finish(s, t, first);
  }
};

void pair_forward(const SparseMlaArgs& args) {
  if (const int64_t groups = head_groups(args); groups > 1)
    return for_each_head_group(args, groups, [](const SparseMlaArgs& part) { PairForward(part).query(0); });
  const PairForward op(args);
  parallel_tasks(args.queries, [&](int64_t t) { op.query(t); });
}

#endif

// The list without -1 to `sorted`, stably sorted by ranges of 2^shift keys; start[r] is where range r begins. Returns how
// many there are.
inline int64_t sort_by_range(const int32_t* list, int64_t n, int64_t shift, int64_t ranges, int32_t* sorted,
                             int32_t* start) {
  for (int64_t r = 0; r <= ranges; ++r) start[r] = 0;
  for (int64_t i = 0; i < n; ++i)
    if (list[i] >= 0) ++start[(list[i] >> shift) + 1];
  for (int64_t r = 0; r < ranges; ++r) start[r + 1] += start[r];
  for (int64_t i = 0; i < n; ++i)
    if (list[i] >= 0) sorted[start[list[i] >> shift]++] = list[i];
  for (int64_t r = ranges; r > 0; --r) start[r] = start[r - 1];
  start[0] = 0;
  return start[ranges];
}

// The steps that the backward has in either form: Op plans chunks of queries and ranges of keys.
template <class Op>
void run_backward(Op op) {
  const SparseMlaArgs& a = op.a;
  if (a.topk == 0 || a.keys == 0) {
    std::memset(a.dq, 0, 2 * a.queries * a.heads * a.dim);
    std::memset(a.dkv, 0, 2 * a.keys * a.dim);
    return;
  }
  constexpr int64_t kRows = 64;
  const int64_t row_tasks = (a.keys + kRows - 1) / kRows;
  float* dkv = static_cast<float*>(a.dkv_acc);
  const auto end_of = [&](int64_t task) { return (task + 1) * kRows < a.keys ? (task + 1) * kRows : a.keys; };
  parallel_tasks(row_tasks, [&](int64_t task) {
    std::memset(dkv + task * kRows * op.dim32, 0, sizeof(float) * op.dim32 * (end_of(task) - task * kRows));
  });
  op.plan();
  for (int64_t t = 0; t < a.queries; t += op.chunk) {
    const int64_t here = t + op.chunk < a.queries ? op.chunk : a.queries - t;
    op.queries(t, here);
    parallel_tasks(op.ranges, [&](int64_t r) { op.range(r, here); });
  }
  parallel_tasks(row_tasks, [&](int64_t task) {
    for (int64_t i = task * kRows; i < end_of(task); ++i)
      store_natural(dkv + i * op.dim32, 1, a.dim, static_cast<uint16_t*>(a.dkv) + i * a.dim);
  });
}

#if !defined(__AMX_BF16__)  // tile_backward.h has the backward on tiles

struct PairBackward : Shape {
  using Shape::Shape;
  const int64_t depth = round_up(a.heads, a.heads < 32 ? 2 : 32);  // heads of a row of p and dS
  int64_t chunk = 0, range_shift = 0, ranges = 0;

  // Of the chunk's queries, [slot] outermost; keys in the order of their ranges.
  uint16_t *p = nullptr, *ds = nullptr;       // [chunk][topk32][depth]
  uint32_t *q = nullptr, *dout = nullptr;     // [chunk][depth / 2][dim32 | value32]
  int32_t *keys = nullptr, *starts = nullptr;  // [chunk][topk], [chunk][ranges + 1]

  void plan() {
    // A range's dkv rows should stay in the second-level cache, but a range should see a few dozen keys of a query.
    const int64_t row_bytes = dim32 * sizeof(float);
    range_shift = 4;
    while ((int64_t{2} << range_shift) * row_bytes <= (1 << 20)) ++range_shift;
    while ((int64_t{1} << range_shift) * a.topk < a.keys * 24) ++range_shift;
    while (range_shift > 6 && (a.keys >> range_shift) < 8) --range_shift;
    ranges = (a.keys + (int64_t{1} << range_shift) - 1) >> range_shift;
    const int64_t bytes = topk32 * depth * 4 + depth * 2 * (dim32 + value32);
    chunk = (int64_t{16} << 20) / bytes;
    if (chunk < 8 * num_threads()) chunk = 8 * num_threads();
    if (chunk > a.queries) chunk = a.queries;
    carve_scratch(1, [&](Carver& c) {
      p = c.take<uint16_t>(chunk * topk32 * depth);
      ds = c.take<uint16_t>(chunk * topk32 * depth);
      q = c.take<uint32_t>(chunk * depth / 2 * dim32);
      dout = c.take<uint32_t>(chunk * depth / 2 * value32);
      keys = c.take<int32_t>(chunk * a.topk);
      starts = c.take<int32_t>(chunk * (ranges + 1));
    });
  }

  struct Scratch {
    uint32_t *q, *dout, *words, *ds_words;
    uint16_t* rows;
    float *p, *ds, *acc, *lse, *delta;
  };

  Scratch scratch() const {
    Scratch s{};
    carve_scratch(0, [&](Carver& c) {
      s.q = c.take<uint32_t>(dim32 / 2 * lanes);
      s.dout = c.take<uint32_t>(value32 / 2 * lanes);
      s.words = c.take<uint32_t>(block() / 2 * dim32);
      s.ds_words = c.take<uint32_t>(block() / 2 * lanes);
      s.rows = c.take<uint16_t>(block() * dim32);
      s.p = c.take<float>(topk32 * lanes);
      s.ds = c.take<float>(topk32 * lanes);
      s.acc = c.take<float>(lanes * dim32);
      s.lse = c.take<float>(lanes);
      s.delta = c.take<float>(lanes);
    });
    return s;
  }

  // From scores and dP of keys j .. j + n - 1: p in place, and delta += sum of p * dP.
  void probabilities(const Scratch& s, int64_t j, int64_t n) const {
    const F scale = splat<F>(static_cast<float>(a.scale));
    for (int64_t h = 0; h < lanes; h += 16) {
      const F lse = load(s.lse + h);
      F total = splat<F>(0);
      for (int64_t i = j; i < j + n; ++i) {
        const F x = exp(load(s.p + i * lanes + h) * scale - lse);
        store(s.p + i * lanes + h, x);
        total = fma(x, load(s.ds + i * lanes + h), total);
      }
      store(s.delta + h, load(s.delta + h) + total);
    }
  }

  // x as heads h .. h + 15 of a row of p or dS.
  GLM5_INLINE void keep(uint16_t* row, int64_t h, F x) const { store_n(reinterpret_cast<bf16*>(row) + h, x, depth - h); }

  // dS of keys j .. j + n - 1: pairs along the keys for dq, and with p rows along the heads for dkv.
  void gradients(const Scratch& s, int64_t j, int64_t n, uint16_t* p_rows, uint16_t* ds_rows) const {
    const F scale = splat<F>(static_cast<float>(a.scale));
    for (int64_t i = 0; i < round_up(n, 32); i += 2)
      for (int64_t h = 0; h < lanes; h += 16) {
        F even = splat<F>(0), odd = even;
        const float *px = s.p + (j + i) * lanes + h, *dx = s.ds + (j + i) * lanes + h;
        const F delta = load(s.delta + h);
        if (i < n) {
          even = load(px) * (load(dx) - delta) * scale;
          keep(p_rows + (j + i) * depth, h, load(px));
          keep(ds_rows + (j + i) * depth, h, even);
        }
        if (i + 1 < n) {
          odd = load(px + lanes) * (load(dx + lanes) - delta) * scale;
          keep(p_rows + (j + i + 1) * depth, h, load(px + lanes));
          keep(ds_rows + (j + i + 1) * depth, h, odd);
        }
        _mm512_storeu_si512(s.ds_words + i / 2 * lanes + h, pair(even.v, odd.v));
      }
    if (depth > lanes)
      for (int64_t i = j; i < j + n; ++i) {
        std::memset(p_rows + i * depth + lanes, 0, 2 * (depth - lanes));
        std::memset(ds_rows + i * depth + lanes, 0, 2 * (depth - lanes));
      }
  }

  // p, dS and dq of query t, the first two kept in `slot`.
  void query(int64_t t, int64_t slot) const {
    const Scratch s = scratch();
    const uint16_t *q_row = words_of(a.q) + t * a.heads * a.dim, *dout_row = words_of(a.dout) + t * a.heads * a.value_dim;
    pack_for_scores(q_row, a.heads, a.dim, lanes, s.q);
    pack_for_scores(dout_row, a.heads, a.value_dim, lanes, s.dout);
    pack_dims_in_lanes(q_row, a.heads, a.dim, depth, q + slot * depth / 2 * dim32);
    pack_dims_in_lanes(dout_row, a.heads, a.value_dim, depth, dout + slot * depth / 2 * value32);
    for (int64_t h = 0; h < lanes; ++h) {
      s.lse[h] = h < a.heads ? static_cast<const float*>(a.lse)[t * a.heads + h] : __builtin_inff();
      s.delta[h] = 0;
    }
    int32_t* list = keys + slot * a.topk;
    const int64_t n = sort_by_range(a.indices + t * a.topk, a.topk, range_shift, ranges, list, starts + slot * (ranges + 1));
    const bool one_block = n <= kPairBlock;
    for (int64_t j = 0; j < n; j += kPairBlock) {
      const int64_t m = n - j < kPairBlock ? n - j : kPairBlock, left = n - j - m;
      gather_rows(words_of(a.kv), a.dim, list + j, m, s.rows, s.words, one_block ? dim32 : 0);
      scores(s.rows, dim32, m, s.q, a.heads, lanes, dim32 / 2, s.p + j * lanes,
             {words_of(a.kv), a.dim, list + j + m, left < kPairBlock ? left : kPairBlock});
      scores(s.rows, dim32, m, s.dout, a.heads, lanes, value32 / 2, s.ds + j * lanes, {nullptr, 0, nullptr, 0});
      probabilities(s, j, m);
    }
    if (a.dlse)
      for (int64_t h = 0; h < a.heads; ++h) s.delta[h] -= static_cast<const float*>(a.dlse)[t * a.heads + h];
    for (int64_t j = 0; j < n; j += kPairBlock) {
      const int64_t m = n - j < kPairBlock ? n - j : kPairBlock;
      gradients(s, j, m, p + slot * topk32 * depth, ds + slot * topk32 * depth);
      if (!one_block) gather_rows(words_of(a.kv), a.dim, list + j, m, nullptr, s.words, dim32);
      weighted(s.ds_words, lanes, a.heads, m, s.words, dim32, s.acc, j > 0, nullptr);
    }
    uint16_t* dq = static_cast<uint16_t*>(a.dq) + t * a.heads * a.dim;
    if (n == 0) std::memset(dq, 0, 2 * a.heads * a.dim);
    else
      for (int64_t h = 0; h < a.heads; ++h) store_natural(s.acc + h * dim32, 1, a.dim, dq + h * a.dim);
  }

  // Adds the chunk's share to the dkv rows of one key range.
  void range(int64_t r, int64_t queries_here) const {
    constexpr int64_t kRows = 64;
    float* c[kRows];
    for (int64_t slot = 0; slot < queries_here; ++slot) {
      const int32_t* start = starts + slot * (ranges + 1) + r;
      const int32_t* list = keys + slot * a.topk;
      for (int64_t j = start[0]; j < start[1]; j += kRows) {
        const int64_t m = start[1] - j < kRows ? start[1] - j : kRows;
        for (int64_t i = 0; i < m; ++i) c[i] = static_cast<float*>(a.dkv_acc) + list[j + i] * dim32;
        const int64_t at = (slot * topk32 + j) * depth;
        scatter(ds + at, p + at, depth, a.heads, m, q + slot * depth / 2 * dim32, dim32, dout + slot * depth / 2 * value32,
                value32, c);
      }
    }
  }

  void queries(int64_t t, int64_t here) const {
    parallel_tasks(here, [&](int64_t slot) { query(t + slot, slot); });
  }
};

void pair_backward(const SparseMlaArgs& args) { run_backward(PairBackward(args)); }

#endif

struct PairTarget : Shape {
  using Shape::Shape;

  void query(int64_t t) const {
    const TileSession session;
    uint32_t* q = nullptr;
    uint16_t* rows = nullptr;
    float *s = nullptr, *lse = nullptr;
    int32_t* keys = nullptr;
    carve_scratch(0, [&](Carver& c) {
      q = c.take<uint32_t>(dim32 / 2 * lanes);
      rows = c.take<uint16_t>(block() * dim32);
      s = c.take<float>(block() * lanes);
      lse = c.take<float>(lanes);
      keys = c.take<int32_t>(block());
    });
    for (int64_t h = 0; h < lanes; ++h)
      lse[h] = h < a.heads ? static_cast<const float*>(a.lse)[t * a.heads + h] : __builtin_inff();
    pack_for_scores(words_of(a.q) + t * a.heads * a.dim, a.heads, a.dim, lanes, q);
    const int32_t* list = a.indices + t * a.topk;
    float* target = static_cast<float*>(a.target) + t * a.topk;
    const F scale = splat<F>(static_cast<float>(a.scale));
    float total = 0;
    for (int64_t j = 0; j < a.topk; j += kPairBlock) {
      const int64_t end = j + kPairBlock < a.topk ? j + kPairBlock : a.topk;
      int64_t n = 0;
      for (int64_t i = j; i < end; ++i)
        if (list[i] >= 0) keys[n++] = list[i];
      if (n > 0) {
        gather_rows(words_of(a.kv), a.dim, keys, n, rows, nullptr, 0);
        scores(rows, dim32, n, q, a.heads, lanes, dim32 / 2, s, {nullptr, 0, nullptr, 0});
      }
      float mass = 0;
      for (int64_t i = j, k = 0; i < end; ++i) {
        target[i] = 0;
        if (list[i] < 0) continue;
        F x = splat<F>(0);
        for (int64_t h = 0; h < lanes; h += 16) x = x + exp(load(s + k * lanes + h) * scale - load(lse + h));
        target[i] = sum(x);
        mass += target[i];
        ++k;
      }
      total += mass;
    }
    const float inverse = total == 0 ? 0 : 1 / total;
    for (int64_t i = 0; i < a.topk; ++i)
      if (list[i] >= 0) target[i] *= inverse;
  }
};

void pair_attn_target(const SparseMlaArgs& args) {
  const PairTarget op(args);
  parallel_tasks(args.queries, [&](int64_t t) { op.query(t); });
}

}  // namespace
}  // namespace glm5::cpu::GLM5_ISA

#endif  // GLM5_ISA_LEVEL == 2
