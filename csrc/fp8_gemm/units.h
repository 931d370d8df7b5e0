// How products are cut: into units (rows of one product, as many as are packed together), these into row packing tasks, then
// into stripes of columns. The kernel of an instruction set says how large its packed rows are, packs them and runs stripes.
#pragma once

#include "common/e4m3.h"
#include "common/parallel.h"
#include "fp8_gemm/fp8_gemm.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int kScratchUnits = 4, kScratchPacked = 5, kScratchPanel = 6, kScratchTotals = 7;
constexpr int64_t kUnitRows = 1024;
constexpr int64_t kPackRows = 64;  // a task
constexpr int64_t kWaveBytes = 32 << 20;  // of packed rows at a time

GLM5_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
GLM5_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

struct Unit {
  const Fp8GemmArgs* g;
  int64_t first_row, rows, blocks;
  char* packed;
  int64_t offset;  // of `packed` in the wave's memory
  int64_t stripe;  // columns a task
  int64_t first_pack_task, first_task;
};

GLM5_INLINE const e4m3* row_of(const Unit& u, int64_t row) {
  return static_cast<const e4m3*>(u.g->a) + (u.first_row + row) * u.g->a_row;
}
GLM5_INLINE const float* scales_of(const Unit& u, int64_t row) { return u.g->a_scale + (u.first_row + row) * u.blocks; }
GLM5_INLINE const e4m3* line_of(const Unit& u, int64_t n) { return static_cast<const e4m3*>(u.g->b) + n * u.g->b_row; }
GLM5_INLINE const float* line_scales_of(const Unit& u, int64_t n) { return u.g->b_scale + n / kFp8Block * u.blocks; }

// Columns [n, n + lanes) of one row go to c.
GLM5_INLINE void store_columns(const Unit& u, int64_t row, int64_t n, F v, int64_t lanes) {
  const int64_t at = (u.first_row + row) * u.g->n + n;
  if (u.g->out_float32) store_n(static_cast<float*>(u.g->c) + at, v, lanes);
  else store_n(static_cast<bf16*>(u.g->c) + at, v, lanes);
}

// Kernel::packed_bytes(unit), a multiple of 64; Kernel::pack(unit, first_row, last_row) from a multiple of kPackRows;
// Kernel::stripe(unit) columns, a divisor or multiple of 128; Kernel::run(unit, first, last column).
template <class Kernel>
void run_products(const Fp8GemmArgs* products, int64_t count) {
  int64_t num_units = 0;
  for (int64_t i = 0; i < count; ++i) num_units += ceil_div(products[i].m, kUnitRows);
  Unit* units = static_cast<Unit*>(thread_scratch(kScratchUnits, num_units * sizeof(Unit)));
  num_units = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Fp8GemmArgs& g = products[i];
    if (g.n == 0) continue;
    // Near-equal parts.
    const int64_t rows = g.m > 0 ? ceil_div(ceil_div(g.m, ceil_div(g.m, kUnitRows)), kPackRows) * kPackRows : 0;
    for (int64_t first = 0; first < g.m; first += rows)
      units[num_units++] = {&g, first, at_most(rows, g.m - first), ceil_div(g.k, kFp8Block), nullptr, 0, 0, 0, 0};
  }
  for (int64_t begin = 0; begin < num_units;) {
    int64_t end = begin, bytes = 0, pack_tasks = 0, tasks = 0;
    for (; end < num_units; ++end) {
      Unit& u = units[end];
      const int64_t more = Kernel::packed_bytes(u);
      if (end > begin && bytes + more > kWaveBytes) break;
      u.offset = bytes;
      u.first_pack_task = pack_tasks;
      u.first_task = tasks;
      u.stripe = Kernel::stripe(u);
      bytes += more;
      pack_tasks += ceil_div(u.rows, kPackRows);
      tasks += ceil_div(u.g->n, u.stripe);
    }
    char* wave = static_cast<char*>(thread_scratch(kScratchPacked, bytes));
    for (int64_t i = begin; i < end; ++i) units[i].packed = wave + units[i].offset;
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
      const int64_t first = (task - u.first_pack_task) * kPackRows;
      Kernel::pack(u, first, at_most(u.rows, first + kPackRows));
    });
    parallel_tasks(tasks, [&](int64_t task) {
      const Unit& u = unit_at(task, &Unit::first_task);
      const int64_t first = (task - u.first_task) * u.stripe;
      Kernel::run(u, first, at_most(u.g->n, first + u.stripe));
    });
    begin = end;
  }
}

}  // namespace
}  // namespace glm5::cpu::GLM5_ISA
