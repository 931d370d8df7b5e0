// Products of few rows on AMX tiles (order of summation: amx.cpp). The weights come from memory once: what counts is to keep
// enough reads under way. Tiles are as wide as there are rows, so that the rows stay small, and one row needs no packing.
#include "common/gemm/amx.h"
#include "common/gemm/pack.h"
#include "common/parallel.h"

namespace glm5::cpu::amx {
namespace {

constexpr int kScratchTasks = 4, kScratchPacked = 6;
constexpr int64_t kLines = 16, kStep = 32;  // of one tile of weights
constexpr int64_t kMaxRows = 16;
constexpr int64_t kAhead = 8 * 32;  // elements
constexpr int64_t kTaskBytes = 1 << 20;

struct Few {
  const bf16* rows;  // [pair of k][row][2]; k filled up with zeros to whole steps
  int64_t first_task, task_cols;
};

int64_t steps_of(const GemmArgs& g) { return (g.k + kStep - 1) / kStep; }

// 16 lines of weights (and 16 rows of the sums) in tiles 0 and 1, `rows` columns in 0 and 2.
void configure(int64_t rows) {
  struct {
    alignas(64) uint8_t bytes[64];
  } config{};
  const uint8_t row_bytes[3] = {static_cast<uint8_t>(4 * rows), 64, static_cast<uint8_t>(4 * rows)};
  config.bytes[0] = 1;
  for (int i = 0; i < 3; ++i) {
    config.bytes[16 + 2 * i] = row_bytes[i];
    config.bytes[48 + i] = 16;
  }
  __asm__ volatile("" ::"r"(&config) : "memory");  // as in amx.cpp
  _tile_loadconfig(&config);
}

bool is_packed(const GemmArgs& g) { return g.m == 1 && g.k % kStep == 0; }

void pack(const GemmArgs& g, bf16* out) {
  float* pairs = reinterpret_cast<float*>(out);
  for (int64_t k = 0; k < g.k; k += kStep) {
    F r[16];
    for (int64_t i = 0; i < 16; ++i)
      r[i] = i < g.m ? Pairs::along(static_cast<const bf16*>(g.a) + i * g.a_row + k, g.k - k) : splat<F>(0.f);
    transpose(r);
    for (int64_t i = 0; i < 16; ++i, pairs += g.m) store_n(pairs, r[i], g.m);
  }
}

// Columns [n, n + 16) of the product, `next` being lines of weights that follow or null.
void run_columns(const GemmArgs& g, const bf16* rows, int64_t n, const bf16* next) {
  const bf16* b = static_cast<const bf16*>(g.b) + n * g.b_col;
  const int64_t cols = g.n - n < kLines ? g.n - n : kLines, row_bytes = 4 * g.m, line_bytes = 2 * g.b_col;
  const int64_t whole = cols == kLines ? g.k / kStep * kStep : 0;
  if (next == nullptr) next = b;  // in cache: costs nothing
  _tile_zero(0);
  int64_t k = 0;
  for (; k < whole; k += kStep, rows += g.m * kStep) {
    const bf16* ahead = k + kAhead < g.k ? b + k + kAhead : next + (k + kAhead - g.k);
#pragma GCC unroll 16
    for (int i = 0; i < kLines; ++i, ahead += g.b_col) __builtin_prefetch(ahead);
    _tile_loadd(1, b + k, line_bytes);
    _tile_loadd(2, rows, row_bytes);
    _tile_dpbf16ps(0, 1, 2);
  }
  alignas(64) float tile[kLines * 16] = {};
  for (; k < g.k; k += kStep, rows += g.m * kStep) {  // the end of k, or fewer lines
    for (int64_t i = 0; i < kLines; ++i)
      store(tile + i * 16, i < cols ? Pairs::along(b + i * g.b_col + k, g.k - k) : splat<F>(0.f));
    __asm__ volatile("" ::: "memory");
    _tile_loadd(1, tile, 64);
    _tile_loadd(2, rows, row_bytes);
    _tile_dpbf16ps(0, 1, 2);
    __asm__ volatile("" ::: "memory");
  }
  _tile_stored(0, tile, 64);
  __asm__ volatile("" ::: "memory");
  F r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = load(tile + i * 16);
  transpose(r);
  const F bias = g.bias ? load_n(static_cast<const bf16*>(g.bias) + n, cols) : splat<F>(0.f);
  for (int64_t row = 0; row < g.m; ++row) {
    const F v = g.bias ? r[row] + bias : r[row];
    const int64_t at = row * g.c_row + n;
    if (g.out_dtype != g.dtype) {
      store_n(static_cast<float*>(g.c) + at, v, cols);
    } else {
      // The instruction makes float32 subnormals 0, which sums from tiles never are; with a bias they may be.
      const __m256i rounded = g.bias ? narrow(v) : reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v.v));
      _mm256_mask_storeu_epi16(static_cast<bf16*>(g.c) + at, first_n(cols), rounded);
    }
  }
}

}  // namespace

bool gemm_has_few_rows(const GemmArgs* products, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const GemmArgs& g = products[i];
    if (g.m > kMaxRows || g.a_col != 1 || g.b_row != 1 || g.accumulate) return false;
  }
  return true;
}

void gemm_bf16_few_rows(const GemmArgs* products, int64_t count) {
  Few* few = static_cast<Few*>(thread_scratch(kScratchTasks, count * sizeof(Few)));
  int64_t elements = 0, tasks = 0;
  for (int64_t i = 0; i < count; ++i) elements += is_packed(products[i]) ? 0 : products[i].m * steps_of(products[i]) * kStep;
  bf16* packed = static_cast<bf16*>(thread_scratch(kScratchPacked, elements * sizeof(bf16)));
  const int64_t wanted = (4 * num_threads() + count - 1) / count;
  for (int64_t i = 0; i < count; ++i) {
    const GemmArgs& g = products[i];
    few[i].rows = static_cast<const bf16*>(g.a);
    if (!is_packed(g)) {
      pack(g, packed);
      few[i].rows = packed;
      packed += g.m * steps_of(g) * kStep;
    }
    int64_t cols = kTaskBytes / 2 / (g.k > 0 ? g.k : 1) / kLines * kLines;
    if (cols * wanted > g.n) cols = g.n / wanted / kLines * kLines;
    few[i].task_cols = cols < kLines ? kLines : cols;
    few[i].first_task = tasks;
    tasks += g.m > 0 ? (g.n + few[i].task_cols - 1) / few[i].task_cols : 0;
  }
  parallel_tasks(tasks, [&](int64_t task) {
    int64_t low = 0, high = count - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (few[middle].first_task <= task) low = middle;
      else high = middle - 1;
    }
    const GemmArgs& g = products[low];
    const int64_t n0 = (task - few[low].first_task) * few[low].task_cols;
    const int64_t n1 = g.n - n0 < few[low].task_cols ? g.n : n0 + few[low].task_cols;
    GLM5_COUNT_PATH(is_packed(g) ? "gemm amx one row in place" : "gemm amx few rows");
    configure(g.m);
    for (int64_t n = n0; n < n1; n += kLines)
      run_columns(g, few[low].rows, n,
                  n + 2 * kLines <= n1 ? static_cast<const bf16*>(g.b) + (n + kLines) * g.b_col : nullptr);
    _tile_release();
  });
}

}  // namespace glm5::cpu::amx
