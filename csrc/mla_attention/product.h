// The matrix product under dense attention: rows of A, read element by element and broadcast, times B, packed so that
// a vector holds one element (AVX-512 bf16: one pair of elements) of k for as many columns as it has lanes. Every value
// of the result is one sum in the order of k, whatever tile computes it. Knows nothing about attention.
#pragma once

#include "common/parallel.h"
#include "common/simd.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

// What a product reads for storage type T. Only AVX-512 multiplies bf16; the others widen it while packing.
template <class T>
struct OperandFor {
  using Type = T;
};
#if GLM5_ISA_LEVEL < 2
template <>
struct OperandFor<bf16> {
  using Type = float;
};
#endif
template <class T>
using Operand = typename OperandFor<T>::Type;

// Whether products of E run on the AMX tile unit: bf16, in the files compiled for it.
#ifdef GLM5_MLA_TILES
template <class E>
inline constexpr bool kTiles = sizeof(E) == 2;
#else
template <class E>
inline constexpr bool kTiles = false;
#endif

// Elements of k that one multiply-add takes.
template <class E>
inline constexpr int kPair = sizeof(E) == 2 ? 2 : 1;
// A product reads k, and the rows of A and C, up to a multiple of these. A tile takes 32 of k whatever the count: both
// operands hold zeros there. What it computes for rows beyond the count is never looked at, but needs its place in C.
template <class E>
inline constexpr int kStep = kTiles<E> ? 32 : kPair<E>;
template <class E>
inline constexpr int kRowStep = kTiles<E> ? 16 : 1;
// The register tile: rows times vectors of columns, within 32 vector registers (AVX-512) or 16.
#ifdef GLM5_MLA_TILES
inline constexpr int kTileRows = 6, kTileVectors = 2;  // a panel is as wide as two tiles: what a step reads is contiguous
#else
inline constexpr int kTileRows = 6, kTileVectors = GLM5_ISA_LEVEL == 2 ? 4 : 2;
#endif
// Columns of a packed panel; B is [panel][k / kPair, up to kStep][kPanel][kPair].
template <class E>
inline constexpr int kPanel = kTileVectors * Vector<E>::kLanes;

GLM5_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
GLM5_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
GLM5_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <class E>
GLM5_INLINE int64_t panel_stride(int64_t k) {
  return round_up(k, kStep<E>) * kPanel<E>;
}
// Elements of B for `columns` columns.
template <class E>
GLM5_INLINE int64_t packed_size(int64_t columns, int64_t k) {
  return round_up(columns, kPanel<E>) / kPanel<E> * panel_stride<E>(k);
}

// Carves arrays out of one buffer of this thread. Used twice: on a null buffer it only counts.
struct Carver {
  char* base;
  size_t used = 0;
  template <class X>
  X* take(int64_t count) {
    X* p = base ? reinterpret_cast<X*>(base + used) : nullptr;
    used += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(X)), 64));
    return p;
  }
};

GLM5_INLINE F lanes(const float* p) { return load(p); }
GLM5_INLINE F broadcast(const float* p) { return splat<F>(*p); }
GLM5_INLINE F multiply_add(F a, F b, F sum) { return fma(a, b, sum); }
#if GLM5_ISA_LEVEL == 0
GLM5_INLINE D lanes(const double* p) { return load_n(p, 2); }
GLM5_INLINE D broadcast(const double* p) { return splat<D>(*p); }
GLM5_INLINE D multiply_add(D a, D b, D sum) { return fma(a, b, sum); }
#elif GLM5_ISA_LEVEL == 2
struct Pairs {
  __m512i v;
};
GLM5_INLINE Pairs lanes(const bf16* p) { return {_mm512_loadu_si512(p)}; }
GLM5_INLINE Pairs broadcast(const bf16* p) {
  int32_t pair;
  std::memcpy(&pair, p, 4);
  return {_mm512_set1_epi32(pair)};
}
// The first element of each pair alone: the last k of an odd count.
GLM5_INLINE Pairs first_lanes(const bf16* p) { return {_mm512_and_si512(lanes(p).v, _mm512_set1_epi32(0xffff))}; }
GLM5_INLINE Pairs first_broadcast(const bf16* p) { return {_mm512_set1_epi32(p->bits)}; }
GLM5_INLINE F multiply_add(Pairs a, Pairs b, F sum) {
  return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
#endif

// What a product does to C: replaces it, goes on summing from it, or adds its own sum to it.
enum class Into { replace, resume, add };

// Names of the tiles for the path counter, by rows and vectors of columns.
inline constexpr const char* kTileNames[7][5] = {
    {},
    {"", "mla product 1x1", "mla product 1x2", "", "mla product 1x4"},
    {"", "mla product 2x1", "mla product 2x2", "", "mla product 2x4"},
    {},
    {"", "mla product 4x1", "mla product 4x2", "", "mla product 4x4"},
    {},
    {"", "mla product 6x1", "mla product 6x2", "", "mla product 6x4"},
};

template <class E, int R, int C>
__attribute__((noinline)) void product_tile(int64_t k, const E* a, int64_t lda, const E* b, Acc<E>* c, int64_t ldc,
                                            Into into) {
  using V = Vector<E>;
  constexpr int L = V::kLanes, P = kPair<E>, W = kPanel<E>;
  GLM5_COUNT_PATH(kTileNames[R][C]);
  V sums[R][C];
  if (into == Into::resume) {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) sums[r][j] = lanes(c + r * ldc + j * L);
  } else {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) sums[r][j] = splat<V>(0);
  }
  const E* end = a + k / P * P;
  for (; a != end; a += P, b += W * P) {
    decltype(lanes(b)) columns[C];
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) columns[j] = lanes(b + j * L * P);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const auto row = broadcast(a + r * lda);
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) sums[r][j] = multiply_add(row, columns[j], sums[r][j]);
    }
  }
  if constexpr (P == 2) {
    if (k % 2) {
      GLM5_COUNT_PATH("mla product odd k");
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) {
        const auto column = first_lanes(b + j * L * P);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) sums[r][j] = multiply_add(first_broadcast(a + r * lda), column, sums[r][j]);
      }
    }
  }
  if (into == Into::add) {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) store(c + r * ldc + j * L, lanes(c + r * ldc + j * L) + sums[r][j]);
  } else {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) store(c + r * ldc + j * L, sums[r][j]);
  }
}

template <class E, int C>
void product_rows(int64_t rows, int64_t k, const E* a, int64_t lda, const E* b, Acc<E>* c, int64_t ldc, Into into) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6) product_tile<E, 6, C>(k, a + r * lda, lda, b, c + r * ldc, ldc, into);
  if (r + 4 <= rows) {
    product_tile<E, 4, C>(k, a + r * lda, lda, b, c + r * ldc, ldc, into);
    r += 4;
  }
  if (r + 2 <= rows) {
    product_tile<E, 2, C>(k, a + r * lda, lda, b, c + r * ldc, ldc, into);
    r += 2;
  }
  if (r < rows) product_tile<E, 1, C>(k, a + r * lda, lda, b, c + r * ldc, ldc, into);
}

// C [rows][vectors * lanes] = A [rows][k] times B; `stride` is B's panel stride.
template <class E>
void product(int64_t rows, int64_t vectors, int64_t k, const E* a, int64_t lda, const E* b, int64_t stride, Acc<E>* c,
             int64_t ldc, Into into) {
  constexpr int L = Vector<E>::kLanes, P = kPair<E>;
  for (int64_t v = 0; v < vectors; v += kTileVectors, b += stride, c += kTileVectors * L) {
    const int64_t n = smaller(kTileVectors, vectors - v);
    if constexpr (kTileVectors == 4) {
      if (n == 4) {
        product_rows<E, 4>(rows, k, a, lda, b, c, ldc, into);
        continue;
      }
    }
    if (n >= 2) product_rows<E, 2>(rows, k, a, lda, b, c, ldc, into);
    if (n % 2) product_rows<E, 1>(rows, k, a, lda, b + (n - 1) * L * P, c + (n - 1) * L, ldc, into);
  }
}

#ifdef GLM5_MLA_TILES
// Makes the tile registers of this thread 16 rows of 64 bytes each while it lives.
struct TileSession {
  TileSession() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
    // GCC 12's intrinsic names 8 bytes of the configuration as its input; without this the other stores are dropped.
    __asm__ volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~TileSession() { _tile_release(); }
};

// 16 R rows times 16 C columns, the sums in tiles 0 to 3.
template <int R, int C>
__attribute__((noinline)) void tile_product(int64_t k, const bf16* a, int64_t lda, const bf16* b, float* c, int64_t ldc,
                                            bool resume) {
  GLM5_COUNT_PATH(R == 2 ? (C == 2 ? "mla tiles 2x2" : "mla tiles 2x1") : (C == 2 ? "mla tiles 1x2" : "mla tiles 1x1"));
  constexpr int64_t kRowBytes = kPanel<bf16> * 4;
  const int64_t a_bytes = lda * 2, c_bytes = ldc * 4;
  if (resume) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (C == 2) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (R == 2) _tile_loadd(2, c + 16 * ldc, c_bytes);
    if constexpr (R == 2 && C == 2) _tile_loadd(3, c + 16 * ldc + 16, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (C == 2) _tile_zero(1);
    if constexpr (R == 2) _tile_zero(2);
    if constexpr (R == 2 && C == 2) _tile_zero(3);
  }
  for (int64_t i = 0; i < k; i += 32, a += 32, b += 16 * kRowBytes / 2) {
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(6, b, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (C == 2) {
      _tile_loadd(7, b + 32, kRowBytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R == 2) {
      _tile_loadd(5, a + 16 * lda, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (C == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (C == 2) _tile_stored(1, c + 16, c_bytes);
  if constexpr (R == 2) _tile_stored(2, c + 16 * ldc, c_bytes);
  if constexpr (R == 2 && C == 2) _tile_stored(3, c + 16 * ldc + 16, c_bytes);
}

template <>
void product<bf16>(int64_t rows, int64_t vectors, int64_t k, const bf16* a, int64_t lda, const bf16* b, int64_t stride,
                   float* c, int64_t ldc, Into into) {
  const bool resume = into != Into::replace;
  for (int64_t v = 0; v < vectors; v += 2, b += stride, c += 32) {
    const auto tile = v + 1 < vectors ? tile_product<2, 2> : tile_product<2, 1>;
    const auto half = v + 1 < vectors ? tile_product<1, 2> : tile_product<1, 1>;
    for (int64_t r = 0; r < rows; r += 32) (r + 16 < rows ? tile : half)(k, a + r * lda, lda, b, c + r * ldc, ldc, resume);
  }
}
#else
struct TileSession {
  TileSession() {}
};
#endif

template <class E, class T>
GLM5_INLINE E as_operand(T x) {
  if constexpr (sizeof(E) == sizeof(T)) return x;
  else return to_float(x);
}

#if GLM5_ISA_LEVEL == 2
// 16 x 16 values of 32 bits: rows become columns.
GLM5_INLINE void transpose(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i ab_even = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), ab_odd = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    const __m512i cd_even = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    const __m512i cd_odd = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    t[i] = _mm512_shuffle_i32x4(ab_even, cd_even, 0x88);
    t[i + 8] = _mm512_shuffle_i32x4(ab_even, cd_even, 0xdd);
    t[i + 4] = _mm512_shuffle_i32x4(ab_odd, cd_odd, 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(ab_odd, cd_odd, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// 64 bytes of each of 16 rows, transposed: `n` rows are there, `k` elements of each; the rest are zeros.
template <class T>
GLM5_INLINE void load_transposed(__m512i (&r)[16], const T* src, int64_t stride, int64_t n, int64_t k) {
#pragma GCC unroll 16
  for (int j = 0; j < 16; ++j) {
    if (j >= n) r[j] = _mm512_setzero_si512();
    else if constexpr (sizeof(T) == 2) r[j] = _mm512_maskz_loadu_epi16(k >= 32 ? ~0u : (1u << k) - 1u, src + j * stride);
    else r[j] = _mm512_maskz_loadu_epi32(first_n(k), src + j * stride);
  }
  transpose(r);
}
#endif

// Packs B whose columns are rows of `src` ([columns][k], rows `stride` apart). Missing lanes and k are zeros.
template <class E, class T, int W = kPanel<E>>
void pack_transposed(E* dst, int64_t dst_stride, const T* src, int64_t stride, int64_t columns, int64_t k) {
  constexpr int L = Vector<E>::kLanes, P = kPair<E>;
  const int64_t whole = round_up(k, kStep<E>);
  for (int64_t first = 0; first < columns; first += L) {
    E* out = dst + first / W * dst_stride + first % W * P;
    const int64_t n = smaller(L, columns - first);
#if GLM5_ISA_LEVEL == 2
    for (int64_t i = 0; i < whole; i += 16 * P) {
      __m512i r[16];
      load_transposed(r, src + first * stride + i, stride, n, larger(k - i, 0));
      const int64_t count = smaller(16, (whole - i) / P);
      for (int64_t j = 0; j < count; ++j, out += W * P) _mm512_storeu_si512(out, r[j]);
    }
#else
    for (int64_t i = 0; i < whole; ++i, out += W)
      for (int64_t j = 0; j < L; ++j) out[j] = j < n ? as_operand<E>(src[(first + j) * stride + i]) : E{};
#endif
  }
}

// Packs B whose rows are rows of `src` ([k][columns], rows `stride` apart). Missing lanes and k are zeros.
template <class E, class T, int W = kPanel<E>>
void pack_rows(E* dst, int64_t dst_stride, const T* src, int64_t stride, int64_t k, int64_t columns) {
  constexpr int L = Vector<E>::kLanes, P = kPair<E>;
  for (int64_t i = 0; i < round_up(k, kStep<E>); i += P)
    for (int64_t first = 0; first < columns; first += L) {
      E* out = dst + first / W * dst_stride + i * W + first % W * P;
      const int64_t n = columns - first;
      const T* row = src + i * stride + first;
      if constexpr (P == 2) {
#if GLM5_ISA_LEVEL == 2
        const __m256i none = _mm256_setzero_si256();
        const __m256i even = i < k ? _mm256_maskz_loadu_epi16(first_n(n), row) : none;
        const __m256i odd = i + 1 < k ? _mm256_maskz_loadu_epi16(first_n(n), row + stride) : none;
        _mm512_storeu_si512(out,
                            _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16)));
#endif
      } else {
        store(out, load_n(row, n));
      }
    }
}

// A: rows of `src` in the operand's type, each `width` elements long, zeros beyond `columns`.
template <class E, class T>
void copy_rows(E* dst, int64_t width, const T* src, int64_t stride, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    E* out = dst + r * width;
    if constexpr (sizeof(E) == sizeof(T)) std::memcpy(out, src + r * stride, static_cast<size_t>(columns) * sizeof(E));
    else
      for (int64_t i = 0; i < columns; ++i) out[i] = to_float(src[r * stride + i]);
    for (int64_t i = columns; i < width; ++i) out[i] = E{};
  }
}

// A: columns of `src` ([rows][columns] contiguous) as rows, `width` apart, zeros beyond `rows`.
template <class E>
void copy_columns(E* dst, int64_t width, const E* src, int64_t src_width, int64_t rows, int64_t columns) {
#if GLM5_ISA_LEVEL == 2
  if constexpr (sizeof(E) == 2) {
    for (int64_t i = 0; i < columns; i += 32)
      for (int64_t first = 0; first < width; first += 16) {
        __m512i r[16];
        load_transposed(r, src + first * src_width + i, src_width, rows - first, columns - i);
        const __mmask16 keep = first_n(width - first);
        for (int64_t j = 0; j < 16; ++j) {
          bf16* out = dst + (i + 2 * j) * width + first;
          if (i + 2 * j < columns) _mm256_mask_storeu_epi16(out, keep, _mm512_cvtepi32_epi16(r[j]));
          if (i + 2 * j + 1 < columns)
            _mm256_mask_storeu_epi16(out + width, keep, _mm512_cvtepi32_epi16(_mm512_srli_epi32(r[j], 16)));
        }
      }
    return;
  }
#endif
  for (int64_t i = 0; i < columns; ++i)
    for (int64_t r = 0; r < width; ++r) dst[i * width + r] = r < rows ? src[r * src_width + i] : E{};
}

}  // namespace
}  // namespace glm5::cpu::GLM5_ISA
