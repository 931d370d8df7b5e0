// The product on vectors. A task owns 32 columns (two blocks) and some rows. Codes are multiplied as they are, from 0 to 15;
// what the zero point is off by, zero * (sum of x over the group), is exact in integers and where the sums start.
//
// Few rows: weights stream past once, nibbles are split in registers. Many rows (AVX-512): the task's weights are split into
// bytes once, in memory that stays in L2, and read from there for every tile of rows.
#include "common/parallel.h"
#include "w4a8_gemm/layout.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int kScratchTasks = 7, kScratchSums = 6, kScratchRows = 5, kScratchBytes = 4;
constexpr int64_t kColumns = 2 * kBlock;

// What a tile reads of x: rows of `stride` bytes, padded to whole lines, and their sums.
struct Rows {
  const int8_t* x;
  int64_t stride;
  // [rows, groups]: minus the sum over the group, times 8 where no weight has zero points.
  const int32_t* sums;
};

// How a fused multiply-add is spelled where F's rounds twice.
GLM5_INLINE F fused(F a, F b, F c) {
#if GLM5_ISA_LEVEL == 0
  for (int i = 0; i < F::kLanes; ++i) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return c;
#else
  return fma(a, b, c);
#endif
}

#if GLM5_ISA_LEVEL == 2

constexpr const char* kTileNames[] = {"w4a8 packed 1", "w4a8 packed 2", "w4a8 packed 4", "w4a8 packed 8"};

constexpr int64_t kFewRows = 8;

GLM5_INLINE __m512i load_columns(const uint8_t* p, __mmask16 columns) { return _mm512_maskz_loadu_epi32(columns, p); }
GLM5_INLINE __m512i four_k(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

// facc[row][32] = sums over all groups, for kRows rows from `row`. kBytes: lines come from `bytes`, two of 64 bytes for each
// packed one, the blocks' in turn.
template <int kRows, bool kBytes>
__attribute__((noinline)) void tile(const W4A8Weight& w, const Block& b0, const Block& b1, const uint8_t* bytes,
                                    const Rows& rows, int64_t row, float* facc) {
  const __mmask16 mask0 = first_n(b0.columns), mask1 = first_n(b1.columns);
  const int64_t lines = group_lines(w), groups = w.groups, stride = rows.stride;
  const int8_t* x = rows.x + row * stride;
  const int32_t* sums = rows.sums + row * groups;
  const __m512i low_nibbles = _mm512_set1_epi8(15);
  for (int64_t i = 0; i < kRows * 2; ++i) store(facc + i * 16, splat<F>(0.f));
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t *p0 = b0.data + g * b0.group_bytes, *p1 = b1.data + g * b1.group_bytes;
    __m512i acc[kRows][2];
    if (!w.zeros) {
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = _mm512_set1_epi32(sums[r * groups + g]);
    } else {
      const __m512i zero0 = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask0, b0.zeros + g * b0.columns));
      const __m512i zero1 = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask1, b1.zeros + g * b1.columns));
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const __m512i sum = _mm512_set1_epi32(sums[r * groups + g]);
        acc[r][0] = _mm512_mullo_epi32(zero0, sum);
        acc[r][1] = _mm512_mullo_epi32(zero1, sum);
      }
    }
    for (int64_t line = 0; line < lines; ++line) {
      __m512i low0, low1, high0, high1;
      if constexpr (kBytes) {
        low0 = _mm512_load_si512(bytes), low1 = _mm512_load_si512(bytes + 64);
        high0 = _mm512_load_si512(bytes + 128), high1 = _mm512_load_si512(bytes + 192);
        bytes += 256;
      } else {
        const __m512i both0 = load_columns(p0, mask0), both1 = load_columns(p1, mask1);
        low0 = _mm512_and_si512(both0, low_nibbles), low1 = _mm512_and_si512(both1, low_nibbles);
        high0 = _mm512_and_si512(_mm512_srli_epi16(both0, 4), low_nibbles);
        high1 = _mm512_and_si512(_mm512_srli_epi16(both1, 4), low_nibbles);
        p0 += b0.line_bytes, p1 += b1.line_bytes;
      }
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const __m512i x_low = four_k(x + r * stride), x_high = four_k(x + r * stride + 4);
        acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], low0, x_low);
        acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], low1, x_low);
        acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], high0, x_high);
        acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], high1, x_high);
      }
      x += kLineK;
    }
    const F scale0 = load_n(reinterpret_cast<const float*>(b0.data + (g + 1) * b0.group_bytes - 4 * b0.columns), b0.columns);
    const F scale1 = load_n(reinterpret_cast<const float*>(b1.data + (g + 1) * b1.group_bytes - 4 * b1.columns), b1.columns);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      float* out = facc + r * kColumns;
      store(out, fma(F{_mm512_cvtepi32_ps(acc[r][0])}, scale0, load(out)));
      store(out + 16, fma(F{_mm512_cvtepi32_ps(acc[r][1])}, scale1, load(out + 16)));
    }
  }
}

#else

constexpr int64_t kFewRows = 1;

// One row, one block, one group.
GLM5_INLINE void group_sums(const W4A8Weight& w, const Block& b, int64_t g, const int8_t* x, int32_t sum, int32_t* out) {
  for (int64_t c = 0; c < b.columns; ++c) out[c] = sum * (w.zeros ? b.zeros[g * b.columns + c] : 1);
  const uint8_t* p = b.data + g * b.group_bytes;
  for (int64_t line = 0; line < group_lines(w); ++line, x += kLineK)
    for (int64_t c = 0; c < b.columns; ++c)
      for (int j = 0; j < 4; ++j, ++p) out[c] += (*p & 15) * x[j] + (*p >> 4) * x[4 + j];
}

template <int kRows, bool kBytes>
__attribute__((noinline)) void tile(const W4A8Weight& w, const Block& b0, const Block& b1, const uint8_t*, const Rows& rows,
                                    int64_t row, float* facc) {
  static_assert(kRows == 1 && !kBytes, "");
  for (int i = 0; i < kColumns; i += F::kLanes) store(facc + i, splat<F>(0.f));
  for (int64_t g = 0; g < w.groups; ++g)
    for (int half = 0; half < 2; ++half) {
      const Block& b = half ? b1 : b0;
      int32_t sums[kBlock];
      float wide[kBlock];
      group_sums(w, b, g, rows.x + row * rows.stride + g * w.group_size, rows.sums[row * w.groups + g], sums);
      float* out = facc + (half ? kBlock : 0);
      for (int64_t c = 0; c < b.columns; ++c) wide[c] = static_cast<float>(sums[c]);
      const float* scale = reinterpret_cast<const float*>(b.data + (g + 1) * b.group_bytes - 4 * b.columns);
      for (int64_t c = 0; c < b.columns; c += F::kLanes) {
        const int64_t left = b.columns - c;
        store(out + c, fused(load_n(wide + c, left), load_n(scale + c, left), load(out + c)));
      }
    }
}

#endif

template <class T>
GLM5_INLINE void finish(const W4A8Args& a, int64_t row, int64_t count, int64_t column, const float* facc) {
  const int64_t n = a.weight.n, columns = n - column < kColumns ? n - column : kColumns;
  for (int64_t r = 0; r < count; ++r) {
    T* out = static_cast<T*>(a.out) + (row + r) * n + column;
    const F scale = splat<F>(a.x_scale[row + r]);
    for (int64_t c = 0; c < columns; c += F::kLanes) store_n(out + c, load(facc + r * kColumns + c) * scale, columns - c);
  }
}

// Rows of x as tiles want them, in thread_scratch of the caller: copied where 8 does not divide k, and their sums.
Rows prepare(const W4A8Args& a) {
  const W4A8Weight& w = a.weight;
  const int64_t k = inner(w), stride = (k + kLineK - 1) / kLineK * kLineK, size = w.group_size;
  Rows rows{a.x, stride, nullptr};
  int32_t* sums = static_cast<int32_t*>(thread_scratch(kScratchSums, a.rows * w.groups * 4 + 4));
  int8_t* copy = stride != k ? static_cast<int8_t*>(thread_scratch(kScratchRows, a.rows * stride)) : nullptr;
  constexpr int64_t kRowsATask = 16;
  const auto some = [&](int64_t task) {
    const int64_t last = (task + 1) * kRowsATask < a.rows ? (task + 1) * kRowsATask : a.rows;
    for (int64_t row = task * kRowsATask; row < last; ++row) {
      const int8_t* x = a.x + row * k;
      for (int64_t g = 0; g < w.groups; ++g) {
        int32_t sum = 0;
        for (int64_t i = 0; i < size; ++i) sum += x[g * size + i];
        sums[row * w.groups + g] = w.zeros ? -sum : -8 * sum;
      }
      if (!copy) continue;
      std::memcpy(copy + row * stride, x, k);
      std::memset(copy + row * stride + k, 0, stride - k);
    }
  };
  if (a.rows <= kRowsATask) some(0);
  else parallel_tasks((a.rows + kRowsATask - 1) / kRowsATask, some);
  if (copy) rows.x = copy;
  rows.sums = sums;
  return rows;
}

}  // namespace

void w4a8_gemm(const W4A8Args& a) {
  const W4A8Weight& w = a.weight;
  if (a.rows == 0 || w.n == 0 || a.count == 0) return;
  const Rows rows = prepare(a);
  const int64_t panels = (w.n + kColumns - 1) / kColumns;
  parallel_tasks(a.count * panels, [&](int64_t task) {
    const W4A8Product& product = a.products[task / panels];
    const int64_t panel = task % panels;
    const Block b0 = block_of(w, product.w, 2 * panel), b1 = block_of(w, product.w, 2 * panel + 1);
    alignas(64) float facc[12 * kColumns];
    for (int64_t row = product.first; row < product.first + product.m; ++row) {
      tile<1, false>(w, b0, b1, nullptr, rows, row, facc);
      if (a.out_bf16) finish<bf16>(a, row, 1, panel * kColumns, facc);
      else finish<float>(a, row, 1, panel * kColumns, facc);
    }
  });
}

}  // namespace glm5::cpu::GLM5_ISA
