// The indexer's scores on AMX tiles, for elements that a tile unit multiplies: 32 rows of q x 32 keys at a time, a row being
// one head of one query, so that few heads fill a tile with several queries. Dot products go to a buffer in cache, from which
// the weighted relu sums run in the order 0, 1, ..., H-1 while the tile unit works on the next rows. An element of a tile
// product is the same sum in the same order wherever in the tile it lies (row invariance).
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
  for (int64_t tile = low / kTileKeys * kTileKeys; tile < high; tile += kTileKeys) {
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
