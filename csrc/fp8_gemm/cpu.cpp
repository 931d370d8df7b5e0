// Products of e4m3 matrices (contract and order of summation: fp8_gemm.h). A block of b, 128 of k for a few vectors of
// columns, is decoded into L1, columns to the lanes, and meets all rows there; a block's sums stay in registers.
//
// A step of the inner loop is one k in float32, or (AVX-512) two in bf16.
#include "common/gemm/pack.h"
#include "fp8_gemm/pairs.h"
#include "fp8_gemm/units.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int L = F::kLanes;
#if GLM5_ISA_LEVEL == 2
using Kind = Pairs;
constexpr int kMaxRows = 12;  // 24 accumulators, 2 of b, 1 of a, of 32 registers
#else
using Kind = Plain<float>;
constexpr int kMaxRows = GLM5_ISA_LEVEL == 1 ? 6 : 4;
#endif
constexpr int kMaxPanels = 2;
constexpr int64_t kSteps = kFp8Block / Kind::kPerStep;
constexpr int64_t kStripe = 64;
constexpr int64_t kAhead = 4 * kFp8Block;  // along a line, to what is prefetched

// ---- Rows: [block][row][step], then [block][row] scales ----------------------------------------------------------------

GLM5_INLINE float* packed_rows(const Unit& u, int64_t block) {
  return reinterpret_cast<float*>(u.packed) + block * u.rows * kSteps;
}
GLM5_INLINE float* packed_scales(const Unit& u, int64_t block) {
  return reinterpret_cast<float*>(u.packed) + u.blocks * u.rows * kSteps + block * u.rows;
}

// One row's 128 values of k, `count` of which there are.
GLM5_INLINE void pack_row(const e4m3* p, int64_t count, float* out) {
#if GLM5_ISA_LEVEL == 2
  const PairDecoder decode;
  for (int64_t k = 0; k < kFp8Block; k += 64) {
    __m512i even, odd;
    decode(load_64(p + k, count - k), even, odd);
    _mm512_storeu_si512(out + k / 2, even);
    _mm512_storeu_si512(out + k / 2 + 16, odd);
  }
#else
  for (int64_t k = 0; k < kFp8Block; k += L) store(out + k, k < count ? load_n(p + k, count - k) : splat<F>(0.f));
#endif
}

// ---- Columns: [panel][step][lane] --------------------------------------------------------------------------------------

// One block of L lines, `lines` and `count` of k of which there are.
GLM5_INLINE void decode_panel(const e4m3* p, int64_t line_stride, int64_t lines, int64_t count, float* out) {
#if GLM5_ISA_LEVEL == 2
  const PairDecoder decode;
  for (int64_t k = 0; k < kFp8Block; k += 64) {
    F r[16];  // quads of bytes
    if (lines >= 16 && count - k >= 64) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        __builtin_prefetch(p + i * line_stride + k + kAhead);
        r[i].v = _mm512_castsi512_ps(load_64(p + i * line_stride + k));
      }
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        r[i].v = _mm512_castsi512_ps(i < lines ? load_64(p + i * line_stride + k, count - k) : _mm512_setzero_si512());
    }
    transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      __m512i even, odd;
      decode(_mm512_castps_si512(r[i].v), even, odd);
      _mm512_storeu_si512(out + (k / 2 + i) * 16, even);
      _mm512_storeu_si512(out + (k / 2 + 16 + i) * 16, odd);
    }
  }
#else
  for (int64_t k = 0; k < kFp8Block; k += L) {
    F r[L];
    for (int i = 0; i < L; ++i) {
      const e4m3* line = p + i * line_stride + k;
      r[i] = i >= lines || k >= count ? splat<F>(0.f) : count - k >= L ? load(line) : load_n(line, count - k);
    }
    transpose(r);
    for (int i = 0; i < L; ++i) store(out + (k + i) * L, r[i]);
  }
#endif
}

// ---- Microkernel -------------------------------------------------------------------------------------------------------

// totals[row][panel][lane] += a_scale[row] b_scale times the block's sums, or begin with that.
template <int kRows, int kPanels>
__attribute__((noinline)) void multiply(const float* a, const float* a_scale, const float* b, float b_scale, bool begin,
                                        float* totals) {
  F c[kRows][kPanels];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kPanels; ++j) c[i][j] = splat<F>(0.f);
  for (int64_t s = 0; s < kSteps; ++s) {
    F bv[kPanels];
#pragma GCC unroll 4
    for (int j = 0; j < kPanels; ++j) bv[j] = load(b + (j * kSteps + s) * L);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const F av = splat<F>(a[i * kSteps + s]);
#pragma GCC unroll 4
      for (int j = 0; j < kPanels; ++j) c[i][j] = Kind::step(av, bv[j], c[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    const F scale = splat<F>(a_scale[i] * b_scale);
#pragma GCC unroll 4
    for (int j = 0; j < kPanels; ++j) {
      float* total = totals + (i * kPanels + j) * L;
      store(total, fma(c[i][j], scale, begin ? splat<F>(0.f) : load(total)));
    }
  }
}

template <int kRows, class... Args>
GLM5_INLINE void run_multiply(int64_t rows, int64_t panels, Args... args) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      if (panels == 2) multiply<kRows, 2>(args...);
      else multiply<kRows, 1>(args...);
    } else {
      run_multiply<kRows - 1>(rows, panels, args...);
    }
  }
}

constexpr const char* kPathNames[2][12] = {
    {"fp8_gemm 1x1", "fp8_gemm 2x1", "fp8_gemm 3x1", "fp8_gemm 4x1", "fp8_gemm 5x1", "fp8_gemm 6x1", "fp8_gemm 7x1",
     "fp8_gemm 8x1", "fp8_gemm 9x1", "fp8_gemm 10x1", "fp8_gemm 11x1", "fp8_gemm 12x1"},
    {"fp8_gemm 1x2", "fp8_gemm 2x2", "fp8_gemm 3x2", "fp8_gemm 4x2", "fp8_gemm 5x2", "fp8_gemm 6x2", "fp8_gemm 7x2",
     "fp8_gemm 8x2", "fp8_gemm 9x2", "fp8_gemm 10x2", "fp8_gemm 11x2", "fp8_gemm 12x2"}};

struct Kernel {
  static int64_t packed_bytes(const Unit& u) {
    return ceil_div(u.blocks * u.rows * (kSteps + 1) * static_cast<int64_t>(sizeof(float)), 64) * 64;
  }

  static void pack(const Unit& u, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
      for (int64_t block = 0; block < u.blocks; ++block) {
        const int64_t k = block * kFp8Block;
        pack_row(row_of(u, row) + k, u.g->k - k, packed_rows(u, block) + row * kSteps);
        packed_scales(u, block)[row] = scales_of(u, row)[block];
      }
  }

  static int64_t stripe(const Unit&) { return kStripe; }

  static void run(const Unit& u, int64_t first, int64_t last) {
    const int64_t groups = ceil_div(u.rows, kMaxRows);
    float* panels = static_cast<float*>(thread_scratch(kScratchPanel, kMaxPanels * kSteps * L * sizeof(float)));
    float* totals = static_cast<float*>(
        thread_scratch(kScratchTotals, groups * kMaxRows * kMaxPanels * L * static_cast<int64_t>(sizeof(float))));
    for (int64_t n = first; n < last; n += kMaxPanels * L) {
      const int64_t cols = at_most(kMaxPanels * L, last - n), num_panels = ceil_div(cols, L);
      for (int64_t block = 0; block < u.blocks; ++block) {
        const int64_t k = block * kFp8Block;
        for (int64_t p = 0; p < num_panels; ++p)
          decode_panel(line_of(u, n + p * L) + k, u.g->b_row, cols - p * L, u.g->k - k, panels + p * kSteps * L);
        const float b_scale = line_scales_of(u, n)[block];
        for (int64_t group = 0; group < groups; ++group) {
          const int64_t r0 = group * u.rows / groups, r1 = (group + 1) * u.rows / groups;
          GLM5_COUNT_PATH(kPathNames[num_panels - 1][r1 - r0 - 1]);
          run_multiply<kMaxRows>(r1 - r0, num_panels, packed_rows(u, block) + r0 * kSteps, packed_scales(u, block) + r0,
                                 panels, b_scale, block == 0, totals + group * kMaxRows * kMaxPanels * L);
        }
      }
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t r0 = group * u.rows / groups, r1 = (group + 1) * u.rows / groups;
        const float* own = totals + group * kMaxRows * kMaxPanels * L;
        for (int64_t row = r0; row < r1; ++row)
          for (int64_t p = 0; p < num_panels; ++p, own += L)
            store_columns(u, row, n + p * L, u.blocks > 0 ? load(own) : splat<F>(0.f), cols - p * L);
      }
    }
  }
};

}  // namespace

void fp8_gemm(const Fp8GemmArgs* products, int64_t count) { run_products<Kernel>(products, count); }

}  // namespace glm5::cpu::GLM5_ISA
