// The packed matrix product (contract and summation order: gemm.h; few rows: few_rows.cpp). B is packed into panels of one
// vector of columns, A into rows; a microkernel keeps up to kMaxRows x kMaxPanels accumulators in registers, lanes along the
// columns.
#include "common/gemm/gemm.h"

#include "common/gemm/amx.h"
#include "common/gemm/few_rows.h"
#include "common/gemm/lines.h"
#include "common/parallel.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

#if GLM5_ISA_LEVEL == 2
constexpr int kMaxRows = 12, kMaxPanels = 2;  // 24 accumulators, 2 of B, 1 of A, of 32 registers
#elif GLM5_ISA_LEVEL == 1
constexpr int kMaxRows = 6, kMaxPanels = 2;   // 12 + 2 + 1 of 16
#else
constexpr int kMaxRows = 4, kMaxPanels = 2;
#endif
constexpr int kAheadBytes = 6 * 64;
constexpr int kScratchTasks = 4, kScratchA = 5, kScratchB = 6, kScratchC = 7;
// The largest tile. A block of its rows, packed, stays in L2 (a megabyte of float32); B is packed strip by strip, as wide as
// the microkernel.
constexpr int64_t kTileRows = 576, kTileCols = 512;
// So many steps of a strip stay in L1 while all rows pass: a block may come in parts. What is packed lies one cache line
// further apart than that, so that rows and panels do not all fall into the same cache sets.
constexpr int64_t kPartSteps = 256;
template <class S>
constexpr int64_t kRowSize = kPartSteps + 64 / sizeof(S);
template <class S>
constexpr int64_t kPanelSize = kPartSteps * Vector<S>::kLanes + 64 / sizeof(S);

// ---- Packing ------------------------------------------------------------------------------------------------------

// dst[panel][step][lane], panels panel_size apart: columns of B to the lanes.
template <class T, class K>
void pack_panels(const T* b, int64_t k_stride, int64_t n_stride, int64_t k_count, int64_t n_count, int64_t panel_size,
                 typename K::S* dst) {
  using V = typename K::V;
  constexpr int L = V::kLanes;
  const int64_t steps = (k_count + K::kPerStep - 1) / K::kPerStep;
  for (int64_t n = 0; n < n_count; n += L) {
    typename K::S* panel = dst + n / L * panel_size;
    if (n_stride == 1) {
      for (int64_t s = 0; s < steps; ++s)
        store(panel + s * L,
              K::across(b + n + s * K::kPerStep * k_stride, k_stride, k_count - s * K::kPerStep, n_count - n));
      continue;
    }
    for (int64_t s = 0; s < steps; s += L) {
      V r[L];
      const int64_t k = s * K::kPerStep, ahead = k + kAheadBytes / static_cast<int64_t>(sizeof(T));
      const T* lines = b + n * n_stride;
      // At the end of a block the next lines begin.
      const T* fetched = ahead < k_count ? lines + ahead : n + L < n_count ? lines + L * n_stride + ahead - k_count : lines;
      read_lines<T, K, L>(lines + k * k_stride, n_stride, k_stride, n_count - n, k_count - k, fetched, r);
      transpose(r);
      const int64_t left = steps - s;
      if (left >= L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store(panel + (s + i) * L, r[i]);
      } else {
        for (int i = 0; i < L; ++i)
          if (i < left) store(panel + (s + i) * L, r[i]);
      }
    }
  }
}

// dst[row][step], rows row_size apart.
template <class T, class K>
void pack_rows(const T* a, int64_t m_stride, int64_t k_stride, int64_t k_count, int64_t m_count, int64_t row_size,
               typename K::S* dst) {
  using V = typename K::V;
  constexpr int L = V::kLanes;
  const int64_t steps = (k_count + K::kPerStep - 1) / K::kPerStep;
  if (m_stride == 1 && k_stride != 1) {
    for (int64_t m = 0; m < m_count; m += L)
      for (int64_t s = 0; s < steps; s += L) {
        V r[L];
        for (int i = 0; i < L; ++i) {
          const int64_t k = (s + i) * K::kPerStep;
          r[i] = k < k_count ? K::across(a + m + k * k_stride, k_stride, k_count - k, m_count - m) : splat<V>(0);
        }
        transpose(r);
        for (int i = 0; i < L; ++i)
          if (m + i < m_count) store(dst + (m + i) * row_size + s, r[i]);
      }
    return;
  }
  for (int64_t m = 0; m < m_count; ++m) {
    const T* line = a + m * m_stride;
    typename K::S* row = dst + m * row_size;
    int64_t s = 0;
    if (k_stride == 1)
      for (; (s + L) * K::kPerStep <= k_count; s += L) store(row + s, K::along(line + s * K::kPerStep));
    for (; s < steps; s += L)
      store(row + s, read_line<T, K>(line + s * K::kPerStep * k_stride, k_stride, k_count - s * K::kPerStep));
  }
}

// ---- Microkernel --------------------------------------------------------------------------------------------------

// Memory that is fetched while a microkernel runs, a cache line a step: from every 16 steps' first line, lines `inner` bytes
// apart; these begin 16 `outer` bytes apart.
struct Fetch {
  const char* first;
  int64_t inner, outer;
};

// out[row][panel][lane] = sum over steps, from zero or from `start`; plus, in the end, `earlier` where that is not null.
// a: rows kRowSize slots apart, b: panels kPanelSize.
template <class K, int kRows, int kPanels>
__attribute__((noinline)) void multiply(int64_t steps, const typename K::S* a, const typename K::S* b,
                                        const typename K::S* start, const typename K::S* earlier, [[maybe_unused]] Fetch far,
                                        typename K::S* out) {
  using V = typename K::V;
  using S = typename K::S;
  constexpr int L = V::kLanes;
  V c[kRows][kPanels];
  if (start) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kPanels; ++j) c[i][j] = load(start + (i * kPanels + j) * L);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kPanels; ++j) c[i][j] = splat<V>(0);
  }
  for (int64_t s = 0; s < steps; ++s) {
    V bv[kPanels];
#pragma GCC unroll 4
    for (int j = 0; j < kPanels; ++j) bv[j] = load(b + j * kPanelSize<S>);
#if GLM5_ISA_LEVEL == 2
    __builtin_prefetch(far.first + (s & 15) * far.inner + (s & ~int64_t{15}) * far.outer, 0, 2);
    // The next group of rows: `a` moves on as well.
    __builtin_prefetch(reinterpret_cast<const char*>(a + kMaxRows * kRowSize<S>) +
                       s * (64 - static_cast<int64_t>(sizeof(S))));
#endif
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const V av = splat<V>(a[i * kRowSize<S>]);
#pragma GCC unroll 4
      for (int j = 0; j < kPanels; ++j) c[i][j] = K::step(av, bv[j], c[i][j]);
    }
    ++a;
    b += L;
    as_it_is(a);
    as_it_is(b);
  }
  if (earlier) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kPanels; ++j) c[i][j] = load(earlier + (i * kPanels + j) * L) + c[i][j];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kPanels; ++j) store(out + (i * kPanels + j) * L, c[i][j]);
}

template <class K, int kRows, class... Args>
GLM5_INLINE void run_multiply(int rows, int panels, Args... args) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      if (panels == 2) multiply<K, kRows, 2>(args...);
      else multiply<K, kRows, 1>(args...);
    } else {
      run_multiply<K, kRows - 1>(rows, panels, args...);
    }
  }
}

constexpr const char* kPathNames[2][12] = {{"gemm 1x1", "gemm 2x1", "gemm 3x1", "gemm 4x1", "gemm 5x1", "gemm 6x1",
                                            "gemm 7x1", "gemm 8x1", "gemm 9x1", "gemm 10x1", "gemm 11x1", "gemm 12x1"},
                                           {"gemm 1x2", "gemm 2x2", "gemm 3x2", "gemm 4x2", "gemm 5x2", "gemm 6x2",
                                            "gemm 7x2", "gemm 8x2", "gemm 9x2", "gemm 10x2", "gemm 11x2", "gemm 12x2"}};

// The first steps of a strip of B, on the way to the second or first half of it: of its columns, where they lie along k, else
// of what the microkernel has of each step.
template <class T, class K>
Fetch fetch_strip(const GemmArgs& g, const T* strip, int64_t half) {
  const int64_t size = sizeof(T);
  if (g.b_col != 1) return {reinterpret_cast<const char*>(strip + half * 16 * g.b_col), g.b_col * size, K::kPerStep * size};
  const char* first = reinterpret_cast<const char*>(strip) + half * (K::kPerStep == 1 ? 64 : g.b_row * size);
  return {first, K::kPerStep * g.b_row * size, K::kPerStep * g.b_row * size};
}

// ---- One tile: rows [m0, m1), columns [n0, n1), all of k ------------------------------------------------------------

template <class T>
void run_tile(const GemmArgs& g, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  using K = typename KindFor<T>::Type;
  using V = typename K::V;
  using S = typename K::S;
  constexpr int L = V::kLanes;
  const T* a = static_cast<const T*>(g.a) + m0 * g.a_row;
  const T* b = static_cast<const T*>(g.b) + n0 * g.b_col;
  const T* bias = g.bias ? static_cast<const T*>(g.bias) + n0 : nullptr;
  const bool out_is_accumulator = sizeof(T) == sizeof(S) || g.out_dtype != g.dtype;
  const size_t out_size = out_is_accumulator ? sizeof(S) : sizeof(T);
  char* c = static_cast<char*>(g.c) + (m0 * g.c_row + n0) * out_size;
  const int64_t rows = m1 - m0, cols = n1 - n0, num_panels = (cols + L - 1) / L;

  const int64_t row_groups = (rows + kMaxRows - 1) / kMaxRows, block_parts = kGemmBlockK / K::kPerStep / kPartSteps;
  constexpr int64_t kGroupSize = kMaxRows * kRowSize<S>, kPartK = kPartSteps * K::kPerStep;
  static_assert(kGemmBlockK % kPartK == 0);
  S* packed_a = static_cast<S*>(thread_scratch(
      kScratchA, (g.k > kPartK ? block_parts : 1) * row_groups * kGroupSize * static_cast<int64_t>(sizeof(S))));
  S* packed_b = static_cast<S*>(thread_scratch(kScratchB, kMaxPanels * kPanelSize<S> * static_cast<int64_t>(sizeof(S))));
  // Sums of the block, for one strip, and of the blocks before it, for all: [strip][group][row][panel][lane].
  constexpr int64_t kGroupSums = kMaxRows * kMaxPanels * L;
  const int64_t strip_sums = row_groups * kGroupSums, strips = (num_panels + kMaxPanels - 1) / kMaxPanels;
  const bool keeps = g.k > kGemmBlockK || g.accumulate;
  S* sums = static_cast<S*>(
      thread_scratch(kScratchC, (1 + (keeps ? strips : 0)) * strip_sums * static_cast<int64_t>(sizeof(S))));

  for (int64_t k0 = 0; k0 == 0 || k0 < g.k; k0 += kGemmBlockK) {
    const int64_t k1 = g.k - k0 < kGemmBlockK ? g.k : k0 + kGemmBlockK;
    const bool joins = k0 > 0 || g.accumulate, last = k1 == g.k;
    for (int64_t p = 0; p < num_panels; p += kMaxPanels) {
      const int panels = num_panels - p < kMaxPanels ? static_cast<int>(num_panels - p) : kMaxPanels;
      const int64_t n = p * L, strip_cols = cols - n < panels * L ? cols - n : panels * L;
      const T* strip = b + n * g.b_col;
      for (int64_t k = k0; k == k0 || k < k1; k += kPartK) {
        const int64_t k_count = k1 - k < kPartK ? k1 - k : kPartK, steps = (k_count + K::kPerStep - 1) / K::kPerStep;
        const bool resume = k > k0, finish = k + k_count == k1;
        pack_panels<T, K>(strip + k * g.b_row, g.b_row, g.b_col, k_count, strip_cols, kPanelSize<S>, packed_b);
        // What is packed next: the strip goes on, or the one beside, or the first one of the next block.
        const T* next_strip = !finish                       ? strip + (k + k_count) * g.b_row
                              : p + kMaxPanels < num_panels ? strip + kMaxPanels * L * g.b_col + k0 * g.b_row
                              : !last                       ? b + k1 * g.b_row
                                                            : nullptr;
        S* part_a = packed_a + (k - k0) / kPartK * row_groups * kGroupSize;
        for (int64_t group = 0; group < row_groups; ++group, part_a += kGroupSize) {
          const int64_t r0 = group * rows / row_groups, r1 = (group + 1) * rows / row_groups;
          Fetch far{reinterpret_cast<const char*>(part_a), 0, 0};
          if (p == 0) {
            const T* rows_a = a + r0 * g.a_row + k * g.a_col;
            pack_rows<T, K>(rows_a, g.a_row, g.a_col, k_count, r1 - r0, kRowSize<S>, part_a);
            if (g.a_col == 1 && group + 1 < row_groups)
              far = {reinterpret_cast<const char*>(rows_a + (r1 - r0) * g.a_row), g.a_row * static_cast<int64_t>(sizeof(T)),
                     K::kPerStep * static_cast<int64_t>(sizeof(T))};
          } else if (next_strip && group < 2) {
            far = fetch_strip<T, K>(g, next_strip, group);
          }
          S *block_sums = sums + group * kGroupSums, *earlier = block_sums + (1 + p / kMaxPanels) * strip_sums;
          char* out = c + (r0 * g.c_row + n) * out_size;
          GLM5_COUNT_PATH(kPathNames[panels - 1][r1 - r0 - 1]);
          if (resume) GLM5_COUNT_PATH("gemm block in parts");
          if (finish && joins) GLM5_COUNT_PATH(last ? "gemm joins last block" : "gemm joins block");
          if (finish && k0 == 0 && g.accumulate)
            for (int64_t r = 0; r < r1 - r0; ++r)
              for (int i = 0; i < panels; ++i)
                store(earlier + (r * panels + i) * L,
                      strip_cols > i * L ? load_n(reinterpret_cast<const S*>(out) + r * g.c_row + i * L, strip_cols - i * L)
                                         : splat<V>(0));
          if (finish && joins)
            for (int64_t i = 0; i < kGroupSums; i += 64 / static_cast<int64_t>(sizeof(S))) __builtin_prefetch(earlier + i);
          if (finish && last)
            for (int64_t r = 0; r < r1 - r0; ++r)
              for (int64_t i = 0; i < strip_cols * static_cast<int64_t>(out_size); i += 64)
                __builtin_prefetch(out + r * g.c_row * static_cast<int64_t>(out_size) + i, 1);
          run_multiply<K, kMaxRows>(static_cast<int>(r1 - r0), panels, steps, part_a, packed_b,
                                    resume ? block_sums : nullptr, finish && joins ? earlier : nullptr, far,
                                    finish && !last ? earlier : block_sums);
          if (!finish || !last) continue;
          for (int64_t r = 0; r < r1 - r0; ++r)
            finish_row<T, V, S>(block_sums + r * panels * L, strip_cols, bias ? bias + n : nullptr,
                                out + r * g.c_row * static_cast<int64_t>(out_size), out_is_accumulator);
        }
      }
    }
  }
}

// ---- Cutting products into tiles ------------------------------------------------------------------------------------

struct Tiling {
  int64_t rows, cols;  // of a full tile
  int64_t row_tiles, col_tiles;
};

template <class T>
Tiling tiling(const GemmArgs& g, int64_t wanted) {
  using K = typename KindFor<T>::Type;
  constexpr int64_t L = K::V::kLanes, kPair = L * kMaxPanels;
  // Near-equal tiles, in whole register tiles; smaller ones where there would be too few to share out: columns first, since
  // B is packed again for every tile of rows.
  int64_t row_tiles = (g.m + kTileRows - 1) / kTileRows, col_tiles = (g.n + kTileCols - 1) / kTileCols;
  const auto size = [](int64_t total, int64_t tiles, int64_t unit) {
    return tiles > 0 ? ((total + tiles - 1) / tiles + unit - 1) / unit * unit : unit;
  };
  // Few rows: B comes from memory, so its lines are followed to their ends, one register tile of columns at a time.
  if (gemm_has_few_rows(g))
    wanted *= 2, col_tiles = g.n * g.k * static_cast<int64_t>(sizeof(T)) / kFewRowsTaskBytes + (g.n > 0);
  else if (g.m <= kMaxRows && g.b_row == 1) col_tiles = (g.n + kPair - 1) / kPair;
  while (row_tiles * col_tiles > 0 && row_tiles * col_tiles < wanted) {
    const int64_t rows = size(g.m, row_tiles, kMaxRows), cols = size(g.n, col_tiles, kPair);
    if (cols > kPair && (cols > rows / 2 || rows <= kMaxRows)) col_tiles *= 2;
    else if (rows > kMaxRows) row_tiles *= 2;
    else break;
  }
  Tiling t;
  t.rows = size(g.m, row_tiles, kMaxRows);
  t.cols = size(g.n, col_tiles, kPair);
  t.row_tiles = (g.m + t.rows - 1) / t.rows;
  t.col_tiles = (g.n + t.cols - 1) / t.cols;
  return t;
}

template <class T>
void run_products(const GemmArgs* products, int64_t count) {
  // first_task[i]: how many tiles the products before i have.
  int64_t* first_task = static_cast<int64_t*>(thread_scratch(kScratchTasks, (count + 1) * sizeof(int64_t)));
  const int64_t threads = num_threads(), wanted = threads == 1 ? 1 : (2 * threads + count - 1) / count;
  first_task[0] = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Tiling t = tiling<T>(products[i], wanted);
    first_task[i + 1] = first_task[i] + t.row_tiles * t.col_tiles;
  }
  parallel_tasks(first_task[count], [&](int64_t task) {
    int64_t low = 0, high = count - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (first_task[middle] <= task) low = middle;
      else high = middle - 1;
    }
    const GemmArgs& g = products[low];
    const Tiling t = tiling<T>(g, wanted);
    const int64_t tile = task - first_task[low], row = tile % t.row_tiles, col = tile / t.row_tiles;
    const int64_t m1 = (row + 1) * t.rows, n1 = (col + 1) * t.cols;
    if (gemm_has_few_rows(g)) gemm_few_rows(g, col * t.cols, n1 < g.n ? n1 : g.n);
    else run_tile<T>(g, row * t.rows, m1 < g.m ? m1 : g.m, col * t.cols, n1 < g.n ? n1 : g.n);
  });
}

template <class T>
void run_serial(const GemmArgs& g) {
  const Tiling t = tiling<T>(g, 1);
  for (int64_t tile = 0; tile < t.row_tiles * t.col_tiles; ++tile) {
    const int64_t row = tile % t.row_tiles, col = tile / t.row_tiles;
    const int64_t m1 = (row + 1) * t.rows, n1 = (col + 1) * t.cols;
    if (gemm_has_few_rows(g)) gemm_few_rows(g, col * t.cols, n1 < g.n ? n1 : g.n);
    else run_tile<T>(g, row * t.rows, m1 < g.m ? m1 : g.m, col * t.cols, n1 < g.n ? n1 : g.n);
  }
}

}  // namespace

void gemm(const GemmArgs* products, int64_t count) {
  if (count <= 0) return;
#if GLM5_ISA_LEVEL == 2
  if (products->dtype == 0 && current_isa() == Isa::amx)
    return amx::gemm_has_few_rows(products, count) ? amx::gemm_bf16_few_rows(products, count)
                                                   : amx::gemm_bf16(products, count);
#endif
  if (products->dtype == 0) run_products<bf16>(products, count);
  else if (products->dtype == 1) run_products<float>(products, count);
#if GLM5_ISA_LEVEL == 0
  else run_products<double>(products, count);
#endif
}

void gemm_serial(const GemmArgs& product) {
#if GLM5_ISA_LEVEL == 2
  if (product.dtype == 0 && current_isa() == Isa::amx) return amx::gemm_bf16_serial(product);
#endif
  if (product.dtype == 0) run_serial<bf16>(product);
  else if (product.dtype == 1) run_serial<float>(product);
#if GLM5_ISA_LEVEL == 0
  else run_serial<double>(product);
#endif
}

}  // namespace glm5::cpu::GLM5_ISA
