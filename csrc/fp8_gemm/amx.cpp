// Products of e4m3 matrices on AMX tiles (contract: fp8_gemm.h). Lines of b (columns of the product) stream: a block of 32
// or 64 lines x 128 of k is decoded to bf16 tiles in L1 and meets packed rows, up to 64 of them at a time. TDPBF16PS adds
// 32 products to each of 16 x 16 sums in an order that no other row or column can change; four of them are a block's sum,
// which leaves the tile unit to be scaled and added to the blocks before it. Scaling one block's sums and decoding the next
// block's lines goes on beside the tile unit's work.
#include "fp8_gemm/pairs.h"
#include "fp8_gemm/units.h"

#include "common/gemm/pack.h"

namespace glm5::cpu::amx {
namespace {

constexpr int64_t kTile = 16, kSteps = 4;  // a block: 16 lines, four steps of 32 of k
constexpr int64_t kChunk = 64;  // rows that meet a block of lines in L1
constexpr int64_t kTileFloats = kTile * 16, kTileBytes = 1024, kLineTileBytes = kSteps * kTileBytes;
constexpr int64_t kCallFloats = 4 * kTileFloats, kMaxCalls = 4;
// Along a line, to what is prefetched. More than 32 lines at once are more than the memory system follows.
constexpr int64_t kAhead = 4 * kFp8Block;

// Lines that are decoded together: with many chunks of rows twice as many, so that those are read half as often.
int64_t line_tiles_of(const Unit& u) { return u.rows > kChunk ? 4 : 2; }

// ---- Rows: [chunk of rows][block][tile of rows][step][16 pairs of k][width]; scales [chunk][block][tile][pattern] ----

// Rows in a tile: all there are where they are few, so that they stay small.
int64_t width_of(const Unit& u) { return u.rows < kTile ? u.rows : kTile; }
int64_t row_tiles(int64_t rows) { return ceil_div(rows, kTile); }
int64_t row_tile_bytes(int64_t width) { return kSteps * kTile * width * 4; }
// The scales of a tile of sums: the same for every line, or, where tiles are narrow, as many vectors as there are rows.
int64_t scale_floats(int64_t width) { return width == kTile ? kTile : width * kTile; }

char* packed_tile(const Unit& u, int64_t chunk, int64_t block, int64_t tile) {
  const int64_t bytes = row_tile_bytes(width_of(u)), tiles = row_tiles(at_most(kChunk, u.rows - chunk * kChunk));
  return u.packed + (chunk * u.blocks * (kChunk / kTile) + block * tiles + tile) * bytes;
}
float* packed_scales(const Unit& u, int64_t chunk, int64_t block, int64_t tile) {
  const int64_t width = width_of(u), tiles = row_tiles(at_most(kChunk, u.rows - chunk * kChunk));
  return reinterpret_cast<float*>(u.packed + row_tiles(u.rows) * u.blocks * row_tile_bytes(width)) +
         (chunk * u.blocks * (kChunk / kTile) + block * tiles + tile) * scale_floats(width);
}

void pack_tile(const Unit& u, int64_t chunk, int64_t tile) {
  const PairDecoder decode;
  const int64_t width = width_of(u), first = chunk * kChunk + tile * kTile, rows = at_most(kTile, u.rows - first);
  for (int64_t block = 0; block < u.blocks; ++block) {
    float* out = reinterpret_cast<float*>(packed_tile(u, chunk, block, tile));
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t k = block * kFp8Block + half * 64;
      F even[16], odd[16];
#pragma GCC unroll 1
      for (int64_t i = 0; i < 16; ++i) {
        __m512i e, o;
        decode(i < rows ? load_64(row_of(u, first + i) + k, u.g->k - k) : _mm512_setzero_si512(), e, o);
        even[i].v = _mm512_castsi512_ps(e), odd[i].v = _mm512_castsi512_ps(o);
      }
      transpose(even);
      transpose(odd);
#pragma GCC unroll 1
      for (int64_t i = 0; i < 16; ++i, out += width) store_n(out, even[i], width);
#pragma GCC unroll 1
      for (int64_t i = 0; i < 16; ++i, out += width) store_n(out, odd[i], width);
    }
    float* scales = packed_scales(u, chunk, block, tile);
    for (int64_t i = 0; i < scale_floats(width); ++i)
      scales[i] = i % width < rows ? scales_of(u, first + i % width)[block] : 0.f;
  }
}

// ---- What is done beside the tile unit's work ----------------------------------------------------------------------------

struct Beside {
  // Tiles of sums of a block, to be scaled and added to the totals.
  int tiles;  // 0, 2 or 4
  const float* sums;
  float* totals;
  const float* scales[2];  // of the tiles with even and odd numbers
  float b_scale;
  int64_t width;
  bool begin;  // totals begin with them
  // Lines to be decoded: from number `line` to `lines`; there are num_lines, and k_left of k.
  const e4m3* first_line;
  int64_t line_stride, lines, num_lines, k_left, ahead;
  char* panel;
  int64_t line, lines_a_step;
};

// Tile t.
GLM5_INLINE void scale_tile(const Beside& b, int t) {
  const F b_scale = splat<F>(b.b_scale), zero = splat<F>(0.f);
  const float *sums = b.sums + t * kTileFloats, *scales = b.scales[t % 2];
  float* totals = b.totals + t * kTileFloats;
  if (b.width == kTile) {
    const F scale = load(scales) * b_scale;
    if (b.begin) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) store(totals + i * 16, fma(load(sums + i * 16), scale, zero));
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) store(totals + i * 16, fma(load(sums + i * 16), scale, load(totals + i * 16)));
    }
    return;
  }
  const int64_t count = b.width * kTile;
  const bool begin = b.begin;
  for (int64_t i = 0; i < count; i += 16)
    store(totals + i, fma(load(sums + i), load(scales + i) * b_scale, begin ? zero : load(totals + i)));
}

// One line's 128 of k become a row of each of four tiles.
GLM5_INLINE void decode_line(const PairDecoder& decode, __m512i first, __m512i second, char* out) {
  __m512i even, odd;
  decode(first, even, odd);
  _mm512_store_si512(out, even);
  _mm512_store_si512(out + kTileBytes, odd);
  decode(second, even, odd);
  _mm512_store_si512(out + 2 * kTileBytes, even);
  _mm512_store_si512(out + 3 * kTileBytes, odd);
}

// The next 4 or 8 lines of the block.
GLM5_INLINE void decode_lines(Beside& b) {
  if (b.line == b.lines) return;
  const PairDecoder decode;
  const int64_t first = b.line, count = b.lines_a_step, stride = b.line_stride;
  const e4m3* p = b.first_line + first * stride;
  char* out = b.panel + first / kTile * kLineTileBytes + first % kTile * 64;
  b.line = first + count;
  if (first + count <= b.num_lines && b.k_left >= kFp8Block) {
    const e4m3* soon = p + b.ahead;
    for (int64_t i = 0; i < count; i += 4)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j, p += stride, soon += stride, out += 64) {
        __builtin_prefetch(soon);
        __builtin_prefetch(soon + 64);
        decode_line(decode, load_64(p), load_64(p + 64), out);
      }
    return;
  }
  for (int64_t i = 0; i < count; ++i, p += stride, out += 64) {
    const bool there = first + i < b.num_lines;
    const __m512i zero = _mm512_setzero_si512();
    decode_line(decode, there ? load_64(p, b.k_left) : zero, there ? load_64(p + 64, b.k_left - 64) : zero, out);
  }
}

void configure(int64_t width) {
  struct {
    alignas(64) uint8_t bytes[64];
  } config{};
  config.bytes[0] = 1;
  for (int i = 0; i < 8; ++i) {  // 0-3 sums, 4-5 lines, 6-7 rows
    config.bytes[16 + 2 * i] = static_cast<uint8_t>(i == 4 || i == 5 ? 64 : 4 * width);
    config.bytes[48 + i] = 16;
  }
  // GCC 12's intrinsic names 8 bytes of the configuration as its input; without this the other stores are dropped.
  __asm__ volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// The sums of a block, tile 2 i + j: two tiles of lines x two of rows; or tile i: two of lines x one of rows.
template <int kRowTiles>
__attribute__((noinline)) void multiply(const char* lines, const char* rows, int64_t width, float* sums, Beside& beside) {
  const int64_t step_bytes = kTile * width * 4, row_bytes = width * 4;
  __asm__ volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kRowTiles == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
#pragma GCC unroll 4
  for (int s = 0; s < kSteps; ++s) {
    _tile_loadd(6, rows + s * step_bytes, row_bytes);
    _tile_loadd(4, lines + s * kTileBytes, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kRowTiles == 2) {
      _tile_loadd(7, rows + (kSteps + s) * step_bytes, row_bytes);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, lines + kLineTileBytes + s * kTileBytes, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    } else {
      _tile_loadd(5, lines + kLineTileBytes + s * kTileBytes, 64);
      _tile_dpbf16ps(1, 5, 6);
    }
    if (s < beside.tiles) scale_tile(beside, s);
    decode_lines(beside);
  }
  _tile_stored(0, sums, row_bytes);
  _tile_stored(1, sums + kTileFloats, row_bytes);
  if constexpr (kRowTiles == 2) {
    _tile_stored(2, sums + 2 * kTileFloats, row_bytes);
    _tile_stored(3, sums + 3 * kTileFloats, row_bytes);
  }
}

// One tile of totals [line][width] goes to rows of c.
void finish_tile(const Unit& u, const float* totals, int64_t row, int64_t n, int64_t n_end) {
  const int64_t width = width_of(u), rows = at_most(kTile, u.rows - row), lanes = n_end - n;
  if (lanes <= 0) return;
  F r[16];
  if (width == kTile) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = load(totals + i * 16);
    transpose(r);
  } else {
    const __m512i lines = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                             _mm512_set1_epi32(static_cast<int>(width)));
    for (int64_t i = 0; i < rows; ++i) r[i].v = _mm512_i32gather_ps(lines, totals + i, 4);
  }
  for (int64_t i = 0; i < rows; ++i) store_columns(u, row + i, n, r[i], lanes);
}

struct Kernel {
  static int64_t packed_bytes(const Unit& u) {
    const int64_t width = width_of(u);
    return row_tiles(u.rows) * u.blocks * (row_tile_bytes(width) + scale_floats(width) * 4);
  }

  static void pack(const Unit& u, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row += kTile) pack_tile(u, row / kChunk, row % kChunk / kTile);
  }

  // With few rows lines come from memory: a task reads on from one group of lines to the next.
  static int64_t stripe(const Unit& u) {
    const int64_t lines = line_tiles_of(u) * kTile;
    return u.rows <= kChunk && u.g->n >= 4 * kFp8Block * num_threads() ? kFp8Block : lines;
  }

  static void run(const Unit& u, int64_t first, int64_t last) {
    const int64_t lines = line_tiles_of(u) * kTile;
    configure(width_of(u));
    for (int64_t n = first; n < last; n += lines) run_lines(u, n, last);
    _tile_release();
  }

  // Columns [first, first + lines), as far as there are any before `last`.
  static void run_lines(const Unit& u, int64_t first, int64_t last) {
    const int64_t width = width_of(u), chunks = ceil_div(u.rows, kChunk), k = u.g->k;
    const int64_t line_tiles = line_tiles_of(u), lines = line_tiles * kTile, block_bytes = line_tiles * kLineTileBytes;
    // Decoded lines are kept for further chunks of rows; else two places take turns.
    const int64_t places = chunks > 1 ? u.blocks : 2;
    char* panel = static_cast<char*>(thread_scratch(kScratchPanel, places * block_bytes));
    float* totals = static_cast<float*>(thread_scratch(kScratchTotals, (kMaxCalls + 2) * kCallFloats * sizeof(float)));
    float* sums[2] = {totals + kMaxCalls * kCallFloats, totals + (kMaxCalls + 1) * kCallFloats};
    if (u.blocks == 0) {
      for (int64_t row = 0; row < u.rows; ++row)
        for (int64_t n = first; n < at_most(last, first + lines); n += 16) store_columns(u, row, n, splat<F>(0.f), last - n);
      return;
    }
    const float* b_scales = line_scales_of(u, first);
    Beside beside{};
    beside.line_stride = u.g->b_row, beside.lines = lines, beside.num_lines = last - first, beside.width = width;
    const bool goes_on = first + 2 * lines <= last;  // with whole lines
    const auto decode_next = [&](int64_t block) {
      const int64_t at = block * kFp8Block;
      beside.first_line = line_of(u, first) + at;
      beside.k_left = k - at;
      // What is prefetched: the same lines further on, then the next ones; nothing new at the end of all.
      beside.ahead = at + kAhead + kFp8Block <= k ? kAhead : goes_on ? lines * u.g->b_row + (at + kAhead - k) : 0;
      beside.panel = panel + block % places * block_bytes;
      beside.line = 0;
    };
    decode_next(0);
    beside.lines_a_step = 8;
    while (beside.line < lines) decode_lines(beside);
    int parity = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t tiles = row_tiles(at_most(kChunk, u.rows - chunk * kChunk)), pairs = line_tiles / 2;
      const int64_t calls = pairs * ceil_div(tiles, 2);
      for (int64_t block = 0; block < u.blocks; ++block) {
        if (chunk == 0 && block + 1 < u.blocks) {
          decode_next(block + 1);
          beside.lines_a_step = lines / (calls * kSteps);
        }
        const char* own_lines = panel + block % places * block_bytes;
        for (int64_t call = 0; call < calls; ++call) {
          const int64_t tile = call / pairs * 2, pair = call % pairs;
          const bool two = tile + 1 < tiles;
          const char* rows = packed_tile(u, chunk, block, tile);
          float* own = sums[parity ^= 1];
          if (two) multiply<2>(own_lines + pair * 2 * kLineTileBytes, rows, width, own, beside);
          else multiply<1>(own_lines + pair * 2 * kLineTileBytes, rows, width, own, beside);
          GLM5_COUNT_PATH(two ? "fp8_gemm amx 2x2" : width == kTile ? "fp8_gemm amx 2x1" : "fp8_gemm amx 2x1 narrow");
          beside.tiles = two ? 4 : 2;
          beside.sums = own;
          beside.totals = totals + call * kCallFloats;
          beside.scales[0] = packed_scales(u, chunk, block, tile);
          beside.scales[1] = beside.scales[0] + (two ? scale_floats(width) : 0);
          beside.b_scale = b_scales[block];
          beside.begin = block == 0;
        }
      }
      for (int t = 0; t < beside.tiles; ++t) scale_tile(beside, t);
      beside.tiles = 0;
      for (int64_t call = 0; call < calls; ++call)
        for (int t = 0; t < 4; ++t) {
          const int64_t tile = call / pairs * 2, line_tile = call % pairs * 2;
          const bool two = tile + 1 < tiles;
          if (!two && t >= 2) continue;
          finish_tile(u, totals + call * kCallFloats + t * kTileFloats, chunk * kChunk + (tile + (two ? t % 2 : 0)) * kTile,
                      first + (line_tile + (two ? t / 2 : t)) * kTile, last);
        }
    }
  }
};

}  // namespace

void fp8_gemm(const Fp8GemmArgs* products, int64_t count) { run_products<Kernel>(products, count); }

}  // namespace glm5::cpu::amx
