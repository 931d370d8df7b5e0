// One tile of the product on vectors: some rows, 32 columns, all groups. x comes in slots of four k, [slot][row].
#pragma once

#include "common/parallel.h"
#include "w4a8_gemm/layout.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int64_t kColumns = 2 * kBlock;

struct Groups {
  int64_t first, last;
};

#if GLM5_ISA_LEVEL == 2

constexpr int64_t kMostRows = 12, kFewRows = 8;

// Rows of the next tile of a product of m rows, `left` of which are still to be done.
GLM5_INLINE int64_t tile_rows(int64_t m, int64_t left) {
  if (m <= kFewRows) return m;
  return left >= 12 ? 12 : left >= 8 ? 8 : left >= 4 ? 4 : left;
}
GLM5_INLINE bool reads_bytes(int64_t m, int64_t rows) { return m > kFewRows && rows >= 4; }

GLM5_INLINE __m512i low_nibbles(__m512i both) { return _mm512_and_si512(both, _mm512_set1_epi8(15)); }
GLM5_INLINE __m512i high_nibbles(__m512i both) { return low_nibbles(_mm512_srli_epi16(both, 4)); }

// Bytes of some groups: of each line, low nibbles of both blocks, then high ones.
GLM5_INLINE void split(const W4A8Weight& w, const Block& b0, const Block& b1, Groups groups, uint8_t* out) {
  const __mmask16 mask0 = first_n(b0.columns), mask1 = first_n(b1.columns);
  const int64_t lines = group_lines(w);
  for (int64_t g = groups.first; g < groups.last; ++g) {
    const uint8_t *p0 = b0.data + g * b0.group_bytes, *p1 = b1.data + g * b1.group_bytes;
    for (int64_t line = 0; line < lines; ++line, p0 += b0.line_bytes, p1 += b1.line_bytes, out += 256) {
      __builtin_prefetch(p0 + 2048);
      __builtin_prefetch(p1 + 2048);
      const __m512i both0 = _mm512_maskz_loadu_epi32(mask0, p0), both1 = _mm512_maskz_loadu_epi32(mask1, p1);
      _mm512_store_si512(out, low_nibbles(both0));
      _mm512_store_si512(out + 64, low_nibbles(both1));
      _mm512_store_si512(out + 128, high_nibbles(both0));
      _mm512_store_si512(out + 192, high_nibbles(both1));
    }
  }
}

GLM5_INLINE __m512i four_k(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

// What a tile wants to know of the sum of x over a group of a row. Tiles of bytes, where there are no zero points, start
// from minus 8 times it. Others multiply it in one instruction with zero points as they are and times 2^11: as pairs of 16
// bits, the lower 11 of the sum and the rest.
GLM5_INLINE int32_t start_of(const W4A8Weight& w, bool bytes, int32_t sum) {
  if (bytes && !w.zeros) return -8 * sum;
  return (-sum & 2047) | static_cast<int32_t>(static_cast<uint32_t>(-sum >> 11) << 16);
}

// Zero points for that; without them, 8 for all.
GLM5_INLINE __m512i zero_pairs(const W4A8Weight& w, const Block& b, int64_t g, __mmask16 mask) {
  if (!w.zeros) return _mm512_set1_epi32(8 | 8 << 27);
  const __m512i zero = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, b.zeros + g * b.columns));
  return _mm512_or_si512(zero, _mm512_slli_epi32(zero, 27));
}

// In place: given the intrinsic, GCC 12 keeps copies of the sums on the stack.
GLM5_INLINE void dot(__m512i& sums, __m512i codes, __m512i x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(x));
}

// kPlain: no zero points, and the sums times 8 are where the products start as they are.
template <int kRows, bool kBytes, bool kPlain>
__attribute__((noinline)) void run_tile(const W4A8Weight& w, const Block& b0, const Block& b1, Groups groups,
                                        const uint8_t* bytes, const int8_t* x, const int32_t* sums, float* out) {
  GLM5_COUNT_PATH(kBytes ? "w4a8 bytes" : "w4a8 nibbles");
  const __mmask16 mask0 = first_n(b0.columns), mask1 = first_n(b1.columns);
  const int64_t lines = group_lines(w);
  const uint8_t *p0 = b0.data + groups.first * b0.group_bytes, *p1 = b1.data + groups.first * b1.group_bytes;
  for (int64_t g = groups.first; g < groups.last; ++g, sums += kRows) {
    __m512i acc[kRows][2];
    if constexpr (kPlain) {
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = _mm512_set1_epi32(sums[r]);
    } else {
      const __m512i zero0 = zero_pairs(w, b0, g, mask0), zero1 = zero_pairs(w, b1, g, mask1);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const __m512i sum = _mm512_set1_epi32(sums[r]);
        acc[r][0] = _mm512_madd_epi16(zero0, sum);
        acc[r][1] = _mm512_madd_epi16(zero1, sum);
      }
    }
    if constexpr (kBytes) {
      // One step an iteration: given two, GCC 12 copies all sums in between.
      for (int64_t step = 0; step < 2 * lines; ++step, bytes += 128, x += 4 * kRows) {
        const __m512i codes0 = _mm512_load_si512(bytes), codes1 = _mm512_load_si512(bytes + 64);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
          const __m512i four = four_k(x + 4 * r);
          dot(acc[r][0], codes0, four);
          dot(acc[r][1], codes1, four);
        }
      }
    } else {
      for (int64_t line = 0; line < lines; ++line, p0 += b0.line_bytes, p1 += b1.line_bytes, x += 8 * kRows) {
        __builtin_prefetch(p0 + 2048);
        __builtin_prefetch(p1 + 2048);
        const __m512i both0 = _mm512_maskz_loadu_epi32(mask0, p0), both1 = _mm512_maskz_loadu_epi32(mask1, p1);
        const __m512i low0 = low_nibbles(both0), low1 = low_nibbles(both1);
        const __m512i high0 = high_nibbles(both0), high1 = high_nibbles(both1);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
          const __m512i low = four_k(x + 4 * r), high = four_k(x + 4 * (kRows + r));
          dot(acc[r][0], low0, low);
          dot(acc[r][1], low1, low);
          dot(acc[r][0], high0, high);
          dot(acc[r][1], high1, high);
        }
      }
    }
    const F scale0 = load_n(scales_of(b0, g), b0.columns), scale1 = load_n(scales_of(b1, g), b1.columns);
    if constexpr (!kBytes) p0 += b0.line_bytes, p1 += b1.line_bytes;
    __asm__("" : "+r"(out));  // where GCC knows that it is the same in every group it keeps all of it in registers
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      float* row = out + r * kColumns;
      store(row, fma(F{_mm512_cvtepi32_ps(acc[r][0])}, scale0, load(row)));
      store(row + 16, fma(F{_mm512_cvtepi32_ps(acc[r][1])}, scale1, load(row + 16)));
    }
  }
}

template <int kRows>
GLM5_INLINE void run_wide(const W4A8Weight& w, const Block& b0, const Block& b1, Groups groups, const uint8_t* bytes,
                          const int8_t* x, const int32_t* sums, float* out) {
  if (w.zeros) run_tile<kRows, true, false>(w, b0, b1, groups, bytes, x, sums, out);
  else run_tile<kRows, true, true>(w, b0, b1, groups, bytes, x, sums, out);
}

// Adds some groups to out [rows][32], one after another; x and sums begin with the first of them. `bytes`: from split, or null.
GLM5_INLINE void multiply(const W4A8Weight& w, const Block& b0, const Block& b1, Groups groups, const uint8_t* bytes,
                          const int8_t* x, const int32_t* sums, int64_t rows, float* out) {
  if (bytes) {
    if (rows == 12) run_wide<12>(w, b0, b1, groups, bytes, x, sums, out);
    else if (rows == 8) run_wide<8>(w, b0, b1, groups, bytes, x, sums, out);
    else run_wide<4>(w, b0, b1, groups, bytes, x, sums, out);
    return;
  }
  switch (rows) {
    case 1:
      return run_tile<1, false, false>(w, b0, b1, groups, bytes, x, sums, out);
    case 2:
      return run_tile<2, false, false>(w, b0, b1, groups, bytes, x, sums, out);
    case 3:
      return run_tile<3, false, false>(w, b0, b1, groups, bytes, x, sums, out);
    case 4:
      return run_tile<4, false, false>(w, b0, b1, groups, bytes, x, sums, out);
    case 5:
      return run_tile<5, false, false>(w, b0, b1, groups, bytes, x, sums, out);
    case 6:
      return run_tile<6, false, false>(w, b0, b1, groups, bytes, x, sums, out);
    case 7:
      return run_tile<7, false, false>(w, b0, b1, groups, bytes, x, sums, out);
    default:
      return run_tile<8, false, false>(w, b0, b1, groups, bytes, x, sums, out);
  }
}

#else

GLM5_INLINE bool reads_bytes(int64_t, int64_t) { return false; }
GLM5_INLINE void split(const W4A8Weight&, const Block&, const Block&, Groups, uint8_t*) {}
GLM5_INLINE int32_t start_of(const W4A8Weight& w, bool, int32_t sum) { return w.zeros ? -sum : -8 * sum; }

#if GLM5_ISA_LEVEL == 1

constexpr int64_t kMostRows = 4;
GLM5_INLINE int64_t tile_rows(int64_t, int64_t left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }

// Adds to sums[row][16] of one group. Products of bytes are summed in 16 bits over 32 k at most: 16 times 15 * 128 fit.
template <int kRows>
GLM5_INLINE void add_group(const W4A8Weight& w, const Block& b, int64_t g, const int8_t* x, int32_t* sums) {
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const int64_t lines = group_lines(w);
  for (int half = 0; half < 2 && b.columns > 8 * half; ++half) {
    const __m256i mask = first_n(b.columns - 8 * half);
    const uint8_t* p = b.data + g * b.group_bytes + 32 * half;
    const int8_t* slots = x;
    __m256i acc[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) acc[r] = _mm256_setzero_si256();
    for (int64_t line = 0; line < lines;) {
      __m256i part[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) part[r] = _mm256_setzero_si256();
      for (const int64_t end = line + 4 < lines ? line + 4 : lines; line < end; ++line) {
        const __m256i both = _mm256_maskload_epi32(reinterpret_cast<const int*>(p), mask);
        const __m256i low = _mm256_and_si256(both, nibble), high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          int32_t four[2];
          std::memcpy(&four[0], slots + 4 * r, 4);
          std::memcpy(&four[1], slots + 4 * (kRows + r), 4);
          part[r] = _mm256_add_epi16(part[r], _mm256_maddubs_epi16(low, _mm256_set1_epi32(four[0])));
          part[r] = _mm256_add_epi16(part[r], _mm256_maddubs_epi16(high, _mm256_set1_epi32(four[1])));
        }
        p += b.line_bytes;
        slots += 8 * kRows;
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) acc[r] = _mm256_add_epi32(acc[r], _mm256_madd_epi16(part[r], ones));
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      __m256i* out = reinterpret_cast<__m256i*>(sums + r * kBlock + 8 * half);
      _mm256_storeu_si256(out, _mm256_add_epi32(_mm256_loadu_si256(out), acc[r]));
    }
  }
}

GLM5_INLINE F to_floats(const int32_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

#else

constexpr int64_t kMostRows = 1;
GLM5_INLINE int64_t tile_rows(int64_t, int64_t) { return 1; }

// Adds to sums[16] of one group. A 16-bit lane holds two bytes of a column, four codes; 16 products of 15 * 128 at most fit
// its 16 bits, those of four lines.
template <int kRows>
GLM5_INLINE void add_group(const W4A8Weight& w, const Block& b, int64_t g, const int8_t* x, int32_t* sums) {
  typedef uint16_t Lanes __attribute__((vector_size(16)));
  typedef int16_t Signed __attribute__((vector_size(16)));
  const int64_t lines = group_lines(w);
  const uint8_t* p = b.data + g * b.group_bytes;
  for (int64_t line = 0; line < lines;) {
    Lanes part[4] = {};
    for (const int64_t end = line + 4 < lines ? line + 4 : lines; line < end; ++line, x += kLineK, p += b.line_bytes) {
      Lanes both[4] = {};
      if (b.columns == kBlock) std::memcpy(both, p, 64);
      else std::memcpy(both, p, b.line_bytes);
      Lanes x_at[4];  // of codes 0 and 2, 4 and 6, 1 and 3, 5 and 7
      for (int i = 0; i < 4; ++i) {
        const int first = (i & 1) * 4 + i / 2;
        const uint16_t even = static_cast<uint16_t>(x[first]), odd = static_cast<uint16_t>(x[first + 2]);
        x_at[i] = Lanes{even, odd, even, odd, even, odd, even, odd};
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        part[i] += (both[i] & 15) * x_at[0] + (both[i] >> 4 & 15) * x_at[1] + (both[i] >> 8 & 15) * x_at[2] +
                   (both[i] >> 12) * x_at[3];
    }
    for (int i = 0; i < 4; ++i) {
      Signed wide;
      std::memcpy(&wide, &part[i], 16);
      for (int c = 0; c < 4; ++c) sums[4 * i + c] += wide[2 * c] + wide[2 * c + 1];
    }
  }
}

GLM5_INLINE F to_floats(const int32_t* p) {
  F wide;
  for (int i = 0; i < F::kLanes; ++i) wide.v[i] = static_cast<float>(p[i]);
  return wide;
}

#endif

// simd.h's fma rounds twice in the portable set; here it may not.
GLM5_INLINE F fused(F a, F b, F c) {
#if GLM5_ISA_LEVEL == 0
  for (int i = 0; i < F::kLanes; ++i) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return c;
#else
  return fma(a, b, c);
#endif
}

template <int kRows>
__attribute__((noinline)) void run_tile(const W4A8Weight& w, const Block& b0, const Block& b1, Groups groups,
                                        const int8_t* x, const int32_t* sums, float* out) {
  GLM5_COUNT_PATH("w4a8 nibbles");
  const int64_t group_slots = (w.group_size + 3) / 4 * 4 * kRows;
  for (int64_t g = groups.first; g < groups.last; ++g, sums += kRows, x += group_slots)
    for (int half = 0; half < 2; ++half) {
      const Block& b = half ? b1 : b0;
      int32_t exact[kRows * kBlock] = {};
      for (int r = 0; r < kRows; ++r)
        for (int64_t c = 0; c < b.columns; ++c) exact[r * kBlock + c] = sums[r] * (w.zeros ? b.zeros[g * b.columns + c] : 1);
      add_group<kRows>(w, b, g, x, exact);
      float scales[kBlock];  // they may lie at any byte
      std::memcpy(scales, scales_of(b, g), sizeof(float) * b.columns);
      for (int64_t c = 0; c < b.columns; c += F::kLanes) {
        const F scale = load_n(scales + c, b.columns - c);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          float* row = out + r * kColumns + half * kBlock + c;
          store(row, fused(to_floats(exact + r * kBlock + c), scale, load(row)));
        }
      }
    }
}

GLM5_INLINE void multiply(const W4A8Weight& w, const Block& b0, const Block& b1, Groups groups, const uint8_t*,
                          const int8_t* x, const int32_t* sums, int64_t rows, float* out) {
  switch (rows) {
#if GLM5_ISA_LEVEL == 1
    case 4:
      return run_tile<4>(w, b0, b1, groups, x, sums, out);
    case 2:
      return run_tile<2>(w, b0, b1, groups, x, sums, out);
#endif
    default:
      return run_tile<1>(w, b0, b1, groups, x, sums, out);
  }
}

#endif

}  // namespace
}  // namespace glm5::cpu::GLM5_ISA
