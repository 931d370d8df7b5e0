// Dense attention forward on AMX tiles, bf16. The same online softmax as forward.h, key blocks counted from each row's own
// ks. A group of 64 rows meets a block of 256 keys in three steps: scores (tiles), probabilities (vectors), values (tiles);
// the vectors work on one group's probabilities while the tiles multiply its neighbours, a little beside every step.
#pragma once

#include "mla_attention/finite.h"
#include "mla_attention/mla_attention.h"
#include "mla_attention/softmax.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int64_t kTile = 16, kTileElements = 512;     // lines of a tile, and its bf16 elements: 32 a line
constexpr int64_t kKeyBlock = 256, kHalfBlock = 128;   // keys; the softmax goes by halves of a block
constexpr int64_t kGroupRows = 64;                     // four tiles: each tile of keys or values is loaded once for them
constexpr int64_t kScoreStride = kKeyBlock + kTile;    // not a power of two: rows would meet in few cache sets
constexpr int64_t kProbabilities = kGroupRows * kKeyBlock;
constexpr int64_t kPackedBytes = 32 << 20;             // of keys packed ahead at a time, if one head needs no more

GLM5_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sizes of a call. Everything that tiles read lies tile by tile, 1 KiB each, k innermost.
struct Shape {
  int64_t k_steps, v_tiles;    // of 32 of the query's dims, of 16 of the value's
  int64_t k_block, v_block;    // elements of a packed key block: [16 keys][k_steps] and [v_tiles][32 keys]
  explicit Shape(const MlaAttentionArgs& a)
      : k_steps(ceil_div(a.dk, 32)),
        v_tiles(ceil_div(a.dv, kTile)),
        k_block(kKeyBlock / kTile * k_steps * kTileElements),
        v_block(v_tiles * (kKeyBlock / 32) * kTileElements) {}
};

struct TileScratch {
  bf16 *q, *k, *v[2], *p[2];  // [rows][k_steps]; own key blocks, where none is packed ahead; [64 rows][256 keys]
  bf16* seen;                 // the values of a block that one row sees
  float* scores[2];           // [kGroupRows][kScoreStride]
  float* out;                 // [rows][v_tiles] in tiles
  float *one, *largest;       // a tile; [rows]: the running maximum of the scaled scores
  float* total;               // [rows][16]: sums of 2^(score - maximum)

  TileScratch(Carver& carver, const Shape& shape, int64_t rows, bool packs) {
    const int64_t places = round_up(rows, kGroupRows);
    q = carver.take<bf16>(places * shape.k_steps * 32);
    k = carver.take<bf16>(packs ? shape.k_block : 0);
    for (auto& buffer : v) buffer = carver.take<bf16>(packs ? shape.v_block : 0);
    seen = carver.take<bf16>(shape.v_block);
    for (auto& buffer : p) buffer = carver.take<bf16>(kProbabilities);
    for (auto& buffer : scores) buffer = carver.take<float>(kGroupRows * kScoreStride);
    out = carver.take<float>(places * shape.v_tiles * kTile);
    one = carver.take<float>(kTile * kTile);
    largest = carver.take<float>(places);
    total = carver.take<float>(places * kTile);
  }
};

// Some rows against one key block: the keys that each sees, and what its earlier sums are to be multiplied by.
struct TileGroup {
  int64_t first, count = 0, most;
  int64_t num_keys[kGroupRows];
  alignas(64) float shift[kGroupRows], fade[kGroupRows];  // minus the new maximum; and the factor
  // Of the block:
  bool first_block, finite;
  const bf16 *packed_values, *values;  // and as they lie in the tensor
  float* scores;
  bf16* p;
};

// Memory that the next key block lies in, brought into L2 a few lines at a time.
struct Fetch {
  const char *at = nullptr, *end = nullptr;
  GLM5_INLINE void step() {
    if (at < end) __builtin_prefetch(at, 0, 2), at += 64;
  }
};

// What the vector units do beside the tiles: the online softmax of one group, in units of a row (its maximum) or of half a
// row (its probabilities).
struct Softmax {
  const TileScratch& s;
  float scale;
  int64_t units_a_step;
  Fetch fetch_keys{}, fetch_values{};
  TileGroup* g = nullptr;
  int64_t unit = 0, end = 0;

  void start(TileGroup* group) { g = group, unit = 0, end = 3 * group->count; }

  __attribute__((noinline)) void step() {
    fetch_keys.step();
    fetch_values.step();
    for (int64_t i = 0; i < units_a_step && unit < end; ++i) run();
  }
  void finish() {
    while (unit < end) run();
  }

 private:
  GLM5_INLINE void run() {
    if (unit < g->count) {
      find_maximum(unit);
      if (++unit == g->count) raise_maxima();
    } else {
      weigh_half((unit - g->count) / 2, (unit - g->count) % 2);
      ++unit;
    }
  }

  void find_maximum(int64_t row) {
    const int64_t n = g->num_keys[row];
    g->shift[row] = n ? largest_score<bf16>(g->scores + row * kScoreStride, n, scale) : -__builtin_inff();
  }

  void raise_maxima() {
    const F lowest = splat<F>(-__builtin_inff()), zero = splat<F>(0);
    for (int64_t r = g->count; r < round_up(g->count, kTile); ++r) g->shift[r] = -__builtin_inff();
    for (int64_t r = 0; r < g->count; r += kTile) {
      float* largest = s.largest + g->first + r;
      const F before = load(largest), after = max(load(g->shift + r), before);
      const F shift = where_lt(lowest, after, after, zero);
      store(g->fade + r, pow2(before - shift));
      store(g->shift + r, zero - shift);
      store(largest, after);
    }
  }

  // Scores of half a block become probabilities relative to the running maximum, in tiles, with zeros after the row's keys
  // as far as the values' product reads.
  void weigh_half(int64_t row, int64_t half) {
    const int64_t n = smaller(kHalfBlock, g->num_keys[row] - half * kHalfBlock);
    const int64_t read = smaller(kHalfBlock, round_up(g->most, 32) - half * kHalfBlock);
    const float* scores = g->scores + row * kScoreStride + half * kHalfBlock;
    bf16* p = g->p + (row / kTile * (kKeyBlock / 32) + half * (kHalfBlock / 32)) * kTileElements + row % kTile * 32;
    int64_t i = 0;
    if (n > 0) {
      const F scales = splat<F>(scale), shifts = splat<F>(g->shift[row]), zero = splat<F>(0);
      F sums[4] = {zero, zero, zero, zero};
      const auto weight = [&](int64_t at) { return pow2(fma(load(scores + at), scales, shifts)); };
      if (n == kHalfBlock) {
#pragma GCC unroll 4
        for (; i < kHalfBlock; i += 32) {
          const F low = weight(i), high = weight(i + 16);
          sums[i / 32 % 2 * 2] = sums[i / 32 % 2 * 2] + low, sums[i / 32 % 2 * 2 + 1] = sums[i / 32 % 2 * 2 + 1] + high;
          store_pair(p + i / 32 * kTileElements, low, high);
        }
      } else {
        for (; i < n; i += 32) {
          const F low = {_mm512_maskz_mov_ps(first_n(n - i), weight(i).v)};
          const F high = {_mm512_maskz_mov_ps(n - i > 16 ? first_n(n - i - 16) : __mmask16{0}, weight(i + 16).v)};
          sums[i / 32 % 2 * 2] = sums[i / 32 % 2 * 2] + low, sums[i / 32 % 2 * 2 + 1] = sums[i / 32 % 2 * 2 + 1] + high;
          store_pair(p + i / 32 * kTileElements, low, high);
        }
      }
      float* total = s.total + (g->first + row) * kTile;
      const F before = half ? load(total) : load(total) * splat<F>(g->fade[row]);
      store(total, before + ((sums[0] + sums[2]) + (sums[1] + sums[3])));
    }
    for (; i < read; i += 32) store_pair(p + i / 32 * kTileElements, splat<F>(0), splat<F>(0));
  }

  GLM5_INLINE void store_pair(bf16* p, F low, F high) {
    _mm512_store_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v)));
  }
};

inline constexpr const char* kForwardTileNames[5] = {"", "mla forward tiles 1", "mla forward tiles 2", "mla forward tiles 3",
                                                     "mla forward tiles 4"};

// R tiles of A (a_stride elements apart) times one column of tiles of B. The sums go to C, tile rows c_row floats apart.
template <int R>
__attribute__((noinline)) void multiply_tiles(int64_t steps, const bf16* a, int64_t a_stride, const bf16* b, float* c,
                                              int64_t c_stride, int64_t c_row, bool resume, Softmax* beside) {
  GLM5_COUNT_PATH(kForwardTileNames[R]);
  const int64_t bytes = c_row * 4;
  if (resume) {
    _tile_loadd(0, c, bytes);
    if constexpr (R > 1) _tile_loadd(1, c + c_stride, bytes);
    if constexpr (R > 2) _tile_loadd(2, c + 2 * c_stride, bytes);
    if constexpr (R > 3) _tile_loadd(3, c + 3 * c_stride, bytes);
  } else {
    _tile_zero(0);
    if constexpr (R > 1) _tile_zero(1);
    if constexpr (R > 2) _tile_zero(2);
    if constexpr (R > 3) _tile_zero(3);
  }
  for (int64_t i = 0; i < steps; ++i, a += kTileElements, b += kTileElements) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (R > 1) {
      _tile_loadd(5, a + a_stride, 64);
      _tile_dpbf16ps(1, 5, 6);
    }
    if constexpr (R > 2) {
      _tile_loadd(4, a + 2 * a_stride, 64);
      _tile_dpbf16ps(2, 4, 6);
    }
    if constexpr (R > 3) {
      _tile_loadd(5, a + 3 * a_stride, 64);
      _tile_dpbf16ps(3, 5, 6);
    }
    if (beside) beside->step();
  }
  _tile_stored(0, c, bytes);
  if constexpr (R > 1) _tile_stored(1, c + c_stride, bytes);
  if constexpr (R > 2) _tile_stored(2, c + 2 * c_stride, bytes);
  if constexpr (R > 3) _tile_stored(3, c + 3 * c_stride, bytes);
}

constexpr decltype(&multiply_tiles<1>) kMultiply[5] = {nullptr, multiply_tiles<1>, multiply_tiles<2>, multiply_tiles<3>,
                                                       multiply_tiles<4>};

void add_scores(const TileScratch& s, const Shape& shape, const TileGroup& g, const bf16* keys, Softmax* beside) {
  const auto multiply = kMultiply[ceil_div(g.count, kTile)];
  const bf16* q = s.q + g.first * shape.k_steps * 32;
  for (int64_t j = 0; j < ceil_div(g.most, kTile); ++j)
    multiply(shape.k_steps, q, shape.k_steps * kTileElements, keys + j * shape.k_steps * kTileElements, g.scores + j * kTile,
             kTile * kScoreStride, kScoreStride, false, beside);
}

// out = out * fade + P V. A row's keys are followed by zeros in P, which add nothing to what its own keys gave (but may
// turn -0 into +0, as every row does at its end) while V is finite. Where it is not, each row gets a copy of V that ends
// with its own keys.
void add_values_in_tiles(const TileScratch& s, const Shape& shape, const MlaAttentionArgs& a, TileGroup& g,
                         Softmax* beside) {
  float* group_out = s.out + g.first * shape.v_tiles * kTile;
  const int64_t row_tile = shape.v_tiles * 256;
  if (!g.first_block)
    for (int64_t r = 0; r < g.count; ++r) {
      if (g.num_keys[r] == 0 || g.fade[r] == 1.f) continue;
      float* out = group_out + r / kTile * row_tile + r % kTile * kTile;
      const F fade = splat<F>(g.fade[r]);
      for (int64_t j = 0; j < shape.v_tiles; ++j) store(out + j * 256, load(out + j * 256) * fade);
    }
  if (g.finite) {
    const auto multiply = kMultiply[ceil_div(g.count, kTile)];
    const int64_t steps = ceil_div(g.most, 32);
    for (int64_t j = 0; j < shape.v_tiles; ++j)
      multiply(steps, g.p, kKeyBlock / 32 * kTileElements, g.packed_values + j * (kKeyBlock / 32) * kTileElements,
               group_out + j * 256, row_tile, kTile, !g.first_block, beside);
    return;
  }
  GLM5_COUNT_PATH("mla tiles with values that are not finite");
  for (int64_t r = 0; r < g.count; ++r) {
    const int64_t n = g.num_keys[r];
    if (n == 0) continue;
    pack_rows<bf16, bf16, kTile>(s.seen, kKeyBlock * kTile, g.values, a.v_stride, n, a.dv);
    for (int64_t j = 0; j < shape.v_tiles; ++j) {
      float* out = group_out + r / kTile * row_tile + j * 256;
      std::memcpy(s.one, out, 256 * sizeof(float));
      multiply_tiles<1>(ceil_div(n, 32), g.p + r / kTile * (kKeyBlock / 32) * kTileElements, 0,
                        s.seen + j * (kKeyBlock / 32) * kTileElements, s.one, 0, kTile, !g.first_block, nullptr);
      std::memcpy(out + r % kTile * kTile, s.one + r % kTile * kTile, kTile * sizeof(float));
    }
  }
}

// The key blocks of one document and head, packed ahead; or nothing.
struct PackedBlocks {
  bf16 *k, *v;
  uint8_t* finite;  // whether a block's values are
};

// Packs keys [key, key + width) of a head, and their values. Whether the values are finite.
bool pack_block(const MlaAttentionArgs& a, const Shape& shape, int64_t head, int64_t key, int64_t width, bf16* k, bf16* v) {
  const int64_t k_stride = a.heads * a.dk, v_stride = a.v_stride;
  const bf16* values = static_cast<const bf16*>(a.v) + key * v_stride + head * a.dv;
  pack_transposed<bf16, bf16, kTile>(k, shape.k_steps * kTileElements,
                                     static_cast<const bf16*>(a.k) + key * k_stride + head * a.dk, k_stride, width, a.dk);
  pack_rows<bf16, bf16, kTile>(v, kKeyBlock * kTile, values, v_stride, width, a.dv);
  return all_finite(values, v_stride, width, a.dv);
}

void copy_queries(const MlaAttentionArgs& a, const Shape& shape, const MlaRowTile& tile, int64_t head, bf16* q) {
  const int64_t rows = tile.end - tile.begin, stride = a.heads * a.dk;
  const bf16* src = static_cast<const bf16*>(a.q) + tile.begin * stride + head * a.dk;
  for (int64_t r = 0; r < round_up(rows, kTile); ++r)
    for (int64_t i = 0; i < shape.k_steps; ++i) {
      const int64_t n = r < rows ? a.dk - i * 32 : 0;
      const __mmask32 here = n >= 32 ? ~0u : (1u << n) - 1u;
      _mm512_store_si512(q + (r / kTile * shape.k_steps + i) * kTileElements + r % kTile * 32,
                         _mm512_maskz_loadu_epi16(here, src + r * stride + i * 32));
    }
}

void finish_rows(const MlaAttentionArgs& a, const Shape& shape, const TileScratch& s, const MlaRowTile& tile, int64_t head) {
  for (int64_t r = 0; r < tile.end - tile.begin; ++r) {
    const int64_t row = tile.begin + r;
    bf16* out = static_cast<bf16*>(a.out) + (row * a.heads + head) * a.dv;
    float* lse = static_cast<float*>(a.lse) + row * a.heads + head;
    const float total = sum(load(s.total + r * kTile));
    if (total == 0) {  // no key, or every score -inf
      for (int64_t i = 0; i < a.dv; ++i) out[i] = bf16{};
      *lse = __builtin_inff();
      continue;
    }
    const F divisor = splat<F>(total), plus_zero = splat<F>(0);
    const float* sums = s.out + r / kTile * shape.v_tiles * 256 + r % kTile * kTile;
    for (int64_t i = 0; i < a.dv; i += kTile) store_n(out + i, (load(sums + i * kTile) + plus_zero) / divisor, a.dv - i);
    *lse = s.largest[r] * static_cast<float>(kLn2) + natural_log(total);
  }
}

void forward_tile(const MlaAttentionArgs& a, const Shape& shape, const MlaRowTile& tile, int64_t head,
                  const PackedBlocks* packed) {
  const int64_t rows = tile.end - tile.begin;
  Carver count{nullptr};
  TileScratch(count, shape, rows, !packed);
  Carver carver{static_cast<char*>(thread_scratch(0, count.used))};
  const TileScratch s(carver, shape, rows, !packed);
  const TileSession session;
  copy_queries(a, shape, tile, head, s.q);
  for (int64_t r = 0; r < round_up(rows, kTile); ++r) s.largest[r] = -__builtin_inff();
  std::memset(s.total, 0, static_cast<size_t>(rows * kTile) * sizeof(float));

  // A full group has this many steps of the tiles for its 3 x 64 units of the softmax.
  const int64_t steps = kKeyBlock / kTile * shape.k_steps + kKeyBlock / 32 * shape.v_tiles;
  Softmax softmax{s, static_cast<float>(a.scale * kLog2e), ceil_div(3 * kGroupRows, steps)};
  TileGroup groups[2];
  TileGroup* last = nullptr;  // whose probabilities are being formed, and whose values come next
  int parity = 0;
  for (int64_t block = 0; block < ceil_div(tile.ke - tile.ks, kKeyBlock); ++block) {
    const int64_t key = tile.ks + block * kKeyBlock, width = smaller(kKeyBlock, tile.ke - key);
    const bf16 *keys = s.k, *values = s.v[block % 2];
    bool finite;
    if (packed) {
      keys = packed->k + block * shape.k_block, values = packed->v + block * shape.v_block;
      finite = packed->finite[block];
      if (key + width < tile.ke) {
        const char* next_keys = reinterpret_cast<const char*>(keys + shape.k_block);
        const char* next_values = reinterpret_cast<const char*>(values + shape.v_block);
        softmax.fetch_keys = {next_keys, next_keys + shape.k_block * 2};
        softmax.fetch_values = {next_values, next_values + shape.v_block * 2};
      }
    } else {
      finite = pack_block(a, shape, head, key, width, s.k, s.v[block % 2]);
    }
    for (int64_t first = 0; first < rows; first += kGroupRows) {
      TileGroup& g = groups[parity];
      g.first = first, g.count = smaller(kGroupRows, rows - first), g.most = 0;
      for (int64_t r = 0; r < g.count; ++r) {
        const int64_t row = tile.begin + first + r;
        g.num_keys[r] = a.ks[row] < a.ke[row] ? larger(0, smaller(width, a.ke[row] - key)) : 0;
        g.most = larger(g.most, g.num_keys[r]);
      }
      if (g.most == 0) continue;
      g.first_block = block == 0, g.finite = finite, g.packed_values = values;
      g.values = static_cast<const bf16*>(a.v) + key * a.v_stride + head * a.dv;
      g.scores = s.scores[parity], g.p = s.p[parity];
      add_scores(s, shape, g, keys, &softmax);
      softmax.finish();
      softmax.start(&g);
      if (last) add_values_in_tiles(s, shape, a, *last, &softmax);
      last = &g;
      parity ^= 1;
    }
  }
  softmax.finish();
  if (last) add_values_in_tiles(s, shape, a, *last, &softmax);
  finish_rows(a, shape, s, tile, head);
}

// Documents of several row tiles have their keys packed once, some heads at a time.
void forward_in_tiles(const MlaAttentionArgs& a) {
  const Shape shape(a);
  // For each row tile the first of its document's blocks, or -1 where it is the only one to read its keys.
  int32_t* first = static_cast<int32_t*>(thread_scratch(1, static_cast<size_t>(a.num_tiles) * sizeof(int32_t)));
  int64_t blocks = 0;
  const auto document_of = [&](int64_t tile, int64_t& ke) {  // its end, and the end of its keys
    int64_t end = tile;
    for (ke = 0; end < a.num_tiles && a.tiles[end].ks == a.tiles[tile].ks; ++end) ke = larger(ke, a.tiles[end].ke);
    return end;
  };
  for (int64_t t = 0, ke = 0; t < a.num_tiles;) {
    const int64_t begin = t, end = document_of(t, ke);
    for (; t < end; ++t) first[t] = end - begin > 1 ? static_cast<int32_t>(blocks) : -1;
    if (end - begin > 1) blocks += ceil_div(ke - a.tiles[begin].ks, kKeyBlock);
  }
  // Blocks are numbered across documents; where each starts, and how many keys it has.
  int64_t* block_key = static_cast<int64_t*>(thread_scratch(2, static_cast<size_t>(2 * blocks) * sizeof(int64_t)));
  for (int64_t t = 0, n = 0, ke = 0; t < a.num_tiles;) {
    const int64_t begin = t;
    t = document_of(begin, ke);
    if (t - begin == 1) continue;
    for (int64_t key = a.tiles[begin].ks; key < ke; key += kKeyBlock, ++n)
      block_key[2 * n] = key, block_key[2 * n + 1] = smaller(kKeyBlock, ke - key);
  }
  const int64_t bytes = blocks * ((shape.k_block + shape.v_block) * 2 + 1);  // a head
  const int64_t most = bytes ? larger(1, smaller(a.heads, kPackedBytes / bytes)) : a.heads;
  bf16* keys = static_cast<bf16*>(thread_scratch(3, static_cast<size_t>(most * bytes)));
  bf16* values = keys + most * blocks * shape.k_block;
  uint8_t* finite = reinterpret_cast<uint8_t*>(values + most * blocks * shape.v_block);
  for (int64_t head = 0; head < a.heads; head += most) {
    const int64_t heads = smaller(most, a.heads - head);
    const auto at = [&](int64_t place) {
      return PackedBlocks{keys + place * shape.k_block, values + place * shape.v_block, finite + place};
    };
    parallel_tasks(blocks * heads, [&](int64_t task) {
      GLM5_COUNT_PATH("mla keys packed ahead");
      const int64_t block = task / heads, h = task % heads;
      const PackedBlocks packed = at(h * blocks + block);
      *packed.finite = pack_block(a, shape, head + h, block_key[2 * block], block_key[2 * block + 1], packed.k, packed.v);
    });
    parallel_tasks(a.num_tiles * heads, [&](int64_t task) {
      const int64_t t = a.order[task / heads], h = task % heads;
      const PackedBlocks packed = at(h * blocks + larger(first[t], 0));
      forward_tile(a, shape, a.tiles[t], head + h, first[t] < 0 ? nullptr : &packed);
    });
  }
}

}  // namespace
}  // namespace glm5::cpu::GLM5_ISA
