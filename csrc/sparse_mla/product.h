// Register-tiled products C (+)= A B for the plain kernels: A is broadcast, B's rows lie along the lanes. Each element
// of C is one chain of fma over the depth, so that no tile shape, tail or neighbour changes its bits. C is visited row
// after row once a product is known, so that a row may stand in `c` twice.
#pragma once

#include "common/parallel.h"
#include "common/simd.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

enum class Into { store, add, scale_add };  // C = AB, C + AB, C * alpha[row] + AB

template <class S>
struct Product {
  const S* const* a;   // A(m, k) = a[m][k * a_stride]
  int64_t a_stride;
  const S* const* b_rows;  // B(k, n) = b_rows[k][n] where not null, else b[k * ldb + n]
  const S* b;
  int64_t ldb;
  S* const* c;         // C(m, n) = c[m][n]
  Into into;
  const S* alpha;      // [rows], scale_add
};

template <int MR>
GLM5_INLINE const char* path_name(bool wide, bool whole) {
  if (MR == 6) return wide ? "sparse_mla wide tile 6" : whole ? "sparse_mla tile 6" : "sparse_mla masked tile 6";
  if (MR == 4) return wide ? "sparse_mla wide tile 4" : whole ? "sparse_mla tile 4" : "sparse_mla masked tile 4";
  if (MR == 2) return wide ? "sparse_mla wide tile 2" : whole ? "sparse_mla tile 2" : "sparse_mla masked tile 2";
  return wide ? "sparse_mla wide tile 1" : whole ? "sparse_mla tile 1" : "sparse_mla masked tile 1";
}

template <class V, int MR, int NV, bool Gathered>
GLM5_INLINE void tile(const Product<typename V::Scalar>& p, int64_t m0, int64_t n0, int64_t lanes, int64_t k0, int64_t k1) {
  using S = typename V::Scalar;
  constexpr int L = V::kLanes;
  const bool whole = NV > 1 || lanes == L;
  GLM5_COUNT_PATH(path_name<MR>(NV > 1, whole));
  V acc[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[m][v] = splat<V>(0);
  const S* a[MR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) a[m] = p.a[m0 + m];
  if (whole) {
    for (int64_t k = k0; k < k1; ++k) {
      const S* b = (Gathered ? p.b_rows[k] : p.b + k * p.ldb) + n0;
      V bv[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) bv[v] = load(b + v * L);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const V av = splat<V>(a[m][k * p.a_stride]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[m][v] = fma(av, bv[v], acc[m][v]);
      }
    }
  } else {
    for (int64_t k = k0; k < k1; ++k) {
      const V bv = load_n((Gathered ? p.b_rows[k] : p.b + k * p.ldb) + n0, lanes);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) acc[m][0] = fma(splat<V>(a[m][k * p.a_stride]), bv, acc[m][0]);
    }
  }
  const Into into = k0 > 0 ? Into::add : p.into;
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      S* c = p.c[m0 + m] + n0 + v * L;
      V x = acc[m][v];
      if (into == Into::add) x = (whole ? load(c) : load_n(c, lanes)) + x;
      else if (into == Into::scale_add) x = fma(whole ? load(c) : load_n(c, lanes), splat<V>(p.alpha[m0 + m]), x);
      if (whole) store(c, x);
      else store_n(c, x, lanes);
    }
}

#if GLM5_ISA_LEVEL == 2
inline constexpr int kTileRows = 6, kTileVectors = 4;
#elif GLM5_ISA_LEVEL == 1
inline constexpr int kTileRows = 6, kTileVectors = 2;
#else
inline constexpr int kTileRows = 4, kTileVectors = 2;
#endif

template <class V, int NV, bool Gathered>
void column_of_tiles(const Product<typename V::Scalar>& p, int64_t rows, int64_t n0, int64_t lanes, int64_t k0, int64_t k1) {
  int64_t m = 0;
  for (; m + kTileRows <= rows; m += kTileRows) tile<V, kTileRows, NV, Gathered>(p, m, n0, lanes, k0, k1);
  if (kTileRows > 4 && m + 4 <= rows) {
    tile<V, 4, NV, Gathered>(p, m, n0, lanes, k0, k1);
    m += 4;
  }
  if (m + 2 <= rows) {
    tile<V, 2, NV, Gathered>(p, m, n0, lanes, k0, k1);
    m += 2;
  }
  if (m < rows) tile<V, 1, NV, Gathered>(p, m, n0, lanes, k0, k1);
}

// C[rows, cols] from A[rows, depth] and B[depth, cols]. The depth is cut every 128 terms, which keeps float32 sums
// short and the panel of B in the first-level cache.
template <class V, bool Gathered>
void multiply(const Product<typename V::Scalar>& p, int64_t rows, int64_t cols, int64_t depth) {
  constexpr int L = V::kLanes;
  constexpr int64_t kDepth = 128;
  for (int64_t k0 = 0; k0 == 0 || k0 < depth; k0 += kDepth) {
    const int64_t k1 = k0 + kDepth < depth ? k0 + kDepth : depth;
    int64_t n = 0;
    for (; n + kTileVectors * L <= cols; n += kTileVectors * L)
      column_of_tiles<V, kTileVectors, Gathered>(p, rows, n, L, k0, k1);
    for (; n < cols; n += L) column_of_tiles<V, 1, Gathered>(p, rows, n, cols - n < L ? cols - n : L, k0, k1);
  }
}

}  // namespace
}  // namespace glm5::cpu::GLM5_ISA
