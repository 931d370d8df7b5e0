// The forward of sparse MLA in bf16 on AMX tiles. A query's list goes by in blocks of kTileBlock positions; while the tile
// unit multiplies, the vector unit does the rest beside it, a little after every step of up to four tile products:
//   scores of block b        beside them: rows are copied to the tiles that the next steps load
//   values of block b - 1    beside them: the next 32 dims of its rows are interleaved in pairs, and the softmax of block b
//   and beside both: the rows of block b + 1, or of the next query's first block, are fetched into the second-level cache.
// Writing to the second-level cache costs several times what reading from it does, so that rows are read there twice and
// copied to small buffers that stay in the first-level cache. All operands lie as the tiles that are loaded, 1 KiB each.
//
// Probabilities are exp(score - base). The base is the maximum of the first block that has one, and rises to the running
// maximum only when that has grown by more than kSlack: what is accumulated is rescaled rarely, and a probability stays
// below e^kSlack. They are rounded to bf16 for the product with the values, and the sum of the rounded ones divides it;
// lse comes from the unrounded ones.
#pragma once

#include "sparse_mla/bf16_attention.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

inline constexpr int64_t kTileBlock = 128;
inline constexpr float kSlack = 8;
inline constexpr int64_t kFetches = 3;  // lines a step
inline constexpr int64_t kChunk = 6;
inline constexpr int64_t kRing = 4, kAhead = 3;

// exp for x <= kSlack or so: 0 where it is not a normal number (those take the processor a hundred cycles), NaN stays.
GLM5_INLINE F exp_of_difference(F x) {
  const F lowest = splat<F>(kLowestExponent);
  const __mmask16 normal = _mm512_cmp_ps_mask(x.v, lowest.v, _CMP_NLT_UQ);
  F n;
  const F m = exp_mantissa(max(lowest, x), &n);
  return {_mm512_maskz_scalef_ps(normal, m.v, n.v)};
}

inline constexpr int64_t kTileWords = 256;  // of a tile in memory

// As pair(), in two instructions.
GLM5_INLINE __m512i pair_words(F even, F odd) {
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd.v, even.v));
  const __m512i order = _mm512_or_si512(
      _mm512_set1_epi32(16 << 16),
      _mm512_mullo_epi32(_mm512_set1_epi32(0x10001),
                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)));
  return _mm512_permutexvar_epi16(order, both);
}

// x plus the two halves of each word.
GLM5_INLINE F add_pairs(F x, __m512i words) {
  const __m512i ones = _mm512_set1_epi32(0x3f803f80);
  return {_mm512_dpbf16_ps(x.v, reinterpret_cast<__m512bh>(words), reinterpret_cast<__m512bh>(ones))};
}

// Fetches rows into the second-level cache: one line in four, the hardware's stream prefetcher brings those between. Asking
// for all of them holds up the loads of tiles.
struct RowFetch {
  const uint16_t* kv;
  int64_t dim;
  const int32_t* keys;
  int64_t n;
  int64_t i = 0, d = 0;
  GLM5_INLINE void step(int64_t count) {
    for (; count > 0 && i < n; --count) {
      prefetch(kv + keys[i] * dim + d);
      d += 128;
      if (d >= dim) d = 0, ++i;
    }
  }
};

struct TileForward : Shape {
  const int64_t head_tiles = lanes / 16, cols = value32 / 16;
  const int64_t key_steps = topk32 < kTileBlock ? topk32 / 32 : kTileBlock / 32;  // of a block
  const int64_t passes = (head_tiles + 1) / 2;  // over the values of a line
  const int64_t max_blocks = (a.topk + kTileBlock - 1) / kTileBlock;

  explicit TileForward(const SparseMlaArgs& args) : Shape(args) {}

  // What rows are multiplied with to give scores.
  struct Scored {
    const uint32_t* q;  // [head_tiles][steps] tiles
    float* s;  // [block / 16][head_tiles] tiles of scores, keys down, heads across
    int64_t steps;
    // Steps at a time, between which the sums rest in memory: so many that q's tiles stay in the first-level cache.
    int64_t chunk = (steps + (steps + kChunk - 1) / kChunk - 1) / ((steps + kChunk - 1) / kChunk);
  };

  struct Keys {
    int32_t* keys;
    int64_t *start, blocks;  // of the blocks that have keys; start[blocks] is the end
  };

  struct Scratch {
    uint32_t* q;
    const uint16_t** rows[2];  // [block] of a block: where its rows are, zeros at the end
    uint16_t* zeros;  // [dim32]
    uint16_t* ring;  // [kRing] the tiles of rows that scores are about to read, up to four at a time
    uint32_t* values[2];  // [key_steps][2] tiles: 32 dims of a block's values, pairs of keys down
    float* s;
    uint32_t* p[2];  // [key_steps][head_tiles] tiles, heads down, pairs of keys across
    float* acc;  // [cols][head_tiles] tiles, heads down, permuted dims across
    uint32_t* staged;  // one tile
    float *max, *base, *alpha, *sum, *rounded;
    Keys keys[2];
  };

  Scratch scratch() const {
    Scratch s{};
    carve_scratch(0, [&](Carver& c) {
      s.q = c.take<uint32_t>(head_tiles * dim32 / 32 * kTileWords);
      for (int i = 0; i < 2; ++i) s.rows[i] = c.take<const uint16_t*>(kTileBlock);
      s.zeros = c.take<uint16_t>(dim32);
      s.ring = c.take<uint16_t>(kRing * 4 * kTileWords * 2);
      for (int i = 0; i < 2; ++i) s.values[i] = c.take<uint32_t>(key_steps * 2 * kTileWords);
      s.s = c.take<float>((key_steps * 2 + 2) * head_tiles * kTileWords);
      for (int i = 0; i < 2; ++i) s.p[i] = c.take<uint32_t>(key_steps * head_tiles * kTileWords);
      s.acc = c.take<float>(cols * head_tiles * kTileWords);
      s.staged = c.take<uint32_t>(kTileWords);
      s.max = c.take<float>(lanes);
      s.base = c.take<float>(lanes);
      s.alpha = c.take<float>(lanes);
      s.sum = c.take<float>(lanes);
      s.rounded = c.take<float>(lanes);
      for (int i = 0; i < 2; ++i) {
        s.keys[i].keys = c.take<int32_t>(a.topk + 16);
        s.keys[i].start = c.take<int64_t>(max_blocks + 1);
      }
    });
    return s;
  }

  void list_keys(int64_t t, Keys& k) const {
    const int32_t* list = a.indices + t * a.topk;
    int64_t n = 0;
    k.blocks = 0;
    for (int64_t j = 0; j < a.topk; j += kTileBlock) {
      const int64_t end = j + kTileBlock < a.topk ? j + kTileBlock : a.topk;
      k.start[k.blocks] = n;
      for (int64_t i = j; i < end; i += 16) {
        const __m512i x = _mm512_mask_loadu_epi32(_mm512_set1_epi32(-1), first_n(end - i), list + i);
        const __mmask16 there = _mm512_cmpge_epi32_mask(x, _mm512_setzero_si512());
        _mm512_storeu_si512(k.keys + n, _mm512_maskz_compress_epi32(there, x));
        n += __builtin_popcount(there);
      }
      k.blocks += n > k.start[k.blocks];
    }
    k.start[k.blocks] = n;
  }

  // x [heads][dim] to [head_tiles][steps] tiles.
  void pack_heads(const uint16_t* x, int64_t dim, uint32_t* to) const {
    for (int64_t h = 0; h < lanes; h += 16)
      for (int64_t d = 0; d < dim; d += 32, to += kTileWords) {
        __m512i r[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          r[i] = h + i < a.heads ? load_32(x + (h + i) * dim + d, dim - d) : _mm512_setzero_si512();
        transpose_16x16(r);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * 16, r[i]);
      }
  }

  // Copies the rows of a block, in the order in which scores are computed, to tiles of the ring: kAhead steps before the
  // tile is loaded, so that the copy is in the first-level cache but no longer in the store buffer.
  template <int K, int C>
  struct RowTiles {
    const TileForward& op;
    const Scored& x;
    const uint16_t* const* rows;
    uint16_t* ring;
    int64_t n;
    int64_t k0 = 0, k1 = x.chunk, i = 0, h = 0, k = 0, slot = 0;
    GLM5_INLINE void step() {
      if (h >= op.head_tiles) return;
      uint16_t* to = ring + slot * K * kTileWords * 2;
      const uint16_t* const* from = rows + i;
      const int64_t d = 32 * k;
      if (d + 32 <= op.a.dim) {
#pragma GCC unroll 16
        for (int r = 0; r < 16 * K; ++r) _mm512_store_si512(to + 32 * r, _mm512_loadu_si512(from[r] + d));
      } else {
        for (int r = 0; r < 16 * K; ++r) _mm512_store_si512(to + 32 * r, load_32(from[r] + d, op.a.dim - d));
      }
      slot = (slot + 1) % kRing;
      if (++k < k1) return;
      k = k0, i += 16 * K;
      if (i < n) return;
      i = 0, k = k0 = k1;
      k1 = k0 + x.chunk < x.steps ? k0 + x.chunk : x.steps;
      if (k0 < x.steps) return;
      k = k0 = 0, k1 = x.chunk, h += C;
    }
  };

  // Scores of a block of n keys, 16 K of them with 16 C heads at a time, `beside` after every step, and after(h, C, i, m)
  // when those of keys i .. i + m - 1 and tiles h .. h + C - 1 of heads have been stored for a while.
  template <int K, int C, class Beside, class After>
  GLM5_INLINE void score(const Scored& x, uint16_t* ring, const uint16_t* const* rows, int64_t n, const Beside& beside,
                         const After& after) const {
    static_assert(K * C <= 4);
    const int64_t steps = x.steps, chunk = x.chunk;
    RowTiles<K, C> tiles{*this, x, rows, ring, n};
    for (int i = 0; i < kAhead; ++i) tiles.step();
    int64_t slot = 0;
    for (int64_t h = 0; h < head_tiles; h += C) {
      // Where less than C tiles of heads are left, the last ones again: the same numbers, stored twice.
      const int64_t h0 = h + C <= head_tiles ? h : head_tiles - C;
      for (int64_t k0 = 0; k0 < steps; k0 += chunk)
        for (int64_t i = 0; i < n; i += 16 * K) {
          score_tiles<K, C>(x, ring, i, h0, k0, k0 + chunk < steps ? k0 + chunk : steps, slot, [&] {
            tiles.step();
            beside();
          });
          if (k0 + chunk >= steps) {
            if (i > 0) after(h0, C, i - 16 * K, 16 * K);
            if (i + 16 * K >= n) after(h0, C, i, n - i);
          }
        }
    }
  }

  // Steps k0 .. k1 - 1 of the scores of 16 K keys with 16 C heads.
  template <int K, int C, class Beside>
  GLM5_INLINE void score_tiles(const Scored& x, const uint16_t* ring, int64_t i, int64_t h0, int64_t k0, int64_t k1,
                               int64_t& slot, const Beside& beside) const {
    GLM5_COUNT_PATH(K == 4   ? "sparse_mla tiles forward scores 4x1"
                    : K == 2 ? "sparse_mla tiles forward scores 2x2"
                    : C == 3 ? "sparse_mla tiles forward scores 1x3"
                             : "sparse_mla tiles forward scores 1x4");
    const uint32_t* b = x.q + (h0 * x.steps + k0) * kTileWords;
    const int64_t next = x.steps * kTileWords;
    float* c = x.s + (i / 16 * head_tiles + h0) * kTileWords;
    const int64_t down = head_tiles * kTileWords;
    float *c1 = c + (K == 4 ? down : kTileWords), *c2 = c + (K == 4 ? 2 * down : K == 2 ? down : 2 * kTileWords);
    float* c3 = c + (K == 4 ? 3 * down : K == 2 ? down + kTileWords : 3 * kTileWords);
    if (k0 == 0) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, c, 64);
      _tile_loadd(1, c1, 64);
      _tile_loadd(2, c2, 64);
      if constexpr (K * C == 4) _tile_loadd(3, c3, 64);
    }
    for (int64_t k = k0; k < k1; ++k, b += kTileWords) {
      stores_are_done();
      const uint16_t* from = ring + slot * K * kTileWords * 2;
      slot = (slot + 1) % kRing;
      if constexpr (K == 1) {
        _tile_loadd(4, from, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + next, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(6, b + 2 * next, 64);
        _tile_dpbf16ps(2, 4, 6);
        if constexpr (C == 4) {
          _tile_loadd(7, b + 3 * next, 64);
          _tile_dpbf16ps(3, 4, 7);
        }
      } else if constexpr (K == 2) {
        _tile_loadd(4, from, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + next, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, from + 512, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      } else {
        _tile_loadd(6, b, 64);
        _tile_loadd(4, from, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, from + 512, 64);
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(4, from + 1024, 64);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(5, from + 1536, 64);
        _tile_dpbf16ps(3, 5, 6);
      }
      beside();
    }
    _tile_stored(0, c, 64);
    _tile_stored(1, c1, 64);
    _tile_stored(2, c2, 64);
    if constexpr (K * C == 4) _tile_stored(3, c3, 64);
  }

  template <class Beside, class After>
  void score_block(const Scored& x, uint16_t* ring, const uint16_t* const* rows, int64_t n, const Beside& beside,
                   const After& after) const {
    switch (head_tiles) {
      case 1:
        return score<4, 1>(x, ring, rows, n, beside, after);
      case 2:
        return score<2, 2>(x, ring, rows, n, beside, after);
      case 3:
        return score<1, 3>(x, ring, rows, n, beside, after);
      default:
        return score<1, 4>(x, ring, rows, n, beside, after);
    }
  }

  // Scores of keys i .. i + m - 1 and tiles h0 .. h0 + c - 1 of heads times scale: their maximum into s.max.
  void raise_max(const Scratch& s, int64_t h0, int64_t c, int64_t i, int64_t m) const {
    const F scale = splat<F>(static_cast<float>(a.scale));
    for (int64_t h = h0; h < h0 + c; ++h) {
      F x = load(s.max + h * 16);
      for (int64_t k = i; k < i + m; ++k) {
        x = max(load(s.s + (k / 16 * head_tiles + h) * kTileWords + k % 16 * 16) * scale, x);  // x where the score is NaN
      }
      store(s.max + h * 16, x);
    }
  }

  // Chooses the base of the block whose maximum is in s.max; true if what was accumulated is to be rescaled by alpha.
  bool choose_base(const Scratch& s, bool first) const {
    const F lowest = splat<F>(-__builtin_inff());
    bool rescale = false;
    for (int64_t h = 0; h < lanes; h += 16) {
      const F before = first ? lowest : load(s.base + h), m = load(s.max + h);
      const F base = where_lt(before + splat<F>(kSlack), m, m, before);
      const F alpha = exp(before - where_lt(lowest, base, base, splat<F>(0.f)));
      const __mmask16 raised = _mm512_cmp_ps_mask(before.v, base.v, _CMP_LT_OQ);
      store(s.base + h, base);
      store(s.alpha + h, {_mm512_mask_blend_ps(raised, _mm512_set1_ps(1.f), alpha.v)});
      if (first) {
        store(s.sum + h, splat<F>(0));
        store(s.rounded + h, splat<F>(0));
      } else {
        store(s.sum + h, load(s.sum + h) * load(s.alpha + h));
        store(s.rounded + h, load(s.rounded + h) * load(s.alpha + h));
        rescale |= raised != 0;
      }
    }
    return rescale;
  }

  void rescale(const Scratch& s) const {
    for (int64_t h = 0; h < a.heads; ++h)
      if (!(s.alpha[h] == 1.f)) {
        GLM5_COUNT_PATH("sparse_mla tiles forward rescale");
        for (int64_t c = 0; c < cols; ++c) {
          float* x = s.acc + (c * head_tiles + h / 16) * kTileWords + h % 16 * 16;
          store(x, load(x) * splat<F>(s.alpha[h]));
        }
      }
  }

  // The softmax of a block of n keys: scores to tiles of p, four keys of 16 heads a step.
  struct Softmax {
    const TileForward& op;
    const Scratch& s;
    int64_t n;
    uint32_t* p;
    int64_t h = 0, k = 0;
    F sum = splat<F>(0), rounded = splat<F>(0);

    GLM5_INLINE void step() {
      if (h >= op.head_tiles) return;
      const float* x = s.s + (k / 16 * op.head_tiles + h) * kTileWords + k % 16 * 16;
      const F lowest = splat<F>(-__builtin_inff());
      F base = load(s.base + h * 16);
      base = where_lt(lowest, base, base, splat<F>(0));
      const F scale = splat<F>(static_cast<float>(op.a.scale)), minus = splat<F>(0) - base;
      F e[4];
      if (k + 4 <= n) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) e[i] = exp_of_difference(fma(load(x + i * 16), scale, minus));
      } else {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) e[i] = k + i < n ? exp_of_difference(fma(load(x + i * 16), scale, minus)) : splat<F>(0);
      }
      const __m512i ab = pair_words(e[0], e[1]), cd = pair_words(e[2], e[3]);
      sum = sum + ((e[0] + e[1]) + (e[2] + e[3]));
      rounded = add_pairs(add_pairs(rounded, ab), cd);
      _mm512_storeu_si512(s.staged + k % 32 * 8, ab);
      _mm512_storeu_si512(s.staged + k % 32 * 8 + 16, cd);
      k += 4;
      if (k % 32) return;
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(s.staged + i * 16);
      transpose_16x16(r);
      uint32_t* to = p + ((k - 32) / 32 * op.head_tiles + h) * kTileWords;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * 16, r[i]);
      if (k < n) return;
      store(s.sum + h * 16, load(s.sum + h * 16) + sum);
      store(s.rounded + h * 16, load(s.rounded + h * 16) + rounded);
      sum = rounded = splat<F>(0);
      k = 0, ++h;
    }
    void finish() {
      while (h < op.head_tiles) step();
    }
  };

  // Copies 32 dims at a time of a block's values, interleaved in pairs of keys, to tiles.
  struct ValueTiles {
    int64_t dim;
    const uint16_t* const* rows;
    int64_t d, pairs;
    uint32_t* to;
    int64_t i = 0;
    GLM5_INLINE void step(int64_t count) {
      const int64_t end = i + count < pairs ? i + count : pairs;
      if (d + 32 <= dim) {
        for (; i < end; ++i) put(_mm512_loadu_si512(rows[2 * i] + d), _mm512_loadu_si512(rows[2 * i + 1] + d));
      } else {
        for (; i < end; ++i) put(load_32(rows[2 * i] + d, dim - d), load_32(rows[2 * i + 1] + d, dim - d));
      }
    }
    GLM5_INLINE void put(__m512i x, __m512i y) const {
      uint32_t* p = to + i / 16 * 2 * kTileWords + i % 16 * 16;
      _mm512_store_si512(p, _mm512_unpacklo_epi16(x, y));
      _mm512_store_si512(p + kTileWords, _mm512_unpackhi_epi16(x, y));
    }
  };

  // acc (+)= p . values for R tiles of heads x 32 dims over n_steps steps of 32 keys.
  template <int R, class Beside>
  GLM5_INLINE void weigh(const uint32_t* p, const uint32_t* values, int64_t n_steps, float* acc, bool add,
                         const Beside& beside) const {
    GLM5_COUNT_PATH(R == 2 ? "sparse_mla tiles forward weighted 2x2" : "sparse_mla tiles forward weighted 1x2");
    const int64_t across = head_tiles * kTileWords;
    if (add) {
      _tile_loadd(0, acc, 64);
      _tile_loadd(1, acc + across, 64);
      if constexpr (R == 2) {
        _tile_loadd(2, acc + kTileWords, 64);
        _tile_loadd(3, acc + across + kTileWords, 64);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < n_steps; ++k, p += across, values += 2 * kTileWords) {
      _tile_loadd(6, values, 64);
      _tile_loadd(4, p, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, values + kTileWords, 64);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (R == 2) {
        _tile_loadd(5, p + kTileWords, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      beside();
    }
    _tile_stored(0, acc, 64);
    _tile_stored(1, acc + across, 64);
    if constexpr (R == 2) {
      _tile_stored(2, acc + kTileWords, 64);
      _tile_stored(3, acc + across + kTileWords, 64);
    }
  }

  // acc (+)= p . the first `dims` of n rows.
  template <class Beside>
  GLM5_INLINE void weigh_block(const Scratch& s, const uint16_t* const* rows, int64_t n, int64_t dims, const uint32_t* p,
                               bool add, const Beside& beside) const {
    const int64_t n_steps = (n + 31) / 32, quota = (16 + passes - 1) / passes;
    ValueTiles tiles{a.dim, rows, 0, n_steps * 16, s.values[0]};
    tiles.step(n_steps * 16);
    for (int64_t d = 0; d < dims; d += 32) {
      const uint32_t* values = tiles.to;
      tiles = {a.dim, rows, d + 32, d + 32 < dims ? n_steps * 16 : 0, s.values[(d / 32 + 1) & 1]};
      stores_are_done();
      float* acc = s.acc + d / 16 * head_tiles * kTileWords;
      for (int64_t h = 0; h < head_tiles; h += 2) {
        const auto work = [&] {
          tiles.step(quota);
          beside();
        };
        if (h + 2 <= head_tiles) weigh<2>(p + h * kTileWords, values, n_steps, acc + h * kTileWords, add, work);
        else weigh<1>(p + h * kTileWords, values, n_steps, acc + h * kTileWords, add, work);
      }
      tiles.step(n_steps * 16);
    }
  }

  void finish(const Scratch& s, int64_t t, bool empty) const {
    bf16* out = static_cast<bf16*>(a.out) + t * a.heads * a.value_dim;
    float* lse = static_cast<float*>(a.lse) + t * a.heads;
    for (int64_t h = 0; h < a.heads; ++h, out += a.value_dim) {
      if (empty || s.sum[h] == 0) {  // no key, or scores of -inf alone
        lse[h] = __builtin_inff();
        std::memset(static_cast<void*>(out), 0, sizeof(bf16) * a.value_dim);
        continue;
      }
      lse[h] = s.base[h] + __builtin_logf(s.sum[h]);
      const F inverse = splat<F>(1 / s.rounded[h]);
      const float* x = s.acc + h / 16 * kTileWords + h % 16 * 16;
      for (int64_t d = 0; d < a.value_dim; d += 32, x += 2 * head_tiles * kTileWords) {
        F first, second;
        natural_order(load(x).v, load(x + head_tiles * kTileWords).v, first, second);
        store_n(out + d, first * inverse, a.value_dim - d);
        if (a.value_dim - d > 16) store_n(out + d + 16, second * inverse, a.value_dim - d - 16);
      }
    }
  }

  // Queries t0 .. t1 - 1, one after the other; the rows that one begins with are fetched while the one before ends.
  void queries(int64_t t0, int64_t t1) const {
    const TileSession session;
    Scratch s = scratch();
    std::memset(s.zeros, 0, sizeof(uint16_t) * dim32);
    list_keys(t0, s.keys[0]);
    for (int64_t t = t0; t < t1; ++t) {
      Keys &mine = s.keys[(t - t0) & 1], &next = s.keys[(t - t0 + 1) & 1];
      next.blocks = 0;
      if (t + 1 < t1) list_keys(t + 1, next);
      query(s, t, mine, next);
    }
  }

  void query(const Scratch& s, int64_t t, const Keys& mine, const Keys& next) const {
    pack_heads(words_of(a.q) + t * a.heads * a.dim, a.dim, s.q);
    const Scored scored{s.q, s.s, dim32 / 32};
    const uint16_t* kv = words_of(a.kv);
    int64_t n_before = 0;
    for (int64_t b = 0; b < mine.blocks; ++b) {
      const int32_t* keys = mine.keys + mine.start[b];
      const int64_t n = mine.start[b + 1] - mine.start[b];
      RowFetch fetch{kv, a.dim, nullptr, 0};
      if (b + 1 < mine.blocks) fetch.keys = keys + n, fetch.n = mine.start[b + 2] - mine.start[b + 1];
      else if (next.blocks) fetch.keys = next.keys, fetch.n = next.start[1];
      const uint16_t** rows = s.rows[b & 1];
      for (int64_t i = 0; i < n; ++i) rows[i] = kv + keys[i] * a.dim;
      for (int64_t i = n; i < kTileBlock && i < n + 64; ++i) rows[i] = s.zeros;
      for (int64_t h = 0; h < lanes; h += 16) store(s.max + h, splat<F>(-__builtin_inff()));
      const auto fetch_some = [&] { fetch.step(kFetches); };
      score_block(scored, s.ring, rows, n, fetch_some,
                  [&](int64_t h, int64_t c, int64_t i, int64_t m) { raise_max(s, h, c, i, m); });
      const bool rescaled = choose_base(s, b == 0);
      Softmax softmax{*this, s, n, s.p[b & 1]};
      if (b > 0) {
        weigh_block(s, s.rows[1 - (b & 1)], n_before, value32, s.p[1 - (b & 1)], b > 1, [&] {
          softmax.step();
          fetch.step(kFetches);
        });
        if (rescaled) rescale(s);
      }
      softmax.finish();
      fetch.step(1 << 30);
      n_before = n;
    }
    const int64_t last = (mine.blocks - 1) & 1;
    if (mine.blocks) weigh_block(s, s.rows[last], n_before, value32, s.p[last], mine.blocks > 1, [] {});
    finish(s, t, mine.blocks == 0);
  }

  void run() const {
    if (const int64_t groups = head_groups(a); groups > 1)
      return for_each_head_group(a, groups, [](const SparseMlaArgs& part) { TileForward(part).queries(0, 1); });
    constexpr int64_t kMost = 8;
    int64_t together = a.queries / (4 * num_threads());
    together = together < 1 ? 1 : together > kMost ? kMost : together;
    parallel_tasks((a.queries + together - 1) / together, [&](int64_t task) {
      const int64_t t0 = task * together;
      queries(t0, t0 + together < a.queries ? t0 + together : a.queries);
    });
  }
};

}  // namespace
}  // namespace glm5::cpu::GLM5_ISA
