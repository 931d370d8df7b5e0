// The matrix product under dense attention: rows of A, read element by element and broadcast, times B, packed so that
// a vector holds one element (AVX-512 bf16: one pair of elements) of k for as many columns as it has lanes. Every value
// of the result is one sum in the order of k, whatever tile computes it. Knows nothing about attention.
#pragma once

#include "common/parallel.h"
#include "common/simd.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

// What a product reads for storage type T. Only AVX-512 multiplies bf16; the others widen it while packing.
template <class T> struct OperandFor { using Type = T; };
#if GLM5_ISA_LEVEL < 2
template <> struct OperandFor<bf16> { using Type = float; };
#endif
template <class T> using Operand = typename OperandFor<T>::Type;

// Elements of k that one multiply-add takes.
template <class E> inline constexpr int kPair = sizeof(E) == 2 ? 2 : 1;
// The register tile: rows times vectors of columns, within 32 vector registers (AVX-512) or 16.
inline constexpr int kTileRows = 6, kTileVectors = GLM5_ISA_LEVEL == 2 ? 4 : 2;
// Columns of a packed panel; B is [panel][ceil(k / kPair)][kPanel][kPair].
template <class E> inline constexpr int kPanel = kTileVectors * Vector<E>::kLanes;

GLM5_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
GLM5_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
GLM5_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <class E> GLM5_INLINE int64_t panel_stride(int64_t k) { return round_up(k, kPair<E>) * kPanel<E>; }
// Elements of B for `columns` columns.
template <class E> GLM5_INLINE int64_t packed_size(int64_t columns, int64_t k) {
  return round_up(columns, kPanel<E>) / kPanel<E> * panel_stride<E>(k);
}

GLM5_INLINE float natural_log(float x) { return __builtin_logf(x); }
GLM5_INLINE double natural_log(double x) { return __builtin_log(x); }

// Carves arrays out of one buffer of this thread. Used twice: on a null buffer it only counts.
struct Carver {
  char* base;
  size_t used = 0;
  template <class X> X* take(int64_t count) {
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
      for (int j = 0; j < C; ++j)
        store(c + r * ldc + j * L, lanes(c + r * ldc + j * L) + sums[r][j]);
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

// C [rows][vectors * lanes] = A [rows][k] times B; A may be read up to the next even k. `stride` is B's panel stride.
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

template <class E, class T> GLM5_INLINE E as_operand(T x) {
  if constexpr (sizeof(E) == sizeof(T)) return x;
  else return to_float(x);
}

// Packs B whose columns are rows of `src` ([columns][k], rows `stride` apart). Missing lanes and the odd k are zeros.
template <class E, class T>
void pack_transposed(E* dst, int64_t dst_stride, const T* src, int64_t stride, int64_t columns, int64_t k) {
  constexpr int L = Vector<E>::kLanes, P = kPair<E>, W = kPanel<E>;
  for (int64_t first = 0; first < columns; first += L) {
    E* out = dst + first / W * dst_stride + first % W * P;
    const int64_t n = smaller(L, columns - first);
    for (int64_t i = 0; i < k; i += P, out += W * P)
      for (int64_t j = 0; j < L; ++j)
        for (int p = 0; p < P; ++p)
          out[j * P + p] = j < n && i + p < k ? as_operand<E>(src[(first + j) * stride + i + p]) : E{};
  }
}

// Packs B whose rows are rows of `src` ([k][columns], rows `stride` apart). Missing lanes and the odd k are zeros.
template <class E, class T>
void pack_rows(E* dst, int64_t dst_stride, const T* src, int64_t stride, int64_t k, int64_t columns) {
  constexpr int L = Vector<E>::kLanes, P = kPair<E>, W = kPanel<E>;
  for (int64_t i = 0; i < k; i += P)
    for (int64_t first = 0; first < columns; first += L) {
      E* out = dst + first / W * dst_stride + i * W + first % W * P;
      const int64_t n = smaller(L, columns - first);
      for (int64_t j = 0; j < L; ++j)
        for (int p = 0; p < P; ++p)
          out[j * P + p] = j < n && i + p < k ? as_operand<E>(src[(i + p) * stride + first + j]) : E{};
    }
}

// A: rows of `src` in the operand's type, each `width` elements long, zeros beyond `columns`.
template <class E, class T>
void copy_rows(E* dst, int64_t width, const T* src, int64_t stride, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    E* out = dst + r * width;
    for (int64_t i = 0; i < columns; ++i) out[i] = as_operand<E>(src[r * stride + i]);
    for (int64_t i = columns; i < width; ++i) out[i] = E{};
  }
}

}  // namespace
}  // namespace glm5::cpu::GLM5_ISA
