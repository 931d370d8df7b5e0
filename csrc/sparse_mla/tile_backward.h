// The backward of sparse MLA in bf16 on AMX tiles, on the parts of tile_forward.h and with the same overlap. A query's list,
// without -1, goes by twice in blocks of kTileBlock keys:
//   scores and dP of block b   beside them: p and the sum of p * dP of block b - 1
//   dq from block b            beside it: dS of block b - 1, to tiles for dq and to rows of bf16 for dkv
// and beside all of them the rows of the next block are fetched. The second time goes from the last block to the first: the
// rows of the last ones are still in the second-level cache. dkv comes after a chunk of queries, from the rows of p and dS
// kept: a task owns a range of keys and adds up what the queries give in their order.
#pragma once

#include "sparse_mla/tile_forward.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

// Two rows' halves of 16 floats as 32 bf16.
GLM5_INLINE __m512i halves(F low, F high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v)); }

struct TileBackward : TileForward {
  const int64_t depth = round_up(a.heads, a.heads < 32 ? 2 : 32);  // heads of a row of p and dS
  const int64_t depth_steps = (depth + 31) / 32;
  const int64_t depth_words = (depth < 32 ? depth / 2 : 16) * 16;  // of a tile of q or dout with pairs of heads down
  const int64_t line = depth < 32 ? depth : 32, lines = topk32 * line;
  int64_t chunk = 0, range_shift = 0, ranges = 0;

  // Of the chunk's queries, [slot] outermost; keys in the order of their ranges.
  uint16_t *p = nullptr, *ds = nullptr;  // [chunk][depth_steps][topk32][32, or depth]
  uint32_t* heads_down = nullptr;  // [chunk][dims / 32] tiles of q and of dout: tiles_before()
  int32_t *keys = nullptr, *starts = nullptr;  // [chunk][topk], [chunk][ranges + 1]

  explicit TileBackward(const SparseMlaArgs& args) : TileForward(args) {}

  // Words of a query's heads_down before dim d: for 32 dims a step of two tiles of q after the other, then of dout.
  int64_t words_before(int64_t d) const { return (d + (d < value32 ? d : value32)) / 32 * depth_steps * 2 * depth_words; }

  // A range's dkv rows should stay in the second-level cache, but a range should see so many keys of a query that q and
  // dout are not read for little.
  void plan() {
    range_shift = 6;
    while ((int64_t{2} << range_shift) * dim32 * 4 <= (5 << 18)) ++range_shift;
    while ((int64_t{1} << range_shift) * a.topk < a.keys * 64 && (int64_t{2} << range_shift) * dim32 * 4 <= (5 << 19))
      ++range_shift;
    while ((int64_t{1} << range_shift) * a.topk < a.keys * 24) ++range_shift;
    while (range_shift > 6 && (a.keys >> range_shift) < 8) --range_shift;
    ranges = (a.keys + (int64_t{1} << range_shift) - 1) >> range_shift;
    const int64_t bytes = topk32 * depth * 4 + words_before(dim32) * 4;
    chunk = (int64_t{32} << 20) / bytes;
    if (chunk < 8 * num_threads()) chunk = 8 * num_threads();
    if (chunk > a.queries) chunk = a.queries;
    carve_scratch(1, [&](Carver& c) {
      // Tiles read up to 31 rows past a range's last.
      p = c.take<uint16_t>((chunk * topk32 + 32) * depth);
      ds = c.take<uint16_t>((chunk * topk32 + 32) * depth);
      heads_down = c.take<uint32_t>(chunk * words_before(dim32));
      keys = c.take<int32_t>(chunk * a.topk);
      starts = c.take<int32_t>(chunk * (ranges + 1));
    });
  }

  struct Scratch : TileForward::Scratch {
    uint32_t* dout;
    float *dp, *lse, *delta;
  };

  Scratch scratch() const {
    Scratch s{};
    carve_scratch(0, [&](Carver& c) {
      s.q = c.take<uint32_t>(head_tiles * dim32 / 32 * kTileWords);
      s.dout = c.take<uint32_t>(head_tiles * value32 / 32 * kTileWords);
      for (int i = 0; i < 2; ++i) s.rows[i] = c.take<const uint16_t*>(kTileBlock);
      s.zeros = c.take<uint16_t>(dim32);
      s.ring = c.take<uint16_t>(kRing * 4 * kTileWords * 2);
      for (int i = 0; i < 2; ++i) s.values[i] = c.take<uint32_t>(key_steps * 2 * kTileWords);
      s.s = c.take<float>((topk32 / 16 + 4) * head_tiles * kTileWords);
      s.dp = c.take<float>((topk32 / 16 + 4) * head_tiles * kTileWords);
      for (int i = 0; i < 2; ++i) s.p[i] = c.take<uint32_t>(key_steps * head_tiles * kTileWords);
      s.acc = c.take<float>(dim32 / 16 * head_tiles * kTileWords);
      s.staged = c.take<uint32_t>(2 * kTileWords);
      s.lse = c.take<float>(lanes);
      s.delta = c.take<float>(lanes);
    });
    return s;
  }

  // From scores and dP of keys j .. j + n - 1: p in place of the scores, and delta += sum of p * dP. Four keys of 16 heads a
  // step.
  struct Probabilities {
    const TileBackward& op;
    const Scratch& s;
    int64_t j, n;
    int64_t h = 0, k = 0;
    F total = splat<F>(0);
    GLM5_INLINE void step() {
      if (k >= n || h >= op.head_tiles) return;
      const int64_t at = ((j + k) / 16 * op.head_tiles + h) * kTileWords + k % 16 * 16;
      const F scale = splat<F>(static_cast<float>(op.a.scale)), minus = splat<F>(0) - load(s.lse + h * 16);
      float* x = s.s + at;
      const float* dp = s.dp + at;
      const int64_t m = n - k < 4 ? n - k : 4;
      if (m == 4) {
        F e[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) e[i] = exp_of_difference(fma(load(x + i * 16), scale, minus));
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          store(x + i * 16, e[i]);
          total = fma(e[i], load(dp + i * 16), total);
        }
      } else {
        for (int64_t i = 0; i < m; ++i) {
          const F e = exp_of_difference(fma(load(x + i * 16), scale, minus));
          store(x + i * 16, e);
          total = fma(e, load(dp + i * 16), total);
        }
      }
      k += 4;
      if (k < n) return;
      store(s.delta + h * 16, load(s.delta + h * 16) + total);
      total = splat<F>(0);
      ++h;
      if (h < op.head_tiles) k = 0;
    }
    void finish() {
      while (k < n && h < op.head_tiles) step();
    }
  };

  // dS of keys j .. j + n - 1 to tiles, heads down and pairs of keys across, and with p to rows along the heads. Two keys of
  // 32 heads a step.
  struct Gradients {
    const TileBackward& op;
    const Scratch& s;
    int64_t j, n;
    uint32_t* tiles;
    uint16_t *p_rows, *ds_rows;
    int64_t h = 0, k = 0;
    GLM5_INLINE void step() {
      if (k >= n || h >= op.head_tiles) return;
      const F scale = splat<F>(static_cast<float>(op.a.scale)), zero = splat<F>(0);
      const int64_t at = ((j + k) / 16 * op.head_tiles + h) * kTileWords + k % 16 * 16;
      const bool two = h + 1 < op.head_tiles;
      const float *x = s.s + at, *dp = s.dp + at, *delta = s.delta + h * 16;
      F p[2][2] = {{zero, zero}, {zero, zero}}, ds[2][2] = {{zero, zero}, {zero, zero}};  // [key][tile of heads]
      const auto read = [&](int i, int u) {
        p[i][u] = load(x + i * 16 + u * kTileWords);
        ds[i][u] = p[i][u] * (load(dp + i * 16 + u * kTileWords) - load(delta + u * 16)) * scale;
      };
      const bool odd = k + 1 < n;
      read(0, 0);
      if (two) read(0, 1);
      if (odd) read(1, 0);
      if (odd && two) read(1, 1);
      const __mmask32 there = first_32(op.line);
      const int64_t row = h / 2 * op.lines + (j + k) * op.line;
      if (op.line == 32) {
        __builtin_prefetch(p_rows + row + 512, 1);  // what will be written: in line, and in time
        __builtin_prefetch(p_rows + row + 544, 1);
        __builtin_prefetch(ds_rows + row + 512, 1);
        __builtin_prefetch(ds_rows + row + 544, 1);
      }
      _mm512_mask_storeu_epi16(p_rows + row, there, halves(p[0][0], p[0][1]));
      _mm512_mask_storeu_epi16(ds_rows + row, there, halves(ds[0][0], ds[0][1]));
      if (odd) {
        _mm512_mask_storeu_epi16(p_rows + row + op.line, there, halves(p[1][0], p[1][1]));
        _mm512_mask_storeu_epi16(ds_rows + row + op.line, there, halves(ds[1][0], ds[1][1]));
      }
      uint32_t* staged = s.staged + k % 32 * 8;
      _mm512_storeu_si512(staged, pair_words(ds[0][0], ds[1][0]));
      if (two) _mm512_storeu_si512(staged + kTileWords, pair_words(ds[0][1], ds[1][1]));
      k += 2;
      if (k < n && k % 32) return;
      for (int64_t w = k % 32 / 2; w % 16; ++w) {
        _mm512_storeu_si512(s.staged + w * 16, _mm512_setzero_si512());
        _mm512_storeu_si512(s.staged + kTileWords + w * 16, _mm512_setzero_si512());
      }
      uint32_t* to = tiles + ((k - 1) / 32 * op.head_tiles + h) * kTileWords;
      for (int u = 0; u < 1 + two; ++u) {
        __m512i r[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(s.staged + u * kTileWords + i * 16);
        transpose_16x16(r);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + u * kTileWords + i * 16, r[i]);
      }
      if (k < n) return;
      h += 2;
      if (h < op.head_tiles) k = 0;
    }
    void finish() {
      while (k < n && h < op.head_tiles) step();
    }
  };

  // q and dout with pairs of heads down and permuted dims across.
  void pack_heads_down(const uint16_t* q, const uint16_t* dout, uint32_t* to) const {
    const auto pack = [&](const uint16_t* x, int64_t dim, int64_t d) {
      for (int64_t h = 0; h < depth; h += 2) {
        const __m512i even = load_32(x + h * dim + d, h < a.heads ? dim - d : 0);
        const __m512i odd = load_32(x + (h + 1) * dim + d, h + 1 < a.heads ? dim - d : 0);
        uint32_t* tile = to + h / 32 * 2 * depth_words + h % 32 / 2 * 16;
        _mm512_storeu_si512(tile, _mm512_unpacklo_epi16(even, odd));
        _mm512_storeu_si512(tile + depth_words, _mm512_unpackhi_epi16(even, odd));
      }
      to += depth_steps * 2 * depth_words;
    };
    for (int64_t d = 0; d < dim32; d += 32) {
      pack(q, a.dim, d);
      if (d < value32) pack(dout, a.value_dim, d);
    }
  }

  int64_t sort_keys(int64_t t, int64_t slot) const {
    return sort_by_range(a.indices + t * a.topk, a.topk, range_shift, ranges, keys + slot * a.topk,
                         starts + slot * (ranges + 1));
  }

  int64_t set_rows(const Scratch& s, const int32_t* list, int64_t n, int64_t j) const {
    const int64_t m = n - j < kTileBlock ? n - j : kTileBlock;
    const uint16_t** rows = s.rows[j / kTileBlock & 1];
    for (int64_t i = 0; i < m; ++i) rows[i] = words_of(a.kv) + list[j + i] * a.dim;
    for (int64_t i = m; i < kTileBlock && i < m + 64; ++i) rows[i] = s.zeros;
    return m;
  }

  // p, dS and dq of query t with n keys, the first two kept in `slot`; `next` is a key list begun meanwhile.
  void query(const Scratch& s, int64_t t, int64_t slot, int64_t n, const int32_t* next, int64_t n_next) const {
    const uint16_t *q_row = words_of(a.q) + t * a.heads * a.dim, *dout_row = words_of(a.dout) + t * a.heads * a.value_dim;
    pack_heads(q_row, a.dim, s.q);
    pack_heads(dout_row, a.value_dim, s.dout);
    pack_heads_down(q_row, dout_row, heads_down + slot * words_before(dim32));
    for (int64_t h = 0; h < lanes; ++h) {
      s.lse[h] = h < a.heads ? static_cast<const float*>(a.lse)[t * a.heads + h] : __builtin_inff();
      s.delta[h] = 0;
    }
    const int32_t* list = keys + slot * a.topk;
    const auto first_of = [](int64_t count) { return count < kTileBlock ? count : kTileBlock; };
    Probabilities before{*this, s, 0, 0};
    for (int64_t j = 0; j < n; j += kTileBlock) {
      const int64_t m = set_rows(s, list, n, j), left = n - j - m;
      RowFetch fetch{words_of(a.kv), a.dim, list + j + m, first_of(left)};
      const auto beside = [&] {
        fetch.step(kFetches);
        before.step();
      };
      const uint16_t* const* rows = s.rows[j / kTileBlock & 1];
      const int64_t at = j / 16 * head_tiles * kTileWords;
      const auto nothing = [](int64_t, int64_t, int64_t, int64_t) {};
      stores_are_done();
      score_block({s.q, s.s + at, dim32 / 32}, s.ring, rows, m, beside, nothing);
      score_block({s.dout, s.dp + at, value32 / 32}, s.ring, rows, m, beside, nothing);
      fetch.step(1 << 30);
      before.finish();
      before.j = j, before.n = m, before.h = before.k = 0;
    }
    before.finish();
    if (a.dlse)
      for (int64_t h = 0; h < a.heads; ++h) s.delta[h] -= static_cast<const float*>(a.dlse)[t * a.heads + h];
    uint16_t *p_rows = p + slot * topk32 * depth, *ds_rows = ds + slot * topk32 * depth;
    // From the last block to the first: the rows of the last ones are still near.
    const int64_t last = n > 0 ? (n - 1) / kTileBlock * kTileBlock : 0;
    Gradients{*this, s, last, n - last, s.p[last / kTileBlock & 1], p_rows, ds_rows}.finish();
    for (int64_t j = last; n > 0 && j >= 0; j -= kTileBlock) {
      const int64_t m = set_rows(s, list, n, j), block = j / kTileBlock, left = j > 0 ? kTileBlock : 0;
      RowFetch fetch{words_of(a.kv), a.dim, left ? list + j - kTileBlock : next, left ? left : first_of(n_next)};
      Gradients after{*this, s, j - left, left, s.p[(block + 1) & 1], p_rows, ds_rows};
      weigh_block(s, s.rows[block & 1], m, dim32, s.p[block & 1], j < last, [&] {
        after.step();
        fetch.step(kFetches);
      });
      fetch.step(1 << 30);
      after.finish();
    }
    bf16* dq = static_cast<bf16*>(a.dq) + t * a.heads * a.dim;
    if (n == 0) std::memset(static_cast<void*>(dq), 0, sizeof(bf16) * a.heads * a.dim);
    else
      for (int64_t h = 0; h < a.heads; ++h, dq += a.dim) {
        const float* x = s.acc + h / 16 * kTileWords + h % 16 * 16;
        for (int64_t d = 0; d < a.dim; d += 32, x += 2 * head_tiles * kTileWords) {
          F first, second;
          natural_order(load(x).v, load(x + head_tiles * kTileWords).v, first, second);
          store_n(dq + d, first, a.dim - d);
          if (a.dim - d > 16) store_n(dq + d + 16, second, a.dim - d - 16);
        }
      }
  }

  void queries(int64_t t, int64_t here) const {
    constexpr int64_t kMost = 4;
    int64_t together = here / (4 * num_threads());
    together = together < 1 ? 1 : together > kMost ? kMost : together;
    parallel_tasks((here + together - 1) / together, [&](int64_t task) {
      const TileSession session;
      const Scratch s = scratch();
      std::memset(s.zeros, 0, sizeof(uint16_t) * dim32);
      const int64_t end = (task + 1) * together < here ? (task + 1) * together : here;
      int64_t n = sort_keys(t + task * together, task * together);
      for (int64_t slot = task * together; slot < end; ++slot) {
        const int64_t n_next = slot + 1 < end ? sort_keys(t + slot + 1, slot + 1) : 0;
        query(s, t + slot, slot, n, keys + (slot + 1) * a.topk, n_next);
        n = n_next;
      }
    });
  }

  // Adds what is in `spare` to 32 dims of n rows of dkv.
  struct AddRows {
    const float* spare;
    float* const* c;
    int64_t d, n;
    int64_t i = 0;
    GLM5_INLINE void step(int64_t count) {
      const int64_t end = i + count < n ? i + count : n;
      for (; i < end; ++i) {
        float* to = c[i] + d;
        store(to, load(to) + load(spare + i * 32));
        store(to + 16, load(to + 16) + load(spare + i * 32 + 16));
      }
    }
  };

  // Steps of one of the two products: R tiles of keys x 32 dims.
  template <int R, class Beside>
  GLM5_INLINE void scatter_steps(const uint16_t* x, const uint32_t* heads, const Beside& beside) const {
    for (int64_t k = 0; k < depth_steps; ++k, x += lines, heads += 2 * depth_words) {
      _tile_loadd(6, heads, 64);
      _tile_loadd(4, x, line * 2);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, heads + depth_words, 64);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (R == 2) {
        _tile_loadd(5, x + 16 * line, line * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      beside();
    }
  }
  template <int R, class Beside>
  GLM5_INLINE void scatter(const uint16_t* ds_rows, const uint16_t* p_rows, const uint32_t* heads, bool valued,
                           const Beside& beside) const {
    GLM5_COUNT_PATH(R == 2 ? "sparse_mla tiles backward scatter 2x2" : "sparse_mla tiles backward scatter 1x2");
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    scatter_steps<R>(ds_rows, heads, beside);
    if (valued) scatter_steps<R>(p_rows, heads + depth_steps * 2 * depth_words, beside);
  }

  // Adds the chunk's share to the dkv rows of one key range. Sums of one product are added to dkv beside the next.
  void range(int64_t r, int64_t queries_here) const {
    const TileSession session(depth / 2);
    constexpr int64_t kRows = 64;
    float* spare[2];
    carve_scratch(0, [&](Carver& c) {
      for (int i = 0; i < 2; ++i) spare[i] = c.take<float>(32 * 32);
    });
    float* c[kRows];
    for (int64_t slot = 0; slot < queries_here; ++slot) {
      const int32_t* start = starts + slot * (ranges + 1) + r;
      const int32_t* list = keys + slot * a.topk;
      for (int64_t j = start[0]; j < start[1]; j += kRows) {
        const int64_t m = start[1] - j < kRows ? start[1] - j : kRows;
        for (int64_t i = 0; i < m; ++i) c[i] = static_cast<float*>(a.dkv_acc) + list[j + i] * dim32;
        const int64_t at = slot * topk32 * depth + j * line;
        const uint32_t* heads = heads_down + slot * words_before(dim32);
        stores_are_done();
        int turn = 0;
        AddRows adds{spare[1], c, 0, 0};
        for (int64_t d = 0; d < dim32; d += 32)
          for (int64_t i = 0; i < m; i += 32) {
            const uint16_t *ds_rows = ds + at + i * line, *p_rows = p + at + i * line;
            const bool two = m - i > 16, valued = d < value32;
            const uint32_t* b = heads + words_before(d);
            const int64_t quota = (32 + depth_steps * (1 + valued) - 1) / (depth_steps * (1 + valued));
            const auto beside = [&] { adds.step(quota); };
            if (two) scatter<2>(ds_rows, p_rows, b, valued, beside);
            else scatter<1>(ds_rows, p_rows, b, valued, beside);
            adds.step(32);
            float* to = spare[turn];
            _tile_stored(0, to, 128);
            _tile_stored(1, to + 16, 128);
            if (two) {
              _tile_stored(2, to + 16 * 32, 128);
              _tile_stored(3, to + 16 * 32 + 16, 128);
            }
            stores_are_done();
            adds = {to, c + i, d, m - i < 32 ? m - i : 32};
            turn = 1 - turn;
          }
        adds.step(32);
      }
    }
  }
};

}  // namespace
}  // namespace glm5::cpu::GLM5_ISA
