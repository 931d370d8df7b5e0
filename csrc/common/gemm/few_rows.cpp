// Products of few rows (order of summation: gemm.h). B is read once, from memory, and multiplied as it comes, without being
// packed: what counts is to keep enough reads under way.
#include "common/gemm/few_rows.h"

#include "common/gemm/lines.h"
#include "common/parallel.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

// Up to so many rows; so many vectors of columns at once.
constexpr int kLineRows = GLM5_ISA_LEVEL == 2 ? 8 : 4, kLinePanels = GLM5_ISA_LEVEL == 2 ? 1 : 2;
constexpr int64_t kLinesAheadBytes = 8 * 64;
constexpr int kScratchRows = 5;

// Lines of B are transposed in registers and
// multiplied at once, while the same lines further on, and at their ends the next ones, are prefetched.
// sums[row][panel][lane]: the sums over all of k. a: [step / kLanes][row][step % kLanes].
// b: kLinePanels kLanes lines, num_lines of them there; next: lines to come, or null.
template <class T, class K, int kRows>
__attribute__((noinline)) void multiply_lines(int64_t k_end, const typename K::S* a, const T* b, int64_t b_col,
                                              int64_t num_lines, const T* next, typename K::S* sums) {
  using V = typename K::V;
  using S = typename K::S;
  constexpr int L = V::kLanes, kTileK = L * K::kPerSlot * K::kPerStep;
  constexpr int64_t kAhead = kLinesAheadBytes / static_cast<int64_t>(sizeof(T));
  const int64_t tiled = num_lines >= kLinePanels * L ? k_end / kTileK * kTileK : 0;
  if (next == nullptr) next = b;  // in cache: costs nothing
  for (int64_t k0 = 0; k0 == 0 || k0 < k_end; k0 += kGemmBlockK) {
    const int64_t block_end = k_end - k0 < kGemmBlockK ? k_end : k0 + kGemmBlockK;
    const int64_t tiles_end = block_end < tiled ? block_end : tiled;
    V c[kLinePanels][kRows];
#pragma GCC unroll 2
    for (int p = 0; p < kLinePanels; ++p)
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) c[p][i] = splat<V>(0);
    int64_t k = k0;
    for (; k < tiles_end; k += kTileK) {
      const T *line = b + k, *fetched = k + kAhead < k_end ? line + kAhead : next + (k + kAhead - k_end);
      const S* own_a = a + k / K::kPerStep * kRows;
      as_it_is(fetched);
#pragma GCC unroll 2
      for (int p = 0; p < kLinePanels; ++p) {
        V r[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) {
          __builtin_prefetch(fetched);
          r[i] = K::slots(line);
          line += b_col;
          fetched += b_col;
          as_it_is(line);
          as_it_is(fetched);
        }
        transpose(r);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i)
#pragma GCC unroll 2
          for (int h = 0; h < K::kPerSlot; ++h) {
            const V bv = K::from_slot(r[i], h);
            const int s = i * K::kPerSlot + h;
#pragma GCC unroll 8
            for (int row = 0; row < kRows; ++row)
              c[p][row] = K::step(splat<V>(own_a[(s / L * kRows + row) * L + s % L]), bv, c[p][row]);
          }
      }
    }
    // What is left: the end of k, or fewer lines than lanes.
    for (; k < block_end; k += L * K::kPerStep) {
      const int64_t left = (block_end - k + K::kPerStep - 1) / K::kPerStep;
      const S* own_a = a + k / K::kPerStep * kRows;
      for (int p = 0; p < kLinePanels; ++p) {
        V r[L];
        read_lines<T, K, L>(b + k + p * L * b_col, b_col, 1, num_lines - p * L, block_end - k, b, r);
        transpose(r);
        for (int i = 0; i < L; ++i)
          if (i < left)
            for (int row = 0; row < kRows; ++row) c[p][row] = K::step(splat<V>(own_a[row * L + i]), r[i], c[p][row]);
      }
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
      for (int p = 0; p < kLinePanels; ++p) {
        S* own = sums + (row * kLinePanels + p) * L;
        store(own, k0 > 0 ? load(own) + c[p][row] : c[p][row]);
      }
  }
}

// The same for columns of B that lie side by side (b_col 1): a step reads kPanels vectors where they are. Few enough columns
// to keep all sums in registers, many enough to read whole stretches of memory; `ahead`: lines from here to what is
// prefetched.
// sums[row][panel][lane]; num_cols: how many are there.
template <class T, class K, int kRows, int kPanels>
__attribute__((noinline)) void multiply_across(int64_t k_end, const typename K::S* a, const T* b, int64_t b_row,
                                               int64_t num_cols, int64_t ahead, typename K::S* sums) {
  using V = typename K::V;
  constexpr int L = V::kLanes, kLine = 64 / static_cast<int>(sizeof(T));
  for (int64_t k0 = 0; k0 == 0 || k0 < k_end; k0 += kGemmBlockK) {
    const int64_t block_end = k_end - k0 < kGemmBlockK ? k_end : k0 + kGemmBlockK;
    V c[kRows][kPanels];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; ++p) c[i][p] = splat<V>(0);
    for (int64_t k = k0; k < block_end; k += K::kPerStep) {
      const int64_t s = k / K::kPerStep;
      const auto* own_a = a + (s / L * kRows) * L + s % L;
      const T* line = b + k * b_row;
#pragma GCC unroll 2
      for (int h = 0; h < K::kPerStep; ++h)
#pragma GCC unroll 8
        for (int p = 0; p < kPanels * L; p += kLine) __builtin_prefetch(line + (ahead + h) * b_row + p);
      V bv[kPanels];
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; ++p)
        bv[p] = K::across(line + p * L, b_row, block_end - k, kPanels > 1 ? int64_t{L} : num_cols);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const V av = splat<V>(own_a[i * L]);
#pragma GCC unroll 8
        for (int p = 0; p < kPanels; ++p) c[i][p] = K::step(av, bv[p], c[i][p]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; ++p) {
        auto* own = sums + (i * kPanels + p) * L;
        store(own, k0 > 0 ? load(own) + c[i][p] : c[i][p]);
      }
  }
}

// Vectors of columns that as many rows multiply at once.
constexpr int across_panels(int rows) {
  constexpr int most = GLM5_ISA_LEVEL == 2 ? 16 : 8;
  return rows == 1 ? (most < 8 ? most : 8) : rows == 2 ? most / 2 : rows <= 4 ? most / 4 : 2;
}

// Returns how many vectors were multiplied.
template <class T, class K, int kRows>
GLM5_INLINE int run_multiply_across(int64_t rows, int64_t k_end, const typename K::S* a, const T* b, int64_t b_row,
                                    int64_t num_cols, int64_t ahead, typename K::S* sums) {
  if constexpr (kRows > 0) {
    if (rows < kRows) return run_multiply_across<T, K, kRows - 1>(rows, k_end, a, b, b_row, num_cols, ahead, sums);
    constexpr int panels = across_panels(kRows);
    if (num_cols >= panels * K::V::kLanes) {
      GLM5_COUNT_PATH("gemm across: vectors");
      multiply_across<T, K, kRows, panels>(k_end, a, b, b_row, num_cols, ahead, sums);
      return panels;
    }
    GLM5_COUNT_PATH("gemm across: one vector");
    multiply_across<T, K, kRows, 1>(k_end, a, b, b_row, num_cols, ahead, sums);
  }
  return 1;
}

template <class T, class K, int kRows, class... Args>
GLM5_INLINE void run_multiply_lines(int64_t rows, Args... args) {
  if constexpr (kRows > 0) {
    if (rows == kRows) multiply_lines<T, K, kRows>(args...);
    else run_multiply_lines<T, K, kRows - 1>(rows, args...);
  }
}

constexpr const char* kLinePathNames[8] = {"gemm lines 1", "gemm lines 2", "gemm lines 3", "gemm lines 4",
                                           "gemm lines 5", "gemm lines 6", "gemm lines 7", "gemm lines 8"};

template <class T>
void run_lines(const GemmArgs& g, int64_t n0, int64_t n1) {
  using K = typename KindFor<T>::Type;
  using V = typename K::V;
  using S = typename K::S;
  constexpr int L = V::kLanes, kCols = kLinePanels * L;
  const T* bias = static_cast<const T*>(g.bias);
  const bool out_is_accumulator = sizeof(T) == sizeof(S) || g.out_dtype != g.dtype;
  const size_t out_size = out_is_accumulator ? sizeof(S) : sizeof(T);
  // One row may look like this already.
  const bool direct = g.m == 1 && g.a_col == 1 && sizeof(T) * K::kPerStep == sizeof(S) && g.k % (L * K::kPerStep) == 0;
  GLM5_COUNT_PATH(direct ? "gemm lines direct A" : "gemm lines packed A");
  GLM5_COUNT_PATH(kLinePathNames[g.m - 1]);
  const S* a = static_cast<const S*>(g.a);
  if (!direct) {
    const int64_t tiles = (g.k + L * K::kPerStep - 1) / (L * K::kPerStep);
    S* packed = static_cast<S*>(thread_scratch(kScratchRows, g.m * (tiles + 1) * L * sizeof(S)));
    for (int64_t r = 0; r < g.m; ++r)
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t k = t * L * K::kPerStep;
        const T* from = static_cast<const T*>(g.a) + r * g.a_row + k * g.a_col;
        store(packed + (t * g.m + r) * L, read_line<T, K>(from, g.a_col, g.k - k));
      }
    a = packed;
  }
  alignas(64) S sums[16 * L > kLineRows * kCols ? 16 * L : kLineRows * kCols];
  // Lines of B that are under way beside those being multiplied; not worth it where there are few.
  const int64_t ahead = g.k < 64 ? 0 : 16;
  for (int64_t n = n0, width; n < n1; n += width) {
    char* c = static_cast<char*>(g.c) + n * out_size;
    const T* b = static_cast<const T*>(g.b) + n * g.b_col;
    width = kCols;
    if (g.b_row == 1)
      run_multiply_lines<T, K, kLineRows>(g.m, g.k, a, b, g.b_col, n1 - n < kCols ? n1 - n : kCols,
                                          n + kCols < n1 ? b + kCols * g.b_col : nullptr, sums);
    else width = L * run_multiply_across<T, K, kLineRows>(g.m, g.k, a, b, g.b_row, n1 - n, ahead, sums);
    for (int64_t r = 0; r < g.m; ++r)
      finish_row<T, V, S>(sums + r * width, n1 - n < width ? n1 - n : width, bias ? bias + n : nullptr,
                          c + r * g.c_row * out_size, out_is_accumulator);
  }
}

}  // namespace

bool gemm_has_few_rows(const GemmArgs& g) {
  return g.m > 0 && g.m <= kLineRows && !g.accumulate && (g.b_row == 1 || (g.b_col == 1 && g.a_col == 1));
}

void gemm_few_rows(const GemmArgs& g, int64_t n0, int64_t n1) {
  if (g.dtype == 0) run_lines<bf16>(g, n0, n1);
  else if (g.dtype == 1) run_lines<float>(g, n0, n1);
#if GLM5_ISA_LEVEL == 0
  else run_lines<double>(g, n0, n1);
#endif
}

}  // namespace glm5::cpu::GLM5_ISA
