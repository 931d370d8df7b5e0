// The indexer's scores on AMX tiles, for elements that a tile unit multiplies: 32 rows of q x 32 keys at a time, a row being
// one head of one query, so that few heads fill a tile with several queries. Dot products go to a buffer in cache, from which
// the weighted relu sums run in the order 0, 1, ..., H-1 while the tile unit works on the next rows. An element of a tile
// product is the same sum in the same order wherever in the tile it lies (row invariance).
//
// Of few rows of q (decoding) keys are the left operand, so that tiles read them where they lie and nothing is packed: one
// step of a product is the same in either order.
#pragma once

#define GLM5_INDEXER_STEP_BLOCK 16

#include "topk_indices/topk_indices.h"

namespace glm5::cpu::amx {
using avx512::select_topk;  // the selection has no AMX form
}

#include "lightning_indexer/forward.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int64_t kTileRows = 16;

void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
  // GCC 12's intrinsic names 8 bytes of the configuration as its input; without this the other stores are dropped.
  __asm__ volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// GCC does not know that a tile load reads memory: keeps the stores that packed the tiles from sinking below it.
GLM5_INLINE void stores_are_done() { __asm__ volatile("" ::: "memory"); }

// How the tile unit multiplies elements of T: TDPBF16PS into float, or TDPBSSD into int32.
template <class T>
struct TileProduct {
  static constexpr bool kInteger = false;
  using Dot = float;
};
template <class T>
using Dot = typename TileProduct<T>::Dot;
#define GLM5_MULTIPLY_TILES(c, a, b) \
  if constexpr (TileProduct<T>::kInteger) _tile_dpbssd(c, a, b); \
  else _tile_dpbf16ps(c, a, b)

GLM5_INLINE F load_dots(const float* p) { return load(p); }
GLM5_INLINE F load_dots(const int32_t* p) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(p))}; }

// dots[row][key] for two tiles of rows and two of keys.
template <class T>
GLM5_INLINE void multiply(const uint32_t* rows0, const uint32_t* rows1, int64_t steps, const uint32_t* keys, Dot<T>* dots0,
                          Dot<T>* dots1) {
  stores_are_done();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; s += 16) {
    _tile_loadd(4, rows0 + s, steps * 4);
    _tile_loadd(6, keys + s * kTileKeys, kTileKeys * 4);
    GLM5_MULTIPLY_TILES(0, 4, 6);
    _tile_loadd(7, keys + s * kTileKeys + 16, kTileKeys * 4);
    GLM5_MULTIPLY_TILES(1, 4, 7);
    _tile_loadd(5, rows1 + s, steps * 4);
    GLM5_MULTIPLY_TILES(2, 5, 6);
    GLM5_MULTIPLY_TILES(3, 5, 7);
  }
  _tile_stored(0, dots0, kTileKeys * 4);
  _tile_stored(1, dots0 + 16, kTileKeys * 4);
  _tile_stored(2, dots1, kTileKeys * 4);
  _tile_stored(3, dots1 + 16, kTileKeys * 4);
}

// scores[i] = sum_h weights[h] * relu(dots[h][i]) for NV vectors of keys.
template <int NV, class D>
GLM5_INLINE void weigh(const D* dots, const float* weights, int64_t num_heads, float* scores) {
  F total[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) total[v] = splat<F>(0);
  for (int64_t h = 0; h < num_heads; ++h) {
    const F weight = splat<F>(weights[h]);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      total[v] = fma(weight, max(splat<F>(0), load_dots(dots + h * kTileKeys + 16 * v)), total[v]);  // relu(NaN) is NaN
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) store(scores + 16 * v, total[v]);
}

// Rows of a block of queries as [query * num_heads + head][step], at least kTileRows of them; dot products of a group of
// queries with a tile of keys, twice, so that one can be written while the other is read.
template <class T>
struct Rows {
  const uint32_t* data;
  int64_t count, steps, num_heads, group;
  Dot<T>* dots[2];

  Rows(const LightningIndexerArgs& a, int64_t q0, int64_t q1, uint32_t* buffer)
      : steps(Packing<T>::steps(a.dim)), num_heads(a.num_heads) {
    const int64_t here = (q1 - q0) * num_heads;
    const T* q = static_cast<const T*>(a.q) + q0 * num_heads * a.dim;
    data = here >= kTileRows ? pack_heads(q, here, a.dim, buffer) : buffer;
    if (here < kTileRows) {
      GLM5_COUNT_PATH("lightning_indexer: less than a tile of rows");
      std::memset(buffer, 0, sizeof(uint32_t) * kTileRows * steps);
      const uint32_t* packed = pack_heads(q, here, a.dim, buffer);
      if (packed != buffer) std::memcpy(buffer, packed, sizeof(uint32_t) * here * steps);
    }
    count = max_of(here, kTileRows);
    group = num_heads >= 2 * kTileRows ? 1 : 2 * kTileRows / max_of(num_heads, 1);
    const int64_t rows = group * num_heads + 4 * kTileRows;  // whole tiles, which may begin before the group
    dots[0] = static_cast<Dot<T>*>(thread_scratch(2, sizeof(Dot<T>) * 2 * rows * kTileKeys)) + kTileRows * kTileKeys;
    dots[1] = dots[0] + rows * kTileKeys;
  }

  // Dot products of the rows [r0, r1) with the keys [first, last) of a tile, row r to out[(r - r0) * kTileKeys].
  void multiply_rows(int64_t r0, int64_t r1, const uint32_t* keys, int64_t first, int64_t last, Dot<T>* out) const {
    for (int64_t r = r0; r < r1; r += 2 * kTileRows) {
      // The last tiles step back rather than over the end: what they compute twice is the same.
      const int64_t a = min_of(r, count - kTileRows), b = min_of(r + kTileRows, count - kTileRows);
      if (b == r + kTileRows) GLM5_COUNT_PATH("lightning_indexer: whole tiles of rows");
      else GLM5_COUNT_PATH("lightning_indexer: overlapping tiles of rows");
      for (int64_t i = first / 32 * 32; i < last; i += 32)
        multiply<T>(data + a * steps, data + b * steps, steps, keys + i, out + (a - r0) * kTileKeys + i,
                    out + (b - r0) * kTileKeys + i);
    }
  }
};

template <class D>
void weigh_range(const D* dots, const float* weights, int64_t num_heads, int64_t first, int64_t last, float* scores) {
  if (last - first > 32) {
    GLM5_COUNT_PATH("lightning_indexer: four vectors of keys");
    weigh<4>(dots, weights, num_heads, scores);
  } else {
    GLM5_COUNT_PATH("lightning_indexer: single vectors of keys");
    for (int64_t i = first / 16 * 16; i < last; i += 16) weigh<1>(dots + i, weights, num_heads, scores + i);
  }
}

// Few rows of q as right operands, and their products with 32 keys: twice, so that one can be written while the other is
// read.
constexpr int64_t kFewRows = 128, kTileWords = 256;
constexpr int kFetchEvery = 4;  // lines: the hardware brings those between

struct FewRows {
  const LightningIndexerArgs& a;
  int64_t q0, count, steps, row_tiles;
  uint32_t* tiles;  // [row_tiles][steps / 16] tiles of 16 pairs of dims x 16 rows
  float* dots[2];  // [2 blocks of 16 keys][row_tiles] tiles of 16 keys x 16 rows

  // Whether queries [t0, t1) are few, and heads whole tiles.
  template <class T>
  static bool fit(const LightningIndexerArgs& a, int64_t t0, int64_t t1) {
    return !TileProduct<T>::kInteger && (t1 - t0) * a.num_heads <= kFewRows && a.num_heads > 0 && a.num_heads % 16 == 0 &&
           a.dim % 32 == 0;
  }

  // rows: those queries' heads, one after the other, in pairs.
  FewRows(const LightningIndexerArgs& args, int64_t t0, int64_t t1, const uint32_t* rows)
      : a(args), q0(t0), count(t1 - t0), steps(args.dim / 2), row_tiles(count * args.num_heads / 16) {
    tiles = static_cast<uint32_t*>(thread_scratch(6, sizeof(float) * kTileWords * row_tiles * (steps / 16 + 4)));
    dots[0] = reinterpret_cast<float*>(tiles + row_tiles * steps / 16 * kTileWords);
    dots[1] = dots[0] + 2 * row_tiles * kTileWords;
    for (int64_t j = 0; j < row_tiles; ++j)
      for (int64_t s = 0; s < steps; s += 16) {
        __m512i r[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows + (16 * j + i) * steps + s);
        transpose16(r);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(tiles + (j * steps + s) * 16 + i * 16, r[i]);
      }
  }

  // Fetches the i-th KiB of 16 keys from k0 and 16 from k1, in order, so that the hardware's prefetchers see a stream.
  GLM5_INLINE void fetch(const bf16* k0, const bf16* k1, int64_t i) const {
    const int64_t of_block = a.dim / 32;
    const char* from = reinterpret_cast<const char*>(i < of_block ? k0 : k1) + (i < of_block ? i : i - of_block) * 1024;
#pragma GCC unroll 16
    for (int line = 0; line < 16; line += kFetchEvery) __builtin_prefetch(from + line * 64, 0, 2);
  }

  // Products of 16 keys from k0 and 16 from k1 with all rows. Meanwhile the keys from next0 and next1 are fetched.
  void multiply_keys(const bf16* k0, const bf16* k1, const bf16* next0, const bf16* next1, float* out) const {
    stores_are_done();
    for (int64_t j = 0; j < row_tiles; j += 2) {
      // Of an odd number the last one twice: the same products, stored twice.
      const int64_t second = min_of(j + 1, row_tiles - 1), across = row_tiles * kTileWords;
      const uint32_t *b0 = tiles + j * steps * 16, *b1 = tiles + second * steps * 16;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t s = 0; s < steps; s += 16) {
        _tile_loadd(4, k0 + 2 * s, a.dim * 2);
        _tile_loadd(6, b0 + s * 16, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b1 + s * 16, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, k1 + 2 * s, a.dim * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        if (j == 0 && next0) {
          fetch(next0, next1, 2 * (s / 16));
          fetch(next0, next1, 2 * (s / 16) + 1);
        }
      }
      _tile_stored(0, out + j * kTileWords, 64);
      _tile_stored(1, out + second * kTileWords, 64);
      _tile_stored(2, out + j * kTileWords + across, 64);
      _tile_stored(3, out + second * kTileWords + across, 64);
    }
  }

  // scores[query][key] of those 32 keys, queries being kTileKeys apart.
  void weigh_keys(const float* products, float* scores) const {
    const int64_t tiles_of_query = a.num_heads / 16;
    for (int64_t block = 0; block < 2; ++block)
      for (int64_t t = 0; t < count; ++t) {
        const float* weights = static_cast<const float*>(a.weights) + (q0 + t) * a.num_heads;
        F total = splat<F>(0);
        for (int64_t j = 0; j < tiles_of_query; ++j, products += kTileWords, weights += 16) {
          __m512i r[16];
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(products + i * 16);
          transpose16(r);
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i)
            total = fma(splat<F>(weights[i]), max(splat<F>(0), F{_mm512_castsi512_ps(r[i])}), total);  // relu(NaN) is NaN
        }
        store(scores + t * kTileKeys + block * 16, total);
      }
  }

  // The same for the 64 keys of a tile, 16 from each place.
  void score_tile(const bf16* const (&places)[4], const bf16* const (&next)[4], float* scores) const {
    GLM5_COUNT_PATH("lightning_indexer: keys where they lie");
    multiply_keys(places[0], places[1], next[0], next[1], dots[0]);
    multiply_keys(places[2], places[3], next[2], next[3], dots[1]);
    weigh_keys(dots[0], scores);
    weigh_keys(dots[1], scores + 32);
  }
};

// Where the keys [tile, tile + kTileKeys) lie, 16 and 16 one after the other; all null if they do not, or are not all within
// [low, high).
template <class T>
void find_blocks(const LightningIndexerArgs& a, int64_t tile, int64_t low, int64_t high, const T* (&places)[4]) {
  for (int b = 0; b < 4; ++b) places[b] = nullptr;
  if (tile < low || tile + kTileKeys > high) return;
  const LightningIndexerPages& pages = a.pages;
  const T* found[4];
  for (int64_t b = 0; b < 4; ++b) {
    const int64_t s = tile + 16 * b;
    found[b] = static_cast<const T*>(a.k) + s * a.dim;
    if (!pages.table) continue;
    if (pages.page_size % 16) return;
    const int64_t page = pages.table[s / pages.page_size];
    if (page < 0 || page >= pages.num_pages) return;
    const char* begin = static_cast<const char*>(a.k) + page * pages.page_bytes;
    found[b] = reinterpret_cast<const T*>(begin) + s % pages.page_size * a.dim;
  }
  for (int b = 0; b < 4; ++b) places[b] = found[b];
}

// Scores of few queries in bf16 with the keys from *tile on, tile by tile, until one does not lie as find_blocks wants it;
// *tile is then that one.
inline void score_few(const LightningIndexerArgs& a, const FewRows& few, int64_t q0, int64_t q1, int64_t first, int64_t low,
                      int64_t high, int64_t* tile, float* scores, int64_t stride) {
  const bf16 *places[4], *next[4];
  alignas(64) float tile_scores[kFewRows / 16 * kTileKeys];
  find_blocks<bf16>(a, *tile, low, high, next);
  while (next[0]) {
    for (int b = 0; b < 4; ++b) places[b] = next[b];
    find_blocks<bf16>(a, *tile + kTileKeys, low, high, next);
    few.score_tile(places, next, tile_scores);
    for (int64_t t = q0; t < q1; ++t) {
      const int64_t begin = max_of(a.ks[t], *tile), end = min_of(a.ke[t], *tile + kTileKeys);
      if (begin < end)
        std::memcpy(scores + (t - q0) * stride + begin - first, tile_scores + (t - q0) * kTileKeys + begin - *tile,
                    sizeof(float) * (end - begin));
    }
    *tile += kTileKeys;
  }
}

template <class T>
void score_block(const LightningIndexerArgs& a, int64_t q0, int64_t q1, int64_t first, int64_t last, Real<T>* scores,
                 int64_t stride) {
  const Scratch<T> scratch(a, kBlockQueries);
  int64_t low, high;
  visible_range(a, q0, q1, first, last, &low, &high);
  if (low >= high) return;
  const Rows<T> rows(a, q0, q1, scratch.heads);
  const int64_t num_heads = a.num_heads;
  const float* weights = static_cast<const float*>(a.weights);
  TileKeys<T> keys(a);
  alignas(64) float tile_scores[kTileKeys];
  configure_tiles();
  const bool has_few = sizeof(T) == 2 && FewRows::fit<T>(a, q0, q1);
  const FewRows few(a, q0, has_few ? q1 : q0, reinterpret_cast<const uint32_t*>(rows.data));
  for (int64_t tile = low / kTileKeys * kTileKeys; tile < high; tile += kTileKeys) {
    if constexpr (sizeof(T) == 2) {
      if (has_few) score_few(a, few, q0, q1, first, low, high, &tile, scores, stride);
      if (tile >= high) break;
    }
    keys.pack(tile, low, high, scratch.keys);
    const int64_t tile_end = min_of(tile + kTileKeys, last);
    const auto finish = [&](int64_t g0, const Dot<T>* dots) {
      for (int64_t t = g0; t < min_of(g0 + rows.group, q1); ++t) {
        const int64_t begin = max_of(max_of(a.ks[t], first), tile), end = min_of(a.ke[t], tile_end);
        if (begin >= end) continue;
        float* out = scores + (t - q0) * stride - first;
        const Dot<T>* mine = dots + (t - g0) * num_heads * kTileKeys;
        if (end - begin == kTileKeys && !keys.scale) {
          weigh<4>(mine, weights + t * num_heads, num_heads, out + begin);
          continue;
        }
        weigh_range(mine, weights + t * num_heads, num_heads, begin - tile, end - tile, tile_scores);
        if (keys.scale)
          for (int64_t s = begin; s < end; ++s) out[s] = tile_scores[s - tile] * keys.scale[s - tile];
        else std::memcpy(out + begin, tile_scores + begin - tile, sizeof(float) * (end - begin));
      }
    };
    int64_t pending = -1, turn = 0;
    for (int64_t g0 = q0; g0 < q1; g0 += rows.group) {
      const int64_t g1 = min_of(g0 + rows.group, q1);
      int64_t begin, end;
      visible_range(a, g0, g1, max_of(tile, first), tile_end, &begin, &end);
      if (begin >= end) continue;
      rows.multiply_rows((g0 - q0) * num_heads, (g1 - q0) * num_heads, scratch.keys, begin - tile, end - tile,
                         rows.dots[turn]);
      if (pending >= 0) finish(pending, rows.dots[1 - turn]);
      pending = g0, turn = 1 - turn;
    }
    if (pending >= 0) finish(pending, rows.dots[1 - turn]);
  }
  _tile_release();
}

template <class T>
void score_selected(const LightningIndexerArgs& a, int64_t t, const int32_t* indices, int64_t count, Real<T>* scores) {
  const Scratch<T> scratch(a, 1);
  const Rows<T> rows(a, t, t + 1, scratch.heads);
  alignas(64) float tile_scores[kTileKeys];
  configure_tiles();
  for (int64_t i = 0; i < count; i += kTileKeys) {
    const int64_t n = min_of(kTileKeys, count - i);
    pack_keys(KeyRows<T>{static_cast<const T*>(a.k), a.dim, indices + i}, n, scratch.keys);
    rows.multiply_rows(0, a.num_heads, scratch.keys, 0, n, rows.dots[0]);
    weigh_range(rows.dots[0], static_cast<const float*>(a.weights) + t * a.num_heads, a.num_heads, 0, n, tile_scores);
    std::memcpy(scores + i, tile_scores, sizeof(float) * n);
  }
  _tile_release();
}

}  // namespace
}  // namespace glm5::cpu::GLM5_ISA
