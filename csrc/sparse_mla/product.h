// The register-tiled products of the plain kernels. Rows of heads and keys lie as the tensors have them, dimensions along
// the lanes; nothing is transposed and no head is padded, so that one head and eight use the lanes as fully as 64.
//
//   dots      S[head][key] = q[head] . row[key]. A lane sums every kLanes-th dimension; the lanes of a tile's sums are then
//             added by one tree, which is the same for every place in a tile.
//   weighted  C[head] = sum over keys of A[head][key] row[key], keys in order: one chain of fma.
//   scatter   C[key] += sum over heads of A[key][head] B[head]: one chain of fma, then one addition to memory.
//
// So no tile shape, tail or neighbour changes the bits of an element.
#pragma once

#include "common/parallel.h"
#include "common/simd.h"
#include "sparse_mla/sparse_mla.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int64_t kBlock = kSparseMlaBlock;  // keys of a block: scores are [head][kBlock]
constexpr int64_t kSpareRows = 16;           // a block's row pointers are followed by so many more that may be read

// ---- dots ---------------------------------------------------------------------------------------------------------

#if GLM5_ISA_LEVEL == 1
// Lane i of the result: the sum over the lanes of x[i].
GLM5_INLINE __m128 sum_each_of_4(const F* x) {
  const __m256d a = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(x[0].v, x[1].v), _mm256_unpackhi_ps(x[0].v, x[1].v)));
  const __m256d b = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(x[2].v, x[3].v), _mm256_unpackhi_ps(x[2].v, x[3].v)));
  const __m256 s = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}
#else
// Lane i of the result: the sum over the lanes of x[i].
template <class V>
GLM5_INLINE V sum_each(const V* x) {
  typename V::Scalar s[V::kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < V::kLanes; ++i) s[i] = sum(x[i]);
  return load(s);
}
#if GLM5_ISA_LEVEL == 2
template <>
GLM5_INLINE F sum_each<F>(const F* x) {
  __m512 quarter[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m512d half[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512 a = x[4 * i + 2 * j].v, b = x[4 * i + 2 * j + 1].v;
      half[j] = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    }
    quarter[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(half[0], half[1])),
                               _mm512_castpd_ps(_mm512_unpackhi_pd(half[0], half[1])));
  }
  const __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(quarter[0], quarter[1], 0x88),
                                 _mm512_shuffle_f32x4(quarter[0], quarter[1], 0xdd));
  const __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(quarter[2], quarter[3], 0x88),
                                 _mm512_shuffle_f32x4(quarter[2], quarter[3], 0xdd));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd))};
}
#endif
#endif

// Scores of HT heads and KT keys, to out[head][key]; every other row of `next` is fetched meanwhile.
template <class V, int HT, int KT, bool Fetch>
GLM5_INLINE void dots_tile_of(const typename V::Scalar* const* rows, const typename V::Scalar* q, int64_t dim,
                              typename V::Scalar* out, const typename V::Scalar* const* next, const char* name) {
  using S = typename V::Scalar;
  constexpr int L = V::kLanes, kPairs = HT * KT;
  static_assert(kPairs % 4 == 0);
  GLM5_COUNT_PATH(name);
  V acc[kPairs];
#pragma GCC unroll 16
  for (int i = 0; i < kPairs; ++i) acc[i] = splat<V>(0);
  const S* row[KT];
#pragma GCC unroll 16
  for (int k = 0; k < KT; ++k) row[k] = rows[k];
  const S* fetch[KT / 2];
#pragma GCC unroll 8
  for (int k = 0; k < KT / 2; ++k) fetch[k] = Fetch ? next[2 * k] : nullptr;
  int64_t d = 0;
  for (; d + L <= dim; d += L) {
    if constexpr (Fetch) {
#pragma GCC unroll 8
      for (int k = 0; k < KT / 2; ++k) __builtin_prefetch(fetch[k] + d, 0, 2);
    }
    V x[HT];
#pragma GCC unroll 4
    for (int h = 0; h < HT; ++h) x[h] = load(q + h * dim + d);
#pragma GCC unroll 16
    for (int k = 0; k < KT; ++k) {
      const V y = load(row[k] + d);
#pragma GCC unroll 4
      for (int h = 0; h < HT; ++h) acc[h * KT + k] = fma(x[h], y, acc[h * KT + k]);
    }
  }
  if (d < dim) {
    V x[HT];
#pragma GCC unroll 4
    for (int h = 0; h < HT; ++h) x[h] = load_n(q + h * dim + d, dim - d);
#pragma GCC unroll 16
    for (int k = 0; k < KT; ++k) {
      const V y = load_n(row[k] + d, dim - d);
#pragma GCC unroll 4
      for (int h = 0; h < HT; ++h) acc[h * KT + k] = fma(x[h], y, acc[h * KT + k]);
    }
  }
  S total[kPairs];
#if GLM5_ISA_LEVEL == 1
#pragma GCC unroll 4
  for (int i = 0; i < kPairs; i += 4) _mm_storeu_ps(total + i, sum_each_of_4(acc + i));
#else
#pragma GCC unroll 8
  for (int i = 0; i < kPairs; i += L) store(total + i, sum_each<V>(acc + i));
#endif
#pragma GCC unroll 4
  for (int h = 0; h < HT; ++h) std::memcpy(out + h * kBlock, total + h * KT, KT * sizeof(S));
}

template <class V, int HT, int KT>
GLM5_INLINE void dots_tile(const typename V::Scalar* const* rows, const typename V::Scalar* q, int64_t dim,
                           typename V::Scalar* out, const typename V::Scalar* const* next, const char* name) {
  if (next) dots_tile_of<V, HT, KT, true>(rows, q, dim, out, next, name);
  else dots_tile_of<V, HT, KT, false>(rows, q, dim, out, next, name);
}

struct DotsTile {
  int heads, keys;
  const char* name;
};
#if GLM5_ISA_LEVEL == 2
inline constexpr DotsTile kDotsTiles[] = {
    {4, 4, "sparse_mla dots 4x4"}, {2, 8, "sparse_mla dots 2x8"}, {1, 16, "sparse_mla dots 1x16"}};
#else
inline constexpr DotsTile kDotsTiles[] = {
    {3, 4, "sparse_mla dots 3x4"}, {2, 4, "sparse_mla dots 2x4"}, {1, 8, "sparse_mla dots 1x8"}};
#endif
// Heads whose q stays in the first-level cache while the keys pass.
inline constexpr int64_t kDotsGroup = 2 * kDotsTiles[0].heads;

// Heads [h, end) as far as they fill tiles of this shape; returns the first one left.
template <class V, int Shape>
GLM5_INLINE int64_t dots_tiles(const typename V::Scalar* const* rows, int64_t keys, const typename V::Scalar* q, int64_t h,
                               int64_t end, int64_t dim, typename V::Scalar* out, const typename V::Scalar* const* next) {
  constexpr DotsTile tile = kDotsTiles[Shape];
  const int64_t stop = h + (end - h) / tile.heads * tile.heads;
  if (h == stop) return h;
  for (int64_t k = 0; k < keys; k += tile.keys)
    for (int64_t g = h; g < stop; g += tile.heads)
      // The first tile of these keys fetches.
      dots_tile<V, tile.heads, tile.keys>(rows + k, q + g * dim, dim, out + g * kBlock + k,
                                          g == 0 && next ? next + k : nullptr, tile.name);
  return stop;
}

// out[head][0, keys) of q [heads][dim] and the first dim of each row. What follows in out, up to kBlock, is overwritten.
// Every other row of `next`, where not null, is fetched into the second-level cache meanwhile.
template <class V>
void dots(const typename V::Scalar* const* rows, int64_t keys, const typename V::Scalar* q, int64_t heads, int64_t dim,
          typename V::Scalar* out, const typename V::Scalar* const* next) {
  for (int64_t h = 0; h < heads;) {
    const int64_t end = h + kDotsGroup < heads ? h + kDotsGroup : heads;
    h = dots_tiles<V, 0>(rows, keys, q, h, end, dim, out, next);
    h = dots_tiles<V, 1>(rows, keys, q, h, end, dim, out, next);
    h = dots_tiles<V, 2>(rows, keys, q, h, end, dim, out, next);
  }
}

// ---- weighted -----------------------------------------------------------------------------------------------------

enum class Into { store, add, scale_add };  // C = AB, C + AB, C * alpha[head] + AB

template <class S>
struct Weighted {
  const S* a;               // A(head, key) = a[head * kBlock + key]
  const S* const* rows;     // [keys]
  int64_t keys;
  S* c;                     // C(head, n) = c[head * ldc + n]
  int64_t ldc;
  Into into;
  const S* alpha;           // [heads], scale_add
  const S* const* next;  // [keys] rows to fetch into the second-level cache meanwhile, or null
  int64_t every;         // 1: all of them, 2: every other
};

template <class V, int HT, int NV, bool Whole>
GLM5_INLINE void weighted_tile(const Weighted<typename V::Scalar>& w, int64_t h0, int64_t n0, int64_t lanes,
                               const char* name) {
  using S = typename V::Scalar;
  constexpr int L = V::kLanes;
  GLM5_COUNT_PATH(name);
  V acc[HT][NV];
#pragma GCC unroll 8
  for (int h = 0; h < HT; ++h)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[h][v] = splat<V>(0);
  const S* a = w.a + h0 * kBlock;
  const bool fetch = h0 == 0 && w.next;
  const int64_t skip = w.every - 1;
  for (int64_t k = 0; k < w.keys; ++k) {
    const S* b = w.rows[k] + n0;
    if (fetch && (k & skip) == 0) {
      const char* next = reinterpret_cast<const char*>(w.next[k] + n0);
#pragma GCC unroll 8
      for (int line = 0; line < (NV * L * static_cast<int>(sizeof(S)) + 63) / 64; ++line)
        __builtin_prefetch(next + line * 64, 0, 2);
    }
    V bv[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) bv[v] = Whole ? load(b + v * L) : load_n(b, lanes);
#pragma GCC unroll 8
    for (int h = 0; h < HT; ++h) {
      const V av = splat<V>(a[h * kBlock + k]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[h][v] = fma(av, bv[v], acc[h][v]);
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < HT; ++h) {
    S* c = w.c + (h0 + h) * w.ldc + n0;
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      V x = acc[h][v];
      if (w.into == Into::add) x = (Whole ? load(c + v * L) : load_n(c, lanes)) + x;
      else if (w.into == Into::scale_add) x = fma(Whole ? load(c + v * L) : load_n(c, lanes), splat<V>(w.alpha[h0 + h]), x);
      if (Whole) store(c + v * L, x);
      else store_n(c, x, lanes);
    }
  }
}

template <class V, int HT, int NV>
GLM5_INLINE void weighted_heads(const Weighted<typename V::Scalar>& w, int64_t h0, int64_t cols, const char* wide,
                                const char* narrow, const char* masked) {
  constexpr int L = V::kLanes;
  int64_t n = 0;
  for (; n + NV * L <= cols; n += NV * L) weighted_tile<V, HT, NV, true>(w, h0, n, L, wide);
  for (; n + L <= cols; n += L) weighted_tile<V, HT, 1, true>(w, h0, n, L, narrow);
  if (n < cols) weighted_tile<V, HT, 1, false>(w, h0, n, cols - n, masked);
}

#if GLM5_ISA_LEVEL == 2
inline constexpr int kMostHeads = 8, kVectorsOf8 = 3, kVectorsOf4 = 4, kVectorsOf2 = 8, kVectorsOf1 = 8;
#elif GLM5_ISA_LEVEL == 1
inline constexpr int kMostHeads = 4, kVectorsOf8 = 1, kVectorsOf4 = 3, kVectorsOf2 = 4, kVectorsOf1 = 8;
#else
inline constexpr int kMostHeads = 4, kVectorsOf8 = 1, kVectorsOf4 = 2, kVectorsOf2 = 4, kVectorsOf1 = 8;
#endif

#define GLM5_WEIGHTED(heads) \
  weighted_heads<V, heads, kVectorsOf##heads>(w, h, cols, "sparse_mla weighted " #heads, \
                                              "sparse_mla narrow weighted " #heads, "sparse_mla masked weighted " #heads)
template <class V>
void weighted(const Weighted<typename V::Scalar>& w, int64_t heads, int64_t cols) {
  int64_t h = 0;
  if constexpr (kMostHeads == 8)
    for (; h + 8 <= heads; h += 8) GLM5_WEIGHTED(8);
  for (; h + 4 <= heads; h += 4) GLM5_WEIGHTED(4);
  if (h + 2 <= heads) {
    GLM5_WEIGHTED(2);
    h += 2;
  }
  if (h < heads) GLM5_WEIGHTED(1);
}
#undef GLM5_WEIGHTED

// ---- scatter ------------------------------------------------------------------------------------------------------

// C(key) += sum over heads of ds(key, head) q[head] (`dim` wide) + p(key, head) dout[head] (`value_dim` wide). A key may
// come twice: C is visited key after key once a tile's product is known.
template <class S>
struct Scatter {
  const S *ds, *p;         // (key, head) at [at[key] + head * kBlock]
  const int64_t* at;       // [keys]
  const S *q, *dout;       // [heads][dim], [heads][value_dim]
  int64_t heads, dim, value_dim;
  S* const* c;             // [keys]
  const S *next_q, *next_dout;  // what is fetched into the second-level cache meanwhile, or null
};

template <class V, int MR, int NV, bool Whole>
GLM5_INLINE void scatter_tile(const Scatter<typename V::Scalar>& s, bool both, int64_t m0, int64_t n0, int64_t lanes,
                              const char* name) {
  using S = typename V::Scalar;
  constexpr int L = V::kLanes;
  GLM5_COUNT_PATH(name);
  V acc[MR][NV];
  int64_t at[MR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    at[m] = s.at[m0 + m];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[m][v] = splat<V>(0);
  }
  const auto add = [&](const S* a, const S* b, int64_t ldb) __attribute__((always_inline)) {
    for (int64_t h = 0; h < s.heads; ++h, a += kBlock, b += ldb) {
      V bv[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) bv[v] = Whole ? load(b + v * L) : load_n(b, lanes);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const V av = splat<V>(a[at[m]]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[m][v] = fma(av, bv[v], acc[m][v]);
      }
    }
  };
  add(s.ds, s.q + n0, s.dim);
  if (both) add(s.p, s.dout + n0, s.value_dim);
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    S* c = s.c[m0 + m] + n0;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      if (Whole) store(c + v * L, load(c + v * L) + acc[m][v]);
      else store_n(c, load_n(c, lanes) + acc[m][v], lanes);
    }
  }
}

#if GLM5_ISA_LEVEL == 2
inline constexpr int kScatterKeys = 6, kScatterVectors = 4;
#elif GLM5_ISA_LEVEL == 1
inline constexpr int kScatterKeys = 6, kScatterVectors = 2;
#else
inline constexpr int kScatterKeys = 4, kScatterVectors = 2;
#endif

template <class V, int NV, bool Whole>
void scatter_columns(const Scatter<typename V::Scalar>& s, bool both, int64_t keys, int64_t n0, int64_t lanes) {
  constexpr int L = V::kLanes, kM = kScatterKeys;
  if (s.next_q)
    for (int64_t h = 0; h < s.heads; ++h)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        __builtin_prefetch(s.next_q + h * s.dim + n0 + v * L, 0, 2);
        if (both) __builtin_prefetch(s.next_dout + h * s.value_dim + n0 + v * L, 0, 2);
      }
  const auto name = [](const char* wide, const char* narrow, const char* masked) {
    return NV > 1 ? wide : Whole ? narrow : masked;
  };
  int64_t m = 0;
  for (; m + kM <= keys; m += kM)
    scatter_tile<V, kM, NV, Whole>(s, both, m, n0, lanes,
                                   name("sparse_mla scatter", "sparse_mla narrow scatter", "sparse_mla masked scatter"));
  for (; m + 2 <= keys; m += 2)
    scatter_tile<V, 2, NV, Whole>(
        s, both, m, n0, lanes, name("sparse_mla scatter 2", "sparse_mla narrow scatter 2", "sparse_mla masked scatter 2"));
  if (m < keys)
    scatter_tile<V, 1, NV, Whole>(
        s, both, m, n0, lanes, name("sparse_mla scatter 1", "sparse_mla narrow scatter 1", "sparse_mla masked scatter 1"));
}

template <class V>
void scatter(const Scatter<typename V::Scalar>& s, int64_t keys) {
  constexpr int L = V::kLanes, NV = kScatterVectors;
  const auto columns = [&](bool both, int64_t n, int64_t end) {
    for (; n + NV * L <= end; n += NV * L) scatter_columns<V, NV, true>(s, both, keys, n, L);
    for (; n + L <= end; n += L) scatter_columns<V, 1, true>(s, both, keys, n, L);
    if (n < end) scatter_columns<V, 1, false>(s, both, keys, n, end - n);
  };
  columns(true, 0, s.value_dim);
  columns(false, s.value_dim, s.dim);
}

}  // namespace
}  // namespace glm5::cpu::GLM5_ISA
