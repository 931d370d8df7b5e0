// The bf16 matrix product on AMX tiles (contract: gemm.h). TDPBF16PS adds 32 products to each of 16 x 16 sums in an order
// that no other row or column can change; an element's sum is a chain of such steps from k = 0, in whole 32s, the last one
// filled up with zeros. Where the chain pauses (cache blocks) it goes on from the stored float32, which changes no bit.
//
// Of the two operands the one with fewer lines (rows of A or columns of B) is packed once, in pairs along k, into memory
// that all threads read; the other streams through tiles as it lies in memory, or by way of L1 where it is read often.
// Products commute, so which is which changes no bit either; where the columns of B stream, the result comes out transposed.
#include "common/gemm/amx.h"

#include "common/gemm/pack.h"
#include "common/parallel.h"

namespace glm5::cpu::amx {
namespace {

constexpr int kScratchTasks = 4, kScratchStream = 5, kScratchPacked = 6, kScratchSums = 7;
constexpr int64_t kTile = 16, kStep = 32;  // lines and k of one tile
constexpr int64_t kTileElements = kTile * kStep;  // 1 KiB of bf16
constexpr int64_t kChunkLines = 2048;  // of the packed operand, at most
constexpr int64_t kBlockK = 2048;  // sums stay in tiles for this long at least
constexpr int64_t kOwnBlockK = 256;  // where stripes pack all they read, at most: in L1 twice two lines of tiles of it fit
constexpr int64_t kOwnTiles = 32;
constexpr int64_t kPanelBytes = 1 << 20;  // of streamed lines: half of L2
constexpr int64_t kNearBytes = 1 << 20;  // packed lines that stay in L2 beside them
constexpr int64_t kWaveBytes = 32 << 20;  // packed at a time
constexpr int64_t kEvenK = 512;  // streamed lines of up to this length are fetched as one piece of memory
constexpr int64_t kPackSteps = 8;  // a task, where it packs all lines

constexpr const char* kPathNames[2][2] = {{"gemm amx 1x1", "gemm amx 1x2"}, {"gemm amx 2x1", "gemm amx 2x2"}};

struct Config {
  alignas(64) uint8_t bytes[64];
};

// Eight full tiles. Tails are filled with zeros instead, so that one configuration serves all.
void configure() {
  Config config{};
  config.bytes[0] = 1;
  for (int i = 0; i < 8; ++i) {
    config.bytes[16 + 2 * i] = 64;
    config.bytes[48 + i] = 16;
  }
  // GCC 12's intrinsic names 8 bytes of the configuration as its input; without this the other stores are dropped.
  __asm__ volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// One operand: `count` lines of k elements each.
struct Side {
  const bf16* data;
  int64_t count, line_stride, k_stride;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// 16 lines x 32 of k, as 16 vectors: along k (vector i = line i), or across (vector i = pair i of every line).
GLM5_INLINE void read_along(const Side& side, int64_t line, int64_t k, int64_t k_end, F (&r)[16]) {
  const bf16* p = side.data + line * side.line_stride + k;
  const int64_t lines = side.count - line;
  if (lines >= 16 && k_end - k >= kStep) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = {_mm512_loadu_ps(reinterpret_cast<const float*>(p + i * side.line_stride))};
    return;
  }
  for (int i = 0; i < 16; ++i) r[i] = i < lines ? Pairs::along(p + i * side.line_stride, k_end - k) : splat<F>(0.f);
}

GLM5_INLINE void read_across(const Side& side, int64_t line, int64_t k, int64_t k_end, F (&r)[16]) {
  const bf16* p = side.data + line + k * side.k_stride;
  if (side.count - line >= 16 && k_end - k >= kStep) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const __m256i* even = reinterpret_cast<const __m256i*>(p + 2 * i * side.k_stride);
      const __m256i* odd = reinterpret_cast<const __m256i*>(p + (2 * i + 1) * side.k_stride);
      r[i] = {_mm512_castsi512_ps(_mm512_or_si512(_mm512_cvtepu16_epi32(_mm256_loadu_si256(even)),
                                                  _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(odd)), 16)))};
    }
    return;
  }
  for (int i = 0; i < 16; ++i)
    r[i] = k + 2 * i < k_end ? Pairs::across(p + 2 * i * side.k_stride, side.k_stride, k_end - k - 2 * i, side.count - line)
                             : splat<F>(0.f);
}

// Tiles of 16 lines over [k, k_end), one after another: for the packed operand in pairs (row i = pair i of every line), for
// the streamed one as lines.
template <bool kInPairs>
void pack_tiles(const Side& side, int64_t line, int64_t k, int64_t k_end, bf16* out) {
  for (; k < k_end; k += kStep, out += kTileElements) {
    F r[16];
    if (side.k_stride == 1) read_along(side, line, k, k_end, r);
    else read_across(side, line, k, k_end, r);
    if ((side.k_stride == 1) == kInPairs) transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_ps(reinterpret_cast<float*>(out + i * kStep), r[i].v);
  }
}

// The same for 32 lines at once. Where lines are neighbours in memory, one cache line holds all of them: it is read once.
template <bool kInPairs>
void pack_tile_pair(const Side& side, int64_t line, int64_t k, int64_t k_end, bf16* out0, bf16* out1) {
  if (side.k_stride != 1 && side.count - line >= 2 * kTile) {
    for (; k_end - k >= kStep; k += kStep, out0 += kTileElements, out1 += kTileElements) {
      const bf16* p = side.data + line + k * side.k_stride;
      const auto widened = [](const bf16* q) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(q)));
      };
#pragma GCC unroll 4
      for (int i = 0; i < 16; ++i, p += 2 * side.k_stride) {
        const bf16* odd = p + side.k_stride;
        _mm512_store_si512(out0 + i * kStep, _mm512_or_si512(widened(p), _mm512_slli_epi32(widened(odd), 16)));
        _mm512_store_si512(out1 + i * kStep, _mm512_or_si512(widened(p + 16), _mm512_slli_epi32(widened(odd + 16), 16)));
      }
      if constexpr (!kInPairs) {
        for (int half = 0; half < 2; ++half) {
          float* tile = reinterpret_cast<float*>(half ? out1 : out0);
          F r[16];
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) r[i] = load(tile + i * 16);
          transpose(r);
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) store(tile + i * 16, r[i]);
        }
      }
    }
  }
  pack_tiles<kInPairs>(side, line, k, k_end, out0);
  if (line + kTile < side.count) pack_tiles<kInPairs>(side, line + kTile, k, k_end, out1);
}

// Where the tiles of one group of 16 streamed lines are.
struct Stream {
  const char* first;
  int64_t row_bytes, step_bytes;
};

// Rounds as to_bf16 does. The instruction makes float32 subnormals 0, which sums from tiles never are; with a bias they may be.
GLM5_INLINE __m512i narrow_pair(const GemmArgs& g, F low, F high) {
  if (g.bias) return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(low)), narrow(high), 1);
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v));
}

// A finished 32 x 32 block of sums that overwrites c: `left` and `right` are its columns in two tiles each, of 16 rows.
GLM5_INLINE void finish_rows(const GemmArgs& g, int64_t m, int64_t n, F (&left)[16], F (&right)[16]) {
  if (g.bias) {
    const bf16* bias = static_cast<const bf16*>(g.bias) + n;
    const F bias_left = load(bias), bias_right = load(bias + 16);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) left[i] = left[i] + bias_left, right[i] = right[i] + bias_right;
  }
  if (g.out_dtype != g.dtype) {
    float* out = static_cast<float*>(g.c) + m * g.c_row + n;
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      store(out + i * g.c_row, left[i]);
      store(out + i * g.c_row + 16, right[i]);
    }
  } else {
    bf16* out = static_cast<bf16*>(g.c) + m * g.c_row + n;
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * g.c_row, narrow_pair(g, left[i], right[i]));
  }
}

// What is done while tiles are multiplied, a little beside every step.
struct Beside {
  // A finished 32 x 32 block of sums at c[m, n]: `rows` of it are still to be rounded and stored. transposed: streamed lines
  // are the columns of c.
  const GemmArgs* g;
  bool transposed;
  const float* sums;
  int64_t m, n, rows;
  const char* next_sums;  // 4 KiB, to be stored to at the end
  // What is to be read soon, lines a step.
  const char* soon;
  int64_t soon_lines;
};

// Stores the next rows of the finished block: four, or half of it where they are transposed.
GLM5_INLINE void finish_beside(Beside& b) {
  const GemmArgs& g = *b.g;
  if (b.transposed) {
    F left[16], right[16];
    // Tiles in memory: [streamed half][packed half].
    const int64_t first = 32 - b.rows;
    const float *upper = b.sums + first * 16, *lower = upper + 512;
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) left[i] = load(upper + i * 16), right[i] = load(lower + i * 16);
    transpose(left);
    transpose(right);
    finish_rows(g, b.m + first, b.n, left, right);
    b.rows -= 16;
    return;
  }
  for (int r = 0; r < 4; ++r, --b.rows) {
    const int64_t i = 32 - b.rows, at = (b.m + i) * g.c_row + b.n;
    const float* tile = b.sums + (i / 16) * 512 + (i % 16) * 16;
    F left = load(tile), right = load(tile + 256);
    if (g.bias) {
      const bf16* bias = static_cast<const bf16*>(g.bias) + b.n;
      left = left + load(bias), right = right + load(bias + 16);
    }
    if (g.out_dtype != g.dtype) {
      store(static_cast<float*>(g.c) + at, left);
      store(static_cast<float*>(g.c) + at + 16, right);
    } else {
      _mm512_storeu_si512(static_cast<bf16*>(g.c) + at, narrow_pair(g, left, right));
    }
  }
}

// sums[i][j] (+)= stream tile i x packed tile j, over `steps` steps. kLines, kPacked: 1 or 2 tiles of each.
template <int kLines, int kPacked>
__attribute__((noinline)) void multiply(const Stream& s0, const Stream& s1, const bf16* b0, const bf16* b1, int64_t steps,
                                        bool resume, float* c00, float* c01, float* c10, float* c11, int64_t ahead,
                                        Beside& beside) {
  if (resume) {
    _tile_loadd(0, c00, 64);
    if constexpr (kPacked == 2) _tile_loadd(1, c01, 64);
    if constexpr (kLines == 2) _tile_loadd(2, c10, 64);
    if constexpr (kLines == 2 && kPacked == 2) _tile_loadd(3, c11, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const char *a0 = s0.first, *a1 = s1.first;
  for (int64_t s = 0; s < steps; ++s) {
    if (ahead) {  // lines that come from memory: sixteen streams are more than the hardware follows
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) __builtin_prefetch(a0 + ahead + i * s0.row_bytes);
      if constexpr (kLines == 2)
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) __builtin_prefetch(a1 + ahead + i * s1.row_bytes);
    }
    _tile_loadd(6, b0, 64);
    _tile_loadd(4, a0, s0.row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kPacked == 2) {
      _tile_loadd(7, b1, 64);
      _tile_dpbf16ps(1, 4, 7);
      b1 += kTileElements;
    }
    if constexpr (kLines == 2) {
      _tile_loadd(5, a1, s1.row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kPacked == 2) _tile_dpbf16ps(3, 5, 7);
      a1 += s1.step_bytes;
    }
    a0 += s0.step_bytes;
    b0 += kTileElements;
    if constexpr (kLines == 2 && kPacked == 2) {
      if (beside.rows > 0) finish_beside(beside);
      // Stored to lines that are not in L1, each would take its time.
      if (steps - s <= 8)
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) __builtin_prefetch(beside.next_sums + (steps - s - 1) * 512 + i * 64, 1);
      for (int64_t i = 0; i < beside.soon_lines; ++i, beside.soon += 64) __builtin_prefetch(beside.soon, 0, 2);
    }
  }
  _tile_stored(0, c00, 64);
  if constexpr (kPacked == 2) _tile_stored(1, c01, 64);
  if constexpr (kLines == 2) _tile_stored(2, c10, 64);
  if constexpr (kLines == 2 && kPacked == 2) _tile_stored(3, c11, 64);
}

// Short streamed lines, one after the other in memory, 32 at a time against pairs of packed tiles side by side.
struct Across {
  const char* lines;
  int64_t groups, steps;  // of 32 lines; of k
  const bf16* packed;
  int64_t pairs;
  bf16* out;  // of the first line and the first packed line
  int64_t out_row;
  float* sums;  // 8 KiB
};

// Sums are in tiles for all of k, rounded and stored while the next block of them is made. What the next 32 lines need is
// brought to L2 meanwhile, in the order of memory: a store to a line that is further off holds one of the few buffers that
// the packed tiles come through as well.
__attribute__((noinline)) void run_blocks_across(const Across& a) {
  const int64_t row_bytes = a.steps * kStep * 2, group_bytes = 2 * kTile * row_bytes, out_row = a.out_row;
  const float* earlier = nullptr;
  bf16* earlier_out = nullptr;
  int64_t row = 2 * kTile;  // of the earlier block, to be stored next
  const auto finish_four_rows = [&] {
    const float* tile = earlier + row / 16 * 512 + row % 16 * 16;
    bf16* out = earlier_out + row * out_row;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, tile += 16, out += out_row)
      _mm512_storeu_si512(out, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(load(tile + 256).v, load(tile).v)));
    row += 4;
  };
  float* sums = a.sums;
  for (int64_t group = 0; group < a.groups; ++group) {
    const char *lines = a.lines + group * group_bytes, *next_line = lines + group_bytes;
    bf16* out = a.out + group * 2 * kTile * out_row;
    const char* next_out = reinterpret_cast<const char*>(out + 2 * kTile * out_row);
    const bool more = group + 1 < a.groups;
    const int64_t line_share = more ? ceil_div(2 * kTile, a.pairs) : 0, out_share = more ? ceil_div(2 * kTile, a.steps) : 0;
    int64_t next_column = 0;
    const bf16* b = a.packed;
    for (int64_t pair = 0; pair < a.pairs; ++pair, b += a.steps * kTileElements, out += 2 * kTile) {
      const char *a0 = lines, *a1 = lines + group_bytes / 2;
      const bf16* second = b + a.steps * kTileElements;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t s = 0; s < a.steps; ++s, a0 += kStep * 2, a1 += kStep * 2, b += kTileElements, second += kTileElements) {
        _tile_loadd(6, b, 64);
        _tile_loadd(4, a0, row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, second, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a1, row_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        if (row < 2 * kTile) finish_four_rows();
        for (int64_t i = 0; i < line_share; ++i, next_line += 64) __builtin_prefetch(next_line, 0, 2);
        for (int64_t i = 0; i < out_share; ++i, next_out += 64) {
          __builtin_prefetch(next_out, 0, 2);
          if (++next_column == a.pairs) next_column = 0, next_out += (out_row - a.pairs * 2 * kTile) * 2;
        }
      }
      while (row < 2 * kTile) finish_four_rows();
      _tile_stored(0, sums, 64);
      _tile_stored(1, sums + 256, 64);
      _tile_stored(2, sums + 512, 64);
      _tile_stored(3, sums + 768, 64);
      earlier = sums, earlier_out = out, row = 0;
      sums = sums == a.sums ? a.sums + 1024 : a.sums;
    }
  }
  while (row < 2 * kTile) finish_four_rows();
}

// Lines in tiles side by side against pairs of packed tiles, for a part of k: sums, [line pair][tile pair][4 tiles], go on.
__attribute__((noinline)) void run_blocks_on(const bf16* lines, int64_t line_pairs, int64_t line_tile, const bf16* packed,
                                             int64_t pairs, int64_t packed_tile, int64_t steps, bool resume, float* sums) {
  for (int64_t i = 0; i < line_pairs; ++i, lines += 2 * line_tile) {
    const bf16* p = packed;
    for (int64_t j = 0; j < pairs; ++j, p += 2 * packed_tile, sums += 1024) {
      if (resume) {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + 256, 64);
        _tile_loadd(2, sums + 512, 64);
        _tile_loadd(3, sums + 768, 64);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      const bf16 *a0 = lines, *a1 = lines + line_tile, *b0 = p, *b1 = p + packed_tile;
      for (int64_t s = 0; s < steps; ++s) {
        _tile_loadd(6, b0, 64);
        _tile_loadd(4, a0, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b1, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a1, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        a0 += kTileElements, a1 += kTileElements, b0 += kTileElements, b1 += kTileElements;
      }
      _tile_stored(0, sums, 64);
      _tile_stored(1, sums + 256, 64);
      _tile_stored(2, sums + 512, 64);
      _tile_stored(3, sums + 768, 64);
    }
  }
}

// One product, lines [packed_first, packed_last) of its packed operand against all lines of the other.
struct Unit {
  const GemmArgs* g;
  bool rows_are_packed;  // the packed operand is A
  int64_t packed_first, packed_last;
  int64_t offset;  // of its tiles, in elements from the start of the wave's memory
  int64_t stripe;  // streamed lines a task
  int64_t first_pack_task, first_task;
  bool packs_own;  // every stripe packs the packed lines too, a block of k at a time
};

Side rows_of(const GemmArgs& g) { return {static_cast<const bf16*>(g.a), g.m, g.a_row, g.a_col}; }
Side cols_of(const GemmArgs& g) { return {static_cast<const bf16*>(g.b), g.n, g.b_col, g.b_row}; }
Side packed_of(const Unit& u) { return u.rows_are_packed ? rows_of(*u.g) : cols_of(*u.g); }
Side streamed_of(const Unit& u) { return u.rows_are_packed ? cols_of(*u.g) : rows_of(*u.g); }
int64_t steps_of(const GemmArgs& g) { return ceil_div(g.k, kStep); }
int64_t packed_tiles(const Unit& u) { return ceil_div(u.packed_last - u.packed_first, kTile); }

// How k is cut. Few packed lines: not at all, the sums stay in the tile registers. Else in long blocks: storing sums and
// loading them again costs about as much as eight steps, and lines too long for L1 come from L2 nearly as fast.
int64_t blocks_of(const Unit& u) {
  if (u.packs_own) return ceil_div(steps_of(*u.g) * kStep, kOwnBlockK);
  return packed_tiles(u) <= 2 ? 1 : ceil_div(steps_of(*u.g) * kStep, kBlockK + kBlockK / 4);
}
int64_t block_steps_of(const Unit& u) {
  const int64_t blocks = blocks_of(u);
  return blocks > 0 ? ceil_div(steps_of(*u.g), blocks) : 0;
}

// Packed memory is [block][tile][step][16 pairs][16 lines][2]: a block is contiguous, so that its tiles do not meet in a
// cache set as they would a power of two apart.
int64_t packed_offset(const Unit& u, int64_t block, int64_t tile) {
  return u.offset + (block * packed_tiles(u) + tile) * block_steps_of(u) * kTileElements;
}
int64_t unit_elements(const Unit& u) {
  return u.packs_own ? 0 : blocks_of(u) * packed_tiles(u) * block_steps_of(u) * kTileElements;
}

// Lines that are neighbours in memory are packed all together, a few steps a task: whole rows of memory are read, as
// the hardware follows them. Others a pair of tiles a task.
int64_t pack_tasks_of(const Unit& u) {
  if (u.packs_own) return 0;
  return packed_of(u).k_stride == 1 ? ceil_div(packed_tiles(u), 2) : ceil_div(steps_of(*u.g), kPackSteps);
}

bool packed_far(const Unit& u) { return packed_tiles(u) * block_steps_of(u) * kTileElements * 2 > kNearBytes; }

// Streamed lines a task, at most.
int64_t panel_lines(const Unit& u) {
  if (packed_tiles(u) <= 4) return 128;
  const int64_t line_bytes = (block_steps_of(u) + 1) * kStep * 2, lines = kPanelBytes / line_bytes / (2 * kTile) * 2 * kTile;
  return lines < 2 * kTile ? 2 * kTile : at_most(lines, 512);
}

void pack_unit(const Unit& u, int64_t task, bf16* wave) {
  Side side = packed_of(u);
  side.count = u.packed_last;
  const int64_t steps = block_steps_of(u), tiles = packed_tiles(u);
  int64_t first = 0, last = steps_of(*u.g), first_tile = 2 * task, last_tile = 2 * task + 2;
  if (side.k_stride != 1) {
    first = task * kPackSteps, last = at_most(last, first + kPackSteps);
    first_tile = 0, last_tile = tiles;
  }
  for (int64_t s = first; s < last;) {
    const int64_t block = s / steps;
    const int64_t end = at_most(at_most(last, (block + 1) * steps), side.k_stride == 1 ? last : s + 1);
    for (int64_t tile = first_tile; tile < last_tile; tile += 2) {
      bf16* out = wave + packed_offset(u, block, tile) + (s - block * steps) * kTileElements;
      pack_tile_pair<true>(side, u.packed_first + tile * kTile, s * kStep, at_most(u.g->k, end * kStep), out,
                           out + steps * kTileElements);
    }
    s = end;
  }
}

// A finished 16 x 16 tile of sums, streamed lines down, packed lines across, goes to c; any part of it may lie outside.
void finish_tile(const Unit& u, int64_t streamed, int64_t packed, const float* sums) {
  const GemmArgs& g = *u.g;
  F r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = load(sums + i * 16);
  int64_t m = streamed, n = packed, m_end = g.m, n_end = u.packed_last;
  if (u.rows_are_packed) {
    transpose(r);
    m = packed, n = streamed, m_end = u.packed_last, n_end = g.n;
  }
  const int64_t rows = at_most(16, m_end - m), cols = n_end - n;
  const F bias = g.bias ? load_n(static_cast<const bf16*>(g.bias) + n, cols) : splat<F>(0.f);
  const bool wide = g.out_dtype != g.dtype;
  float* wide_out = static_cast<float*>(g.c) + m * g.c_row + n;
  bf16* out = static_cast<bf16*>(g.c) + m * g.c_row + n;
  for (int64_t i = 0; i < rows; ++i) {
    F v = r[i];
    if (g.accumulate) v = load_n(wide_out + i * g.c_row, cols) + v;
    if (g.bias) v = v + bias;
    if (wide) store_n(wide_out + i * g.c_row, v, cols);
    else _mm256_mask_storeu_epi16(out + i * g.c_row, first_n(cols), _mm512_castsi512_si256(narrow_pair(g, v, v)));
  }
}

// Lines [first, last) over [k, k_end) as tiles, each group of 16 `steps` tiles long. Memory is read in its own order.
void pack_panel(const Side& side, int64_t first, int64_t last, int64_t k, int64_t k_end, int64_t steps, bf16* out) {
  if (side.k_stride != 1) {
    for (int64_t s = 0; k + s * kStep < k_end; ++s)
      for (int64_t line = first; line < last; line += 2 * kTile) {
        bf16* at = out + ((line - first) / kTile * steps + s) * kTileElements;
        pack_tile_pair<false>(side, line, k + s * kStep, at_most(k_end, k + (s + 1) * kStep), at,
                              at + steps * kTileElements);
      }
    return;
  }
  const int64_t whole = (k_end - k) / kStep, rest = (k_end - k) % kStep;
  for (int64_t line = first; line < first + ceil_div(last - first, kTile) * kTile; ++line) {
    const bf16* p = side.data + line * side.line_stride + k;
    const int64_t i = line - first;
    float* to = reinterpret_cast<float*>(out + i / kTile * steps * kTileElements + i % kTile * kStep);
    if (line >= last) {
      for (int64_t s = 0; s < whole + (rest > 0); ++s) store(to + s * 256, splat<F>(0.f));
      continue;
    }
    for (int64_t s = 0; s < whole; ++s) store(to + s * 256, Pairs::along(p + s * kStep));
    if (rest > 0) store(to + whole * 256, Pairs::along(p + whole * kStep, rest));
  }
}

// Streamed lines [first, last) of a unit against its packed lines.
void run_stripe(const Unit& u, int64_t first, int64_t last, const bf16* wave) {
  const GemmArgs& g = *u.g;
  Side side = streamed_of(u);
  side.count = last;
  const int64_t all_steps = steps_of(g), tiles = packed_tiles(u);
  int64_t groups = ceil_div(last - first, kTile);
  const int64_t blocks = blocks_of(u), block_steps = block_steps_of(u);
  // Packed lines that come from afar are read once, for all lines of the stripe, which are copied for it: in place, lines a
  // power of two apart would meet in few cache sets. Else two groups of lines after the other meet all packed lines.
  const bool far = packed_far(u);
  const bool pack = far || side.k_stride != 1;
  Side packed_side = packed_of(u);
  packed_side.count = u.packed_last;
  // Short lines side by side: the next ones are one piece of memory.
  const bool even = blocks == 1 && side.line_stride == g.k && g.k > 0 && g.k <= kEvenK && g.k % kStep == 0;
  GLM5_COUNT_PATH(far ? "gemm amx packed lines from afar" : "gemm amx packed lines near");
  const int64_t groups_kept = blocks > 1 ? groups + groups % 2 : 2, tiles_kept = blocks > 1 ? tiles + tiles % 2 : 4;
  float* sums = static_cast<float*>(thread_scratch(kScratchSums, groups_kept * tiles_kept * 256 * sizeof(float)));
  // One step more than needed: groups do not begin a power of two apart.
  const int64_t panel_steps = block_steps + 1;
  const int64_t panel_elements = (pack ? groups + groups % 2 : 2) * panel_steps * kTileElements;
  const int64_t own_elements = u.packs_own ? (tiles + 1) * block_steps * kTileElements : 0;
  bf16* panel = static_cast<bf16*>(thread_scratch(kScratchStream, (panel_elements + own_elements) * sizeof(bf16)));
  bf16* own_packed = panel + panel_elements;

  Beside beside{};
  int64_t parity = 0;

  for (int64_t block = 0; block == 0 || block < blocks; ++block) {
    const int64_t s0 = block * block_steps, s1 = at_most(all_steps, s0 + block_steps), k0 = s0 * kStep;
    const int64_t k1 = at_most(g.k, s1 * kStep);
    const bool resume = block > 0, finish = block + 1 >= blocks;
    if (resume) GLM5_COUNT_PATH("gemm amx resumes");
    if (pack) pack_panel(side, first, last, k0, k1, panel_steps, panel);
    if (u.packs_own)
      for (int64_t s = s0; s < s1; ++s)
        for (int64_t tile = 0; tile < tiles; tile += 2) {
          bf16* out = own_packed + (tile * block_steps + s - s0) * kTileElements;
          pack_tile_pair<true>(packed_side, u.packed_first + tile * kTile, s * kStep, at_most(g.k, (s + 1) * kStep), out,
                               out + block_steps * kTileElements);
        }
    const bf16* packed = u.packs_own ? own_packed : wave + packed_offset(u, block, 0);
    if (pack && !finish && !far && groups % 2 == 0 && tiles % 2 == 0) {
      GLM5_COUNT_PATH("gemm amx blocks go on");
      run_blocks_on(panel, groups / 2, panel_steps * kTileElements, packed, tiles / 2, block_steps * kTileElements, s1 - s0,
                    resume, sums);
      continue;
    }
    // Whole tiles of short lines, rows of c to be written: no more to decide until the end of the stripe.
    const int64_t whole = last - (last - first) % (2 * kTile);
    if (even && !far && !pack && !u.rows_are_packed && !g.accumulate && !g.bias && g.out_dtype == g.dtype && whole > first &&
        (u.packed_last - u.packed_first) % (2 * kTile) == 0) {
      GLM5_COUNT_PATH("gemm amx blocks across");
      run_blocks_across({reinterpret_cast<const char*>(side.data + first * side.line_stride), (whole - first) / (2 * kTile),
                         all_steps, packed, tiles / 2, static_cast<bf16*>(g.c) + first * g.c_row + u.packed_first, g.c_row,
                         sums});
      first = whole;
      groups = ceil_div(last - first, kTile);
      if (groups == 0) return;
    }
    const int64_t calls = ceil_div(tiles, 2), pairs = ceil_div(groups, 2);
    for (int64_t at = 0; at < pairs * calls; ++at) {
      const int64_t group = 2 * (far ? at % pairs : at / calls), tile = 2 * (far ? at / pairs : at % calls);
      const int64_t line = first + group * kTile, pair = groups - group > 1 ? 2 : 1, two = tiles - tile > 1 ? 2 : 1;
      // As they lie in memory where that is possible: whole tiles, k contiguous, and then the last step of an odd k apart.
      const bool direct = !pack && line + pair * kTile <= last;
      const int64_t direct_steps = direct ? (k1 - k0) / kStep : 0;
      bf16* own = panel + (pack ? group * panel_steps * kTileElements : 0);
      if (!pack && tile == 0 && k0 + direct_steps * kStep < k1)
        pack_panel(side, line, at_most(last, line + 2 * kTile), k0 + direct_steps * kStep, k1, panel_steps, own);
      Stream in_place[2], in_scratch[2];
      for (int i = 0; i < 2; ++i) {
        in_scratch[i] = {reinterpret_cast<const char*>(own + i * panel_steps * kTileElements), 64, kTileElements * 2};
        in_place[i] = {reinterpret_cast<const char*>(side.data + (line + i * kTile) * side.line_stride + k0),
                       side.line_stride * 2, kStep * 2};
      }
      GLM5_COUNT_PATH(direct ? "gemm amx streams in place" : "gemm amx streams through scratch");
      const bf16* b0 = packed + tile * block_steps * kTileElements;
      const bf16* b1 = b0 + (two == 2 ? block_steps * kTileElements : 0);
      // Where sums need not wait for another block, two places take turns: one is stored while the other is made.
      float* c = sums + (blocks > 1 ? (group * tiles_kept + tile * 2) * 256 : (parity ^= 1) * 1024);
      beside.next_sums = reinterpret_cast<const char*>(c);
      beside.soon_lines = 0;
      if (far && tile + 4 <= tiles) {
        const int64_t all = 2 * block_steps * kTileElements * 2 / 64, share = ceil_div(all, pairs);
        beside.soon = reinterpret_cast<const char*>(b0 + 2 * block_steps * kTileElements) + at % pairs * share * 64;
        beside.soon_lines = ceil_div(share, s1 - s0);
      } else if (!far && direct && even && line + 4 * kTile <= last) {
        const int64_t all = 2 * kTile * g.k * 2 / 64, share = ceil_div(all, calls);
        beside.soon = in_place[0].first + 2 * kTile * g.k * 2 + at % calls * share * 64;
        beside.soon_lines = ceil_div(share, s1 - s0);
      }
      float *c00 = c, *c01 = c + 256, *c10 = c + 512, *c11 = c + 768;
      const auto run = [&](const Stream* from, const bf16* p0, const bf16* p1, int64_t steps, bool go_on, int64_t ahead) {
        GLM5_COUNT_PATH(kPathNames[pair - 1][two - 1]);
        if (pair == 2 && two == 2) multiply<2, 2>(from[0], from[1], p0, p1, steps, go_on, c00, c01, c10, c11, ahead, beside);
        else if (pair == 2) multiply<2, 1>(from[0], from[1], p0, p1, steps, go_on, c00, c01, c10, c11, ahead, beside);
        else if (two == 2) multiply<1, 2>(from[0], from[0], p0, p1, steps, go_on, c00, c01, c10, c11, ahead, beside);
        else multiply<1, 1>(from[0], from[0], p0, p1, steps, go_on, c00, c01, c10, c11, ahead, beside);
      };
      if (direct_steps > 0) run(in_place, b0, b1, direct_steps, resume, tile == 0 && !even ? 6 * 64 : 0);
      const int64_t rest = s1 - s0 - direct_steps;
      if (rest > 0 || direct_steps == 0)
        run(in_scratch, b0 + direct_steps * kTileElements, b1 + direct_steps * kTileElements, rest,
            resume || direct_steps > 0, 0);
      while (beside.rows > 0) finish_beside(beside);  // of the block before: fewer than eight steps, or another kernel
      if (!finish) continue;
      const int64_t packed_line = u.packed_first + tile * kTile;
      if (pair == 2 && two == 2 && !g.accumulate && line + 2 * kTile <= last && packed_line + 2 * kTile <= u.packed_last) {
        GLM5_COUNT_PATH(u.rows_are_packed ? "gemm amx finishes columns beside" : "gemm amx finishes rows beside");
        beside.g = &g, beside.transposed = u.rows_are_packed, beside.sums = c, beside.rows = 32;
        beside.m = u.rows_are_packed ? packed_line : line, beside.n = u.rows_are_packed ? line : packed_line;
        continue;
      }
      for (int64_t i = 0; i < pair; ++i)
        for (int64_t j = 0; j < two; ++j) finish_tile(u, line + i * kTile, packed_line + j * kTile, c + (2 * i + j) * 256);
    }
  }
  while (beside.rows > 0) finish_beside(beside);
}

int64_t units_of(const GemmArgs& g) { return ceil_div(at_most(g.m, g.n), kChunkLines); }

// Writes the units of one product, chunks of its shorter operand.
int64_t add_units(const GemmArgs& g, int64_t threads, Unit* units) {
  if (g.m == 0 || g.n == 0) return 0;
  const bool rows = g.m <= g.n;
  const int64_t lines = rows ? g.m : g.n, count = units_of(g);
  // Near-equal chunks of whole tile pairs.
  const int64_t chunk = ceil_div(ceil_div(lines, count), 2 * kTile) * 2 * kTile;
  int64_t made = 0;
  for (int64_t first = 0; first < lines; first += chunk)
    units[made++] = {&g, rows, first, at_most(lines, first + chunk), 0, 0, 0, 0, false};
  // Both operands lie across, as they do for the gradient of weights, and few lines are packed: packed by every stripe they
  // stay in L2, which is worth the work as long as stripes are about as long.
  Unit& u = units[0];
  u.packs_own = made == 1 && packed_of(u).k_stride != 1 && streamed_of(u).k_stride != 1 && packed_tiles(u) > 2 &&
                packed_tiles(u) <= kOwnTiles && 2 * streamed_of(u).count >= lines * threads && g.k > kOwnBlockK;
  return made;
}

}  // namespace

void gemm_bf16(const GemmArgs* products, int64_t count) {
  int64_t num_units = 0;
  for (int64_t i = 0; i < count; ++i) num_units += units_of(products[i]);
  if (num_units == 0) return;
  Unit* units = static_cast<Unit*>(thread_scratch(kScratchTasks, num_units * sizeof(Unit)));
  num_units = 0;
  for (int64_t i = 0; i < count; ++i) num_units += add_units(products[i], num_threads(), units + num_units);

  for (int64_t begin = 0; begin < num_units;) {
    int64_t end = begin, elements = 0, pack_tasks = 0, lines = 0;
    for (; end < num_units; ++end) {
      const int64_t more = unit_elements(units[end]);
      if (end > begin && (elements + more) * 2 > kWaveBytes) break;
      units[end].offset = elements;
      units[end].first_pack_task = pack_tasks;
      elements += more;
      pack_tasks += pack_tasks_of(units[end]);
      lines += streamed_of(units[end]).count;
    }
    bf16* wave = static_cast<bf16*>(thread_scratch(kScratchPacked, elements * sizeof(bf16)));
    const auto unit_at = [&](int64_t task, int64_t Unit::* first) -> const Unit& {
      int64_t low = begin, high = end - 1;
      while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (units[middle].*first <= task) low = middle;
        else high = middle - 1;
      }
      return units[low];
    };
    parallel_tasks(pack_tasks, [&](int64_t task) {
      const Unit& u = unit_at(task, &Unit::first_pack_task);
      pack_unit(u, task - u.first_pack_task, wave);
    });

    // Stripes that fill a part of L2, shorter ones where there would be too few to share out.
    int64_t tasks = 0;
    for (int64_t i = begin; i < end; ++i) {
      // Each reads all packed lines: fewer where those come from afar.
      const int64_t wanted = (units[i].packs_own ? 1 : packed_far(units[i]) ? 2 : 4) * num_threads();
      int64_t stripe = panel_lines(units[i]);
      while (stripe > 2 * kTile && lines / stripe < wanted) stripe = ceil_div(stripe, 4 * kTile) * 2 * kTile;
      units[i].stripe = stripe;
      units[i].first_task = tasks;
      tasks += ceil_div(streamed_of(units[i]).count, stripe);
    }
    parallel_tasks(tasks, [&](int64_t task) {
      const Unit& u = unit_at(task, &Unit::first_task);
      const int64_t first = (task - u.first_task) * u.stripe;
      configure();
      run_stripe(u, first, at_most(streamed_of(u).count, first + u.stripe), wave);
      _tile_release();
    });
    begin = end;
  }
}

void gemm_bf16_serial(const GemmArgs& product) {
  const int64_t num_units = units_of(product);
  if (num_units == 0) return;
  Unit* units = static_cast<Unit*>(thread_scratch(kScratchTasks, num_units * sizeof(Unit)));
  const int64_t made = add_units(product, 1, units);
  configure();
  for (int64_t i = 0; i < made; ++i) {
    Unit& u = units[i];
    bf16* wave = static_cast<bf16*>(thread_scratch(kScratchPacked, unit_elements(u) * sizeof(bf16)));
    for (int64_t task = 0; task < pack_tasks_of(u); ++task) pack_unit(u, task, wave);
    const int64_t stripe = panel_lines(u);
    for (int64_t first = 0; first < streamed_of(u).count; first += stripe)
      run_stripe(u, first, at_most(streamed_of(u).count, first + stripe), wave);
  }
  _tile_release();
}

}  // namespace glm5::cpu::amx
