// The product on AMX tiles (amx.h). A task owns 32 columns and some rows. Its weights are split, a few groups at a time, into
// tiles of bytes from which the zero points are already subtracted; TDPBSSD multiplies them with tiles of 16 rows of x, which
// are laid out once a call. While the sums of one group are made, vectors scale and add those of the group before.
#include "w4a8_gemm/amx.h"

#include "common/parallel.h"
#include "w4a8_gemm/layout.h"

namespace glm5::cpu::amx {
namespace {

constexpr int kScratchRows = 5, kScratchBytes = 4, kScratchOut = 3;
constexpr int64_t kTile = 16, kColumns = 2 * kBlock;
constexpr int64_t kBytesK = 512;  // of weights that are split at a time: with 32 columns a third of L1
constexpr int64_t kRowBytes = 1 << 20;  // of x that a task reads again and again: half of L2

int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How k is cut: a step is what one instruction multiplies, 64 bytes of a row or the 32 of a short group.
struct Steps {
  int64_t bytes, a_group;
};
Steps steps_of(const W4A8Weight& w) {
  const int64_t bytes = w.group_size > 32 ? 64 : 32;
  return {bytes, ceil_div(w.group_size, bytes)};
}

// Tiles 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 weights.
void configure(int64_t rows, int64_t step_bytes) {
  struct {
    alignas(64) uint8_t bytes[64];
  } config{};
  config.bytes[0] = 1;
  for (int i = 0; i < 8; ++i) {
    config.bytes[16 + 2 * i] = static_cast<uint8_t>(i == 4 || i == 5 ? step_bytes : 64);
    config.bytes[48 + i] = static_cast<uint8_t>(i < 6 ? rows : step_bytes / 4);
  }
  // GCC 12's intrinsic names 8 bytes of the configuration as its input; without this the other stores are dropped.
  __asm__ volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// Bytes code - zero of groups [first, last) of a block: a row of 64 for four k, steps one after another, filled up with zeros.
// Lines `ahead` bytes away are fetched.
GLM5_INLINE void split(const W4A8Weight& w, const Steps& steps, const Block& b, int64_t first, int64_t last, int64_t ahead,
                       uint8_t* out) {
  const __mmask16 mask = first_n(b.columns);
  const __m512i nibble = _mm512_set1_epi8(15);
  const int64_t lines = group_lines(w), all_lines = steps.a_group * steps.bytes / 8;
  for (int64_t g = first; g < last; ++g) {
    const uint8_t* p = b.data + g * b.group_bytes;
    __m512i zero = _mm512_set1_epi8(8);
    if (w.zeros) {
      const __m512i wide = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, b.zeros + g * b.columns));
      zero = _mm512_mullo_epi32(wide, _mm512_set1_epi32(0x01010101));
    }
    for (int64_t line = 0; line < lines; ++line, p += b.line_bytes, out += 128) {
      __builtin_prefetch(p + ahead);
      const __m512i both = _mm512_maskz_loadu_epi32(mask, p);
      const __m512i low = _mm512_and_si512(both, nibble), high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
      _mm512_store_si512(out, _mm512_sub_epi8(low, zero));
      _mm512_store_si512(out + 64, _mm512_sub_epi8(high, zero));
    }
    for (int64_t line = lines; line < all_lines; ++line, out += 128) {
      _mm512_store_si512(out, _mm512_setzero_si512());
      _mm512_store_si512(out + 64, _mm512_setzero_si512());
    }
  }
}

// A finished group: exact sums [half of the columns][row tile][16][16], and the scales of its columns.
template <int kTiles>
GLM5_INLINE void add_scaled(const int32_t* exact, F scale0, F scale1, int64_t rows, float* out) {
  for (int half = 0; half < 2; ++half)
    for (int t = 0; t < kTiles; ++t) {
      const F scale = half ? scale1 : scale0;
      const int64_t at = (half * kTiles + t) * 256;
#pragma GCC unroll 4
      for (int64_t i = 0; i < rows; ++i) {
        float* row = out + at + i * 16;
        store(row, fma(F{_mm512_cvtepi32_ps(_mm512_load_si512(exact + at + i * 16))}, scale, load(row)));
      }
    }
}

struct Groups {
  int64_t first, last;
};

// Adds some groups to out [half of the columns][row tile][16][16]. x: their steps in kTiles tiles, x_tile bytes apart; weights:
// those of both blocks, block_bytes apart. rows: of a tile.
template <int kTiles>
__attribute__((noinline)) void run_tiles(const Steps& steps, const Block& b0, const Block& b1, Groups groups,
                                         const int8_t* x, int64_t x_tile, const uint8_t* weights, int64_t block_bytes,
                                         int64_t rows, float* out) {
  GLM5_COUNT_PATH(kTiles == 2 ? "w4a8 amx 2" : "w4a8 amx 1");
  alignas(64) int32_t exact[2][2 * kTiles * 256];
  const int64_t x_step = kTile * steps.bytes, w_step = steps.bytes * 16;
  F scale0 = splat<F>(0.f), scale1 = scale0;
  for (int64_t g = groups.first; g < groups.last; ++g) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTiles == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t s = 0; s < steps.a_group; ++s, x += x_step, weights += w_step) {
      _tile_loadd(4, x, steps.bytes);
      _tile_loadd(6, weights, 64);
      _tile_dpbssd(0, 4, 6);
      _tile_loadd(7, weights + block_bytes, 64);
      _tile_dpbssd(1, 4, 7);
      if constexpr (kTiles == 2) {
        _tile_loadd(5, x + x_tile, steps.bytes);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      }
    }
    int32_t* sums = exact[g & 1];
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + kTiles * 256, 64);
    if constexpr (kTiles == 2) {
      _tile_stored(2, sums + 256, 64);
      _tile_stored(3, sums + 768, 64);
    }
    if (g > groups.first) add_scaled<kTiles>(exact[~g & 1], scale0, scale1, rows, out);
    scale0 = load_n(scales_of(b0, g), b0.columns);
    scale1 = load_n(scales_of(b1, g), b1.columns);
  }
  if (groups.last > groups.first) add_scaled<kTiles>(exact[~groups.last & 1], scale0, scale1, rows, out);
}

// Rows [row, row + rows) of tile t of out, times their scales.
template <class T>
GLM5_INLINE void finish(const W4A8Args& a, int64_t row, int64_t rows, int64_t column, const float* left,
                        const float* right) {
  const int64_t n = a.weight.n, columns = n - column;
  for (int64_t r = 0; r < rows; ++r) {
    T* out = static_cast<T*>(a.out) + (row + r) * n + column;
    const F scale = splat<F>(a.x_scale[row + r]);
    store_n(out, load(left + r * 16) * scale, columns);
    if (columns > kBlock) store_n(out + kBlock, load(right + r * 16) * scale, columns - kBlock);
  }
}

struct Unit {
  int64_t x_tile;  // number of its first tile of x
  int64_t first_task;
  int64_t cut_tiles;  // tiles of rows a task, an even number
};

}  // namespace

void w4a8_gemm_tiles(const W4A8Args& a) {
  const W4A8Weight& w = a.weight;
  if (w.n == 0 || a.count == 0) return;
  const Steps steps = steps_of(w);
  const int64_t k = inner(w), panels = ceil_div(w.n, kColumns);
  const int64_t tile_bytes = w.groups * steps.a_group * kTile * steps.bytes;
  const int64_t group_bytes = steps.a_group * steps.bytes;  // of a row or column

  Unit* units = static_cast<Unit*>(thread_scratch(6, a.count * sizeof(Unit)));
  int64_t num_tiles = 0, num_tasks = 0;
  const int64_t wanted = 4 * num_threads();
  for (int64_t p = 0; p < a.count; ++p) {
    const int64_t tiles = ceil_div(a.products[p].m, kTile);
    int64_t cut = tiles;
    // What stays in L2; and where columns alone are too few for all threads, rows are cut too.
    cut = at_most(cut, tile_bytes ? kRowBytes / tile_bytes : tiles);
    if (a.count * panels * ceil_div(tiles, cut < 1 ? 1 : cut) < wanted) cut = tiles * panels * a.count / wanted;
    cut = cut < 2 ? 2 : cut / 2 * 2;
    units[p] = {num_tiles, num_tasks, cut};
    num_tiles += tiles;
    num_tasks += panels * ceil_div(tiles, cut);
  }
  const auto unit_of = [&](int64_t at, int64_t Unit::* first) {
    int64_t low = 0, high = a.count - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (units[middle].*first <= at) low = middle;
      else high = middle - 1;
    }
    return low;
  };

  // Tiles of x: [step][row][bytes of the step], with zeros after the last row and after the last k of a group.
  int8_t* x_tiles = static_cast<int8_t*>(thread_scratch(kScratchRows, num_tiles * tile_bytes + 1));
  const auto lay_out = [&](int64_t tile) {
    const int64_t p = unit_of(tile, &Unit::x_tile), row = (tile - units[p].x_tile) * kTile;
    const int64_t rows = at_most(a.products[p].m - row, kTile);
    const int8_t* x = a.x + (a.products[p].first + row) * k;
    int8_t* out = x_tiles + tile * tile_bytes;
    for (int64_t g = 0; g < w.groups; ++g)
      for (int64_t at = 0; at < group_bytes; at += steps.bytes, out += kTile * steps.bytes) {
        const int64_t left = at_most(w.group_size - at, steps.bytes);
        const __mmask64 mask = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
        const __mmask64 written = steps.bytes == 64 ? ~__mmask64{0} : 0xffffffffu;
        for (int64_t r = 0; r < kTile; ++r) {
          const __mmask64 read = r < rows ? mask : 0;
          const __m512i bytes = _mm512_maskz_loadu_epi8(read, x + r * k + g * w.group_size + at);
          _mm512_mask_storeu_epi8(out + r * steps.bytes, written, bytes);
        }
      }
  };
  if (num_tiles * tile_bytes <= 131072)
    for (int64_t tile = 0; tile < num_tiles; ++tile) lay_out(tile);
  else parallel_tasks(num_tiles, lay_out);

  const int64_t at_a_time = w.group_size > 0 && w.group_size < kBytesK ? kBytesK / w.group_size : 1;
  const int64_t block_bytes = at_a_time * group_bytes * kBlock;
  parallel_tasks(num_tasks, [&](int64_t task) {
    const int64_t p = unit_of(task, &Unit::first_task);
    const W4A8Product& product = a.products[p];
    const int64_t panel = (task - units[p].first_task) % panels, cut = (task - units[p].first_task) / panels;
    const Block b0 = block_of(w, product.w, 2 * panel), b1 = block_of(w, product.w, 2 * panel + 1);
    const int64_t tiles = ceil_div(product.m, kTile), first = cut * units[p].cut_tiles;
    const int64_t last = at_most(first + units[p].cut_tiles, tiles);
    const int64_t tile_rows = at_most(product.m, kTile);
    uint8_t* weights = static_cast<uint8_t*>(thread_scratch(kScratchBytes, 2 * block_bytes + 64));
    float* sums = static_cast<float*>(thread_scratch(kScratchOut, (last - first) * 2 * 1024));
    std::memset(sums, 0, (last - first) * 2 * 1024);
    configure(tile_rows, steps.bytes);
    for (int64_t g = 0; g < w.groups; g += at_a_time) {
      const Groups groups{g, at_most(g + at_a_time, w.groups)};
      const int64_t ahead = at_a_time * b0.group_bytes;
      split(w, steps, b0, groups.first, groups.last, ahead, weights);
      split(w, steps, b1, groups.first, groups.last, ahead, weights + block_bytes);
      for (int64_t t = first; t < last; t += 2) {
        const int8_t* x = x_tiles + (units[p].x_tile + t) * tile_bytes + g * group_bytes * kTile;
        float* out = sums + (t - first) * 512;
        if (t + 1 < last) run_tiles<2>(steps, b0, b1, groups, x, tile_bytes, weights, block_bytes, tile_rows, out);
        else run_tiles<1>(steps, b0, b1, groups, x, tile_bytes, weights, block_bytes, tile_rows, out);
      }
    }
    _tile_release();
    for (int64_t t = first; t < last; ++t) {
      const int64_t pair = (t - first) / 2 * 2, in_pair = last - first - pair > 1 ? 2 : 1;
      const float* left = sums + pair * 512 + (t - first - pair) * 256;
      const float* right = left + in_pair * 256;
      const int64_t row = product.first + t * kTile, rows = at_most(product.m - t * kTile, kTile);
      if (a.out_bf16) finish<bf16>(a, row, rows, panel * kColumns, left, right);
      else finish<float>(a, row, rows, panel * kColumns, left, right);
    }
  });
}

}  // namespace glm5::cpu::amx
