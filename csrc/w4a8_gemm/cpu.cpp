// The product on vectors. A task owns 32 columns (two blocks) and some rows. Codes are multiplied as they are, from 0 to 15;
// what the zero point is off by, zero * (sum of x over the group), is exact in integers and where the sums start.
//
// Few rows: weights stream past once, nibbles are split in registers. Many rows (AVX-512): the task's weights are split into
// bytes a few groups at a time, in memory that stays in L1, and read from there for every tile of rows.
#include "common/parallel.h"
#include "w4a8_gemm/layout.h"
#include "w4a8_gemm/tile.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int kScratchSums = 6, kScratchRows = 5, kScratchBytes = 4, kScratchOut = 3;
constexpr int64_t kBytesK = 512;

int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
GLM5_INLINE void finish(const W4A8Args& a, int64_t row, int64_t count, int64_t column, const float* sums) {
  const int64_t n = a.weight.n, columns = at_most(n - column, kColumns);
  for (int64_t r = 0; r < count; ++r) {
    T* out = static_cast<T*>(a.out) + (row + r) * n + column;
    const F scale = splat<F>(a.x_scale[row + r]);
    for (int64_t c = 0; c < columns; c += F::kLanes) store_n(out + c, load(sums + r * kColumns + c) * scale, columns - c);
  }
}

// fn(row, rows) for every tile of a product's rows.
template <class Fn>
GLM5_INLINE void each_tile(const W4A8Product& p, const Fn& fn) {
  for (int64_t done = 0; done < p.m;) {
    const int64_t rows = tile_rows(p.m, p.m - done);
    fn(p.first + done, rows);
    done += rows;
  }
}

// Rows as tiles read them, in thread_scratch of the caller: x in slots of four k, [slot][row of the tile], filled up with
// zeros to whole lines; and [group][row of the tile] what start_of makes of the sum of x.
struct Rows {
  const int8_t* x;
  int64_t stride;  // bytes a row
  const int32_t* sums;
};

Rows prepare(const W4A8Args& a) {
  const W4A8Weight& w = a.weight;
  const int64_t k = inner(w), stride = (k + kLineK - 1) / kLineK * kLineK, size = w.group_size, groups = w.groups;
  int64_t tallest = 0;
  for (int64_t p = 0; p < a.count; ++p) tallest = a.products[p].m > tallest ? a.products[p].m : tallest;
  const bool in_place = stride == k && tile_rows(tallest, tallest) == 1;
  int8_t* slots = in_place ? nullptr : static_cast<int8_t*>(thread_scratch(kScratchRows, a.rows * stride + 1));
  int32_t* sums = static_cast<int32_t*>(thread_scratch(kScratchSums, a.rows * groups * 4 + 1));
  const auto tile = [&](int64_t row, int64_t rows, bool bytes) {
    for (int64_t r = 0; r < rows; ++r) {
      const int8_t* x = a.x + (row + r) * k;
      for (int64_t g = 0; g < groups; ++g) {
        int32_t sum = 0;
        for (int64_t i = 0; i < size; ++i) sum += x[g * size + i];
        sums[row * groups + g * rows + r] = start_of(w, bytes, sum);
      }
      if (in_place) continue;
      int8_t* out = slots + row * stride + 4 * r;
      int64_t i = 0;
      for (; i + 4 <= k; i += 4) std::memcpy(out + i * rows, x + i, 4);
      for (; i < stride; i += 4) {
        std::memset(out + i * rows, 0, 4);
        if (i < k) std::memcpy(out + i * rows, x + i, k - i);
      }
    }
  };
  // One task a product, or 48 rows of it: whole tiles.
  constexpr int64_t kRowsATask = 48;
  const int64_t pieces = (tallest + kRowsATask - 1) / kRowsATask;
  const auto piece = [&](int64_t task) {
    const W4A8Product& p = a.products[task / pieces];
    const int64_t first = task % pieces * kRowsATask, last = first + kRowsATask;
    each_tile(p, [&](int64_t row, int64_t rows) {
      if (row - p.first >= first && row - p.first < last) tile(row, rows, reads_bytes(p.m, rows));
    });
  };
  if (a.rows * k <= 65536)
    for (int64_t task = 0; task < a.count * pieces; ++task) piece(task);
  else parallel_tasks(a.count * pieces, piece);
  return {in_place ? a.x : slots, stride, sums};
}

}  // namespace

void w4a8_gemm(const W4A8Args& a) {
  const W4A8Weight& w = a.weight;
  if (w.n == 0 || a.count == 0) return;
  const Rows rows = prepare(a);
  const int64_t panels = (w.n + kColumns - 1) / kColumns, group_slots = group_lines(w) * kLineK;
  // Rows are cut too where columns alone are too few for all threads: each cut splits its weights again.
  const int64_t wanted = 4 * num_threads(), cuts = a.count * panels >= wanted ? 1 : (wanted + panels - 1) / panels;
  // As many groups at a time as make kBytesK bytes a column: those of 32 columns stay in L1.
  const int64_t at_a_time = w.group_size > 0 && w.group_size < kBytesK ? kBytesK / w.group_size : 1;
  parallel_tasks(a.count * panels * cuts, [&](int64_t task) {
    const W4A8Product& product = a.products[task / (panels * cuts)];
    const int64_t panel = task / cuts % panels, cut = task % cuts;
    const Block b0 = block_of(w, product.w, 2 * panel), b1 = block_of(w, product.w, 2 * panel + 1);
    const int64_t first = product.first + product.m * cut / cuts, last = product.first + product.m * (cut + 1) / cuts;
    const bool many = reads_bytes(product.m, product.m);
    const int64_t step = many ? at_a_time : w.groups > 0 ? w.groups : 1;
    float* sums = static_cast<float*>(thread_scratch(kScratchOut, (last - first + kMostRows) * kColumns * 4));
    uint8_t* bytes = many ? static_cast<uint8_t*>(thread_scratch(kScratchBytes, at_a_time * group_slots * kColumns))
                          : nullptr;
    for (int64_t g = 0; g < w.groups || g == 0; g += step) {
      const Groups groups{g, at_most(g + step, w.groups)};
      if (many) split(w, b0, b1, groups, bytes);
      float* out = sums;
      each_tile(product, [&](int64_t row, int64_t count) {
        if (row < first || row >= last) return;
        if (g == 0)
          for (int64_t i = 0; i < count * kColumns; i += F::kLanes) store(out + i, splat<F>(0.f));
        multiply(w, b0, b1, groups, reads_bytes(product.m, count) ? bytes : nullptr,
                 rows.x + row * rows.stride + g * group_slots * count, rows.sums + row * w.groups + g * count, count, out);
        if (groups.last == w.groups) {
          if (a.out_bf16) finish<bf16>(a, row, count, panel * kColumns, out);
          else finish<float>(a, row, count, panel * kColumns, out);
        }
        out += count * kColumns;
      });
    }
  });
}

}  // namespace glm5::cpu::GLM5_ISA
