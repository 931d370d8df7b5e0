// Products of e4m3 matrices on AMX tiles (contract: fp8_gemm.h). Lines of b (columns of the product) stream: a block of 32
// or 64 lines x 128 of k (16 x 256 where there are few rows) is decoded to bf16 tiles in L1 and meets packed rows, up to 64
// of them at a time. TDPBF16PS adds 32 products to each of 16 x 16 sums in an order that no other row or column can change;
// four of them are a block's sum, which leaves the tile unit to be scaled and added to the blocks before it. Scaling one
// block's sums and decoding the next block's lines goes on beside the tile unit's work.
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

// e4m3 as pairs of bf16, sixty-four values at once. 32 bits of `first` hold neighbours of the lower eight values of each 128
// bits, those of `second` of the upper eight. The bytes of a normal number's bf16 are affine functions of its bits; others
// (zeros, subnormals, NaN) go by table.
GLM5_INLINE void decode_any(__m512i x, __m512i& first, __m512i& second) {
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(kE4m3Bytes.low), x, _mm512_load_si512(kE4m3Bytes.low + 64));
  __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(kE4m3Bytes.high), x, _mm512_load_si512(kE4m3Bytes.high + 64));
  high = _mm512_ternarylogic_epi64(x, sign, high, 0xea);  // a & b | c
  first = _mm512_unpacklo_epi8(low, high);
  second = _mm512_unpackhi_epi8(low, high);
}

// Four times 32 values go to rows of tiles.
__attribute__((noinline)) void decode_any_line(__m512i x, __m512i y, char* out) {
  __m512i first, second;
  decode_any(x, first, second);
  _mm512_store_si512(out, first);
  _mm512_store_si512(out + kTileBytes, second);
  decode_any(y, first, second);
  _mm512_store_si512(out + 2 * kTileBytes, first);
  _mm512_store_si512(out + 3 * kTileBytes, second);
}

struct LineDecoder {
  __m512i one, normal_bits, low_bits, high_bits;
  GLM5_INLINE LineDecoder()
      : one(_mm512_set1_epi8(1)),
        normal_bits(_mm512_set1_epi8(0x70)),
        low_bits(_mm512_set1_epi64(0x0000000001020408)),  // x << 4
        // Sign, then the exponent plus 120 without its last bit: its first two decide each other's.
        high_bits(_mm512_set1_epi64(0x1020404040404080)) {
    // Else GCC 12 makes them anew for every line.
    __asm__("" : "+v"(one), "+v"(normal_bits), "+v"(low_bits), "+v"(high_bits));
  }
  GLM5_INLINE void store_pairs(__m512i x, char* out) const {
    const __m512i low = _mm512_gf2p8affine_epi64_epi8(x, low_bits, 0);
    const __m512i high = _mm512_gf2p8affine_epi64_epi8(x, high_bits, 0x3c);
    _mm512_store_si512(out, _mm512_unpacklo_epi8(low, high));
    _mm512_store_si512(out + kTileBytes, _mm512_unpackhi_epi8(low, high));
  }
  // One line's 128 of k become a row of each of four tiles.
  GLM5_INLINE void operator()(__m512i x, __m512i y, char* out) const {
    // Codes 0 to 14 and NaN, plus 1, lack all of these bits.
    const __mmask64 odd_x = _mm512_testn_epi8_mask(_mm512_add_epi8(x, one), normal_bits);
    const __mmask64 odd_y = _mm512_testn_epi8_mask(_mm512_add_epi8(y, one), normal_bits);
    if (__builtin_expect(!_kortestz_mask64_u8(odd_x, odd_y), 0)) return decode_any_line(x, y, out);
    store_pairs(x, out);
    store_pairs(y, out + 2 * kTileBytes);
  }
};

// Lines that are decoded together: with many chunks of rows twice as many, so that those are read half as often; for one
// tile of rows few (run_few_lines).
int64_t line_tiles_of(const Unit& u) { return u.rows > kChunk ? 4 : u.rows > kTile || u.blocks == 0 ? 2 : 1; }

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
  const int64_t width = width_of(u), first = chunk * kChunk + tile * kTile, rows = at_most(kTile, u.rows - first);
  for (int64_t block = 0; block < u.blocks; ++block) {
    float* out = reinterpret_cast<float*>(packed_tile(u, chunk, block, tile));
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t k = block * kFp8Block + half * 64;
      if (width == 1) {
        __m512i e, o;
        decode_any(load_64(row_of(u, first) + k, u.g->k - k), e, o);
        _mm512_store_si512(out, e);
        _mm512_store_si512(out + 16, o);
        out += 32;
        continue;
      }
      F even[16], odd[16];
#pragma GCC unroll 1
      for (int64_t i = 0; i < 16; ++i) {
        __m512i e = _mm512_setzero_si512(), o = e;
        if (i < rows) decode_any(load_64(row_of(u, first + i) + k, u.g->k - k), e, o);
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
  bool begin;  // totals begin with them
  // Lines to be decoded: from number `line` to `lines`; there are num_lines, and k_left of k.
  const e4m3* first_line;
  int64_t line_stride, lines, num_lines, k_left, ahead;
  char* panel;
  int64_t line, lines_a_step;
};

// A tile of sums of a block, times their scales, goes to the totals, which may begin with it.
GLM5_INLINE void add_scaled(const float* sums, const float* scales, float line_scale, int64_t width, bool begin,
                            float* totals) {
  const F b_scale = splat<F>(line_scale), zero = splat<F>(0.f);
  if (width == kTile) {
    const F scale = load(scales) * b_scale;
    if (begin) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) store(totals + i * 16, fma(load(sums + i * 16), scale, zero));
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) store(totals + i * 16, fma(load(sums + i * 16), scale, load(totals + i * 16)));
    }
    return;
  }
  const int64_t count = width * kTile;
  for (int64_t i = 0; i < count; i += 16)
    store(totals + i, fma(load(sums + i), load(scales + i) * b_scale, begin ? zero : load(totals + i)));
}

// Tile t.
GLM5_INLINE void scale_tile(const Beside& b, int t) {
  add_scaled(b.sums + t * kTileFloats, b.scales[t % 2], b.b_scale, kTile, b.begin, b.totals + t * kTileFloats);
}

// The next 4 or 8 lines of the block.
GLM5_INLINE void decode_lines(Beside& b) {
  if (b.line == b.lines) return;
  const LineDecoder decode;
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
        decode(load_64(p), load_64(p + 64), out);
      }
    return;
  }
  for (int64_t i = 0; i < count; ++i, p += stride, out += 64) {
    const bool there = first + i < b.num_lines;
    const __m512i zero = _mm512_setzero_si512();
    decode(there ? load_64(p, b.k_left) : zero, there ? load_64(p + 64, b.k_left - 64) : zero, out);
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
__attribute__((noinline)) void multiply(const char* lines, const char* rows, float* sums, Beside& beside) {
  __asm__ volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kRowTiles == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
#pragma GCC unroll 4
  for (int s = 0; s < kSteps; ++s) {
    _tile_loadd(6, rows + s * kTileBytes, 64);
    _tile_loadd(4, lines + s * kTileBytes, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kRowTiles == 2) {
      _tile_loadd(7, rows + (kSteps + s) * kTileBytes, 64);
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
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kTileFloats, 64);
  if constexpr (kRowTiles == 2) {
    _tile_stored(2, sums + 2 * kTileFloats, 64);
    _tile_stored(3, sums + 3 * kTileFloats, 64);
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

// ---- One tile of rows: sixteen lines at a time, so that few streams of memory are followed, two blocks of k each --------

constexpr int64_t kFewK = 2 * kFp8Block;
// Into L2: the same k of sixteen lines that lie whole pages apart would not stay in L1.
constexpr int64_t kFewAhead = 3 * kFp8Block;

// Lines [first, first + 4) of 16, two blocks of k each, become rows of tiles [block][step]. num_lines and k_left are there.
GLM5_INLINE void decode_few(const e4m3* p, int64_t stride, int64_t first, int64_t num_lines, int64_t k_left, int64_t ahead,
                            char* out) {
  const LineDecoder decode;
  p += first * stride, out += first * 64;
  if (first + 4 <= num_lines && k_left >= kFewK) {
    const e4m3* soon = p + ahead;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, p += stride, soon += stride, out += 64)
#pragma GCC unroll 2
      for (int block = 0; block < 2; ++block) {
        __builtin_prefetch(soon + block * kFp8Block, 0, 2);
        __builtin_prefetch(soon + block * kFp8Block + 64, 0, 2);
        decode(load_64(p + block * kFp8Block), load_64(p + block * kFp8Block + 64), out + block * kLineTileBytes);
      }
    return;
  }
  for (int64_t i = 0; i < 4; ++i, p += stride, out += 64)
    for (int block = 0; block < 2; ++block) {
      const int64_t k = block * kFp8Block;
      const bool there = first + i < num_lines;
      const __m512i zero = _mm512_setzero_si512();
      decode(there ? load_64(p + k, k_left - k) : zero, there ? load_64(p + k + 64, k_left - k - 64) : zero,
             out + block * kLineTileBytes);
    }
}

void run_few_lines(const Unit& u, int64_t first, int64_t last) {
  const int64_t width = width_of(u), k_end = u.g->k, stride = u.g->b_row, num_lines = last - first;
  const int64_t step_bytes = kTile * width * 4, row_bytes = width * 4, block_bytes = row_tile_bytes(width);
  char* panel = static_cast<char*>(thread_scratch(kScratchPanel, 4 * kLineTileBytes));
  float* totals = static_cast<float*>(thread_scratch(kScratchTotals, 5 * kTileFloats * sizeof(float)));
  const float *b_scales = line_scales_of(u, first), *scales = packed_scales(u, 0, 0, 0);
  const char* rows = packed_tile(u, 0, 0, 0);
  const e4m3* lines = line_of(u, first);
  const bool goes_on = num_lines >= 2 * kTile;
  const auto decode = [&](int64_t k, int64_t part) {
    // What is prefetched: the same lines further on, then the next ones; nothing new at the end of all.
    const int64_t soon = k + kFewAhead;
    const int64_t ahead = soon + kFewK <= k_end ? kFewAhead : goes_on ? kTile * stride + soon - k_end : 0;
    decode_few(lines + k, stride, part * 4, num_lines, k_end - k, ahead, panel + k / kFewK % 2 * 2 * kLineTileBytes);
  };
  const auto add = [&](int64_t block) {
    if (block >= 0 && block < u.blocks)
      add_scaled(totals + (1 + block % 4) * kTileFloats, scales + block * scale_floats(width), b_scales[block], width,
                 block == 0, totals);
  };
  for (int64_t part = 0; part < 4; ++part) decode(0, part);
  for (int64_t block = 0; block < u.blocks; block += 2, rows += 2 * block_bytes) {
    const char* own = panel + block % 4 * kLineTileBytes;
    const char* second = block + 1 < u.blocks ? rows + block_bytes : rows;
    const bool more = block + 2 < u.blocks;
    __asm__ volatile("" ::: "memory");
    _tile_zero(0);
    _tile_zero(1);
#pragma GCC unroll 4
    for (int s = 0; s < kSteps; ++s) {
      _tile_loadd(6, rows + s * step_bytes, row_bytes);
      _tile_loadd(4, own + s * kTileBytes, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, second + s * step_bytes, row_bytes);
      _tile_loadd(5, own + kLineTileBytes + s * kTileBytes, 64);
      _tile_dpbf16ps(1, 5, 7);
      if (s == 1) add(block - 2);
      if (s == 2) add(block - 1);
      if (more) decode((block + 2) * kFp8Block, s);
    }
    _tile_stored(0, totals + (1 + block % 4) * kTileFloats, row_bytes);
    _tile_stored(1, totals + (2 + block % 4) * kTileFloats, row_bytes);
    __asm__ volatile("" ::: "memory");
  }
  const int64_t begin = (u.blocks - 1) / 2 * 2;
  add(begin);
  add(begin + 1);
  finish_tile(u, totals, 0, first, last);
  GLM5_COUNT_PATH(width == kTile ? "fp8_gemm amx few" : "fp8_gemm amx few narrow");
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
    for (int64_t n = first; n < last; n += lines) {
      if (lines == kTile) run_few_lines(u, n, last);
      else run_lines(u, n, last);
    }
    _tile_release();
  }

  // Columns [first, first + lines), as far as there are any before `last`.
  static void run_lines(const Unit& u, int64_t first, int64_t last) {
    const int64_t chunks = ceil_div(u.rows, kChunk), k = u.g->k;
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
    beside.line_stride = u.g->b_row, beside.lines = lines, beside.num_lines = last - first;
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
          if (two) multiply<2>(own_lines + pair * 2 * kLineTileBytes, rows, own, beside);
          else multiply<1>(own_lines + pair * 2 * kLineTileBytes, rows, own, beside);
          GLM5_COUNT_PATH(two ? "fp8_gemm amx 2x2" : "fp8_gemm amx 2x1");
          beside.tiles = two ? 4 : 2;
          beside.sums = own;
          beside.totals = totals + call * kCallFloats;
          beside.scales[0] = packed_scales(u, chunk, block, tile);
          beside.scales[1] = beside.scales[0] + (two ? kTile : 0);
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
