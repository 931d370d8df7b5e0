// The bf16 building blocks of sparse MLA: products of pairs on vdpbf16ps or, compiled for AMX, on tiles.
//
// Both read a B operand in pair layout: 32-bit words, each two bf16 that lie next to each other along the depth.
//   heads in lanes     [dim / 2][heads]   q and dout, for scores: transposed words (few_heads has its own form)
//   dims in lanes      [rows / 2][dims]   two latent rows (or two heads of q) interleaved by unpack instructions, which
//                                         leaves dims permuted within each 32; natural_order() undoes it at the end
// Dims are padded to 32, heads to 16, the keys of a block to 32, all with zeros, so that no kernel has a masked tail.
#pragma once

#include "common/parallel.h"
#include "common/simd.h"

#if GLM5_ISA_LEVEL == 2

namespace glm5::cpu::GLM5_ISA {
namespace {

#if defined(__AMX_BF16__)
inline constexpr bool kTiles = true;
#else
inline constexpr bool kTiles = false;
#endif

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

GLM5_INLINE __mmask32 first_32(int64_t n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0u : (1u << n) - 1u; }

// 32 bf16 from p, zero from n on.
GLM5_INLINE __m512i load_32(const uint16_t* p, int64_t n) { return _mm512_maskz_loadu_epi16(first_32(n), p); }

// One word a lane: the low half from a, the high half from b, both rounded to nearest even.
GLM5_INLINE __m512i pair(__m512 a, __m512 b) {
  const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a)));
  const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(b)));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
GLM5_INLINE __m512 low_half(__m512i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
GLM5_INLINE __m512 high_half(__m512i words) {
  return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

GLM5_INLINE void transpose_16x16(__m512i r[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// With so few heads a vector holds four neighbouring words of each, and a score is the sum of four lanes.
inline bool few_heads(int64_t heads) { return !kTiles && heads <= 4; }

// x [heads <= 4][dim] -> words [round_up(dim, 32) / 8][4 heads][4].
inline void pack_few_heads(const uint16_t* x, int64_t heads, int64_t dim, uint32_t* to) {
  for (int64_t d = 0; d < dim; d += 32)
    for (int64_t h = 0; h < 4; ++h) {
      const __m512i words = load_32(x + h * dim + d, h < heads ? dim - d : 0);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + d * 2 + h * 4), _mm512_castsi512_si128(words));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + d * 2 + 16 + h * 4), _mm512_extracti32x4_epi32(words, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + d * 2 + 32 + h * 4), _mm512_extracti32x4_epi32(words, 2));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + d * 2 + 48 + h * 4), _mm512_extracti32x4_epi32(words, 3));
    }
}

// x [heads][dim] -> the B operand of scores(): words [round_up(dim, 32) / 2][lanes], heads in lanes, or few_heads' form.
inline void pack_for_scores(const uint16_t* x, int64_t heads, int64_t dim, int64_t lanes, uint32_t* to) {
  if (few_heads(heads)) return pack_few_heads(x, heads, dim, to);
  for (int64_t h = 0; h < lanes; h += 16)
    for (int64_t d = 0; d < dim; d += 32) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) r[i] = h + i < heads ? load_32(x + (h + i) * dim + d, dim - d) : _mm512_setzero_si512();
      transpose_16x16(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (d / 2 + i) * lanes + h, r[i]);
    }
}

// Two rows -> words [round_up(dim, 32)] in the permuted order; a null row counts as zeros.
GLM5_INLINE void interleave(__m512i a, __m512i b, uint32_t* to) {
  _mm512_storeu_si512(to, _mm512_unpacklo_epi16(a, b));
  _mm512_storeu_si512(to + 16, _mm512_unpackhi_epi16(a, b));
}

// x [heads][dim] -> words [depth / 2][round_up(dim, 32)], dims in lanes, pairs along the heads.
inline void pack_dims_in_lanes(const uint16_t* x, int64_t heads, int64_t dim, int64_t depth, uint32_t* to) {
  const int64_t wide = round_up(dim, 32);
  for (int64_t h = 0; h < depth; h += 2)
    for (int64_t d = 0; d < dim; d += 32)
      interleave(load_32(x + h * dim + d, h < heads ? dim - d : 0),
                 load_32(x + (h + 1) * dim + d, h + 1 < heads ? dim - d : 0), to + h / 2 * wide + d);
}

// 32 accumulators from the permuted order to two vectors of natural order.
GLM5_INLINE void natural_order(__m512 low, __m512 high, F& first, F& second) {
  const __m512i of_first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i of_second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  first = {_mm512_permutex2var_ps(low, of_first, high)};
  second = {_mm512_permutex2var_ps(low, of_second, high)};
}

// x [round_up(n, 32)] permuted -> to [n] bf16, times `scale`.
inline void store_natural(const float* x, float scale, int64_t n, uint16_t* to) {
  const F s = splat<F>(scale);
  bf16* out = reinterpret_cast<bf16*>(to);
  for (int64_t d = 0; d < n; d += 32) {
    F first, second;
    natural_order(_mm512_loadu_ps(x + d), _mm512_loadu_ps(x + d + 16), first, second);
    store_n(out + d, first * s, n - d);
    if (n - d > 16) store_n(out + d + 16, second * s, n - d - 16);
  }
}

// Latent rows of a block of keys, copied next to each other and, if wanted, interleaved: `rows` [n32][dim32],
// `words` [n32 / 2][word_dims] (null: no copy). n32 = round_up(n, 32), the padding zero.
inline void gather_rows(const uint16_t* kv, int64_t dim, const int32_t* keys, int64_t n, uint16_t* rows, uint32_t* words,
                        int64_t word_dims) {
  const int64_t dim32 = round_up(dim, 32), n32 = round_up(n, 32);
  for (int64_t i = 0; i < n32; i += 2) {
    const uint16_t* a = kv + (i < n ? keys[i] : 0) * dim;
    const uint16_t* b = kv + (i + 1 < n ? keys[i + 1] : 0) * dim;
    for (int64_t d = 0; d < dim32; d += 32) {
      const __m512i x = load_32(a + d, i < n ? dim - d : 0), y = load_32(b + d, i + 1 < n ? dim - d : 0);
      if (rows) {
        _mm512_storeu_si512(rows + i * dim32 + d, x);
        _mm512_storeu_si512(rows + (i + 1) * dim32 + d, y);
      }
      if (d < word_dims) interleave(x, y, words + i / 2 * word_dims + d);
    }
  }
}

GLM5_INLINE void prefetch(const uint16_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }
GLM5_INLINE void prefetch_row(const uint16_t* row, int64_t dim) {
  for (int64_t i = 0; i < dim; i += 32) prefetch(row + i);
}

// Rows that the next block will gather, fetched while this one is multiplied.
struct Ahead {
  const uint16_t* kv;
  int64_t dim;
  const int32_t* keys;
  int64_t n;
  void fetch(int64_t from, int64_t to) const {
    for (int64_t i = from; i < to && i < n; ++i) prefetch_row(kv + keys[i] * dim, dim);
  }
};

#if !defined(__AMX_BF16__)

struct TileSession {
  explicit TileSession(int64_t words = 16) { (void)words; }
};

GLM5_INLINE __m512 dot(__m512 acc, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
GLM5_INLINE __m512i splat_word(const void* p) {
  int word;
  std::memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}

template <int MK, int NV>
void score_tile(const uint16_t* rows, int64_t pitch, const uint32_t* b, int64_t lanes, int64_t words, float* s) {
  __m512 acc[MK][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MK; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[m][v] = _mm512_setzero_ps();
  for (int64_t w = 0; w < words; ++w) {
    __m512i bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) bv[v] = _mm512_loadu_si512(b + w * lanes + v * 16);
#pragma GCC unroll 8
    for (int m = 0; m < MK; ++m) {
      const __m512i a = splat_word(rows + m * pitch + 2 * w);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[m][v] = dot(acc[m][v], a, bv[v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MK; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) _mm512_storeu_ps(s + m * lanes + v * 16, acc[m][v]);
}

template <int NV>
void score_tiles(const uint16_t* rows, int64_t pitch, int64_t n, const uint32_t* b, int64_t lanes, int64_t words, float* s,
                 const Ahead& ahead) {
  constexpr int MK = NV == 1 ? 8 : 6;
  int64_t i = 0;
  for (; i + MK <= n; i += MK) {
    ahead.fetch(i, i + MK);
    GLM5_COUNT_PATH(NV == 1   ? "sparse_mla pairs scores 8x1"
                    : NV == 2 ? "sparse_mla pairs scores 6x2"
                    : NV == 3 ? "sparse_mla pairs scores 6x3"
                              : "sparse_mla pairs scores 6x4");
    score_tile<MK, NV>(rows + i * pitch, pitch, b, lanes, words, s + i * lanes);
  }
  ahead.fetch(i, ahead.n);
  for (; i < n; i += 2) {
    GLM5_COUNT_PATH(NV == 1   ? "sparse_mla pairs scores 2x1"
                    : NV == 2 ? "sparse_mla pairs scores 2x2"
                    : NV == 3 ? "sparse_mla pairs scores 2x3"
                              : "sparse_mla pairs scores 2x4");
    score_tile<2, NV>(rows + i * pitch, pitch, b, lanes, words, s + i * lanes);
  }
}

// Four keys' accumulators, lanes (head, word): sums over the words, to s [4][16], the lanes from 4 on zero.
GLM5_INLINE void sum_of_words(const __m512* acc, float* s) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(acc[0], acc[1]), _mm512_unpackhi_ps(acc[0], acc[1]));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(acc[2], acc[3]), _mm512_unpackhi_ps(acc[2], acc[3]));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 by_head = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));  // lanes (head, key)
  const __m512i turn = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512 by_key = _mm512_permutexvar_ps(turn, by_head);
  _mm512_storeu_ps(s, _mm512_zextps128_ps512(_mm512_castps512_ps128(by_key)));
  _mm512_storeu_ps(s + 16, _mm512_zextps128_ps512(_mm512_extractf32x4_ps(by_key, 1)));
  _mm512_storeu_ps(s + 32, _mm512_zextps128_ps512(_mm512_extractf32x4_ps(by_key, 2)));
  _mm512_storeu_ps(s + 48, _mm512_zextps128_ps512(_mm512_extractf32x4_ps(by_key, 3)));
}

// scores() with few_heads: eight keys at a time, those behind the n-th being the padding rows of zeros.
inline void scores_of_few_heads(const uint16_t* rows, int64_t pitch, int64_t n, const uint32_t* b, int64_t words, float* s,
                                const Ahead& ahead) {
  for (int64_t i = 0; i < n; i += 8) {
    GLM5_COUNT_PATH("sparse_mla pairs scores of few heads");
    ahead.fetch(i, i + 8);
    __m512 acc[8];
#pragma GCC unroll 8
    for (int m = 0; m < 8; ++m) acc[m] = _mm512_setzero_ps();
    for (int64_t w = 0; w < words; w += 4) {
      const __m512i bv = _mm512_loadu_si512(b + w * 4);
#pragma GCC unroll 8
      for (int m = 0; m < 8; ++m) {
        const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + (i + m) * pitch + 2 * w));
        acc[m] = dot(acc[m], _mm512_broadcast_i32x4(a), bv);
      }
    }
    sum_of_words(acc, s + i * 16);
    sum_of_words(acc + 4, s + (i + 4) * 16);
  }
  ahead.fetch(round_up(n, 8), ahead.n);
}

// s [round_up(n, 32)][lanes], the first n rows of it = rows [n][pitch] times b, from pack_for_scores.
inline void scores(const uint16_t* rows, int64_t pitch, int64_t n, const uint32_t* b, int64_t heads, int64_t lanes,
                   int64_t words, float* s, const Ahead& ahead) {
  if (few_heads(heads)) return scores_of_few_heads(rows, pitch, n, b, words, s, ahead);
  const Ahead none{nullptr, 0, nullptr, 0};
  n = round_up(n, 2);
  for (int64_t h = 0; h < lanes; h += 64) {
    const Ahead& fetch = h ? none : ahead;
    if (lanes - h >= 64) score_tiles<4>(rows, pitch, n, b + h, lanes, words, s + h, fetch);
    else if (lanes - h >= 48) score_tiles<3>(rows, pitch, n, b + h, lanes, words, s + h, fetch);
    else if (lanes - h >= 32) score_tiles<2>(rows, pitch, n, b + h, lanes, words, s + h, fetch);
    else score_tiles<1>(rows, pitch, n, b + h, lanes, words, s + h, fetch);
  }
}

template <int MR, int NV>
void weighted_tile(const uint32_t* a, int64_t lanes, int64_t words, const uint32_t* b, int64_t pitch, float* c, int64_t ldc,
                   bool add, const float* alpha) {
  __m512 acc[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[m][v] = _mm512_setzero_ps();
  for (int64_t w = 0; w < words; ++w) {
    __m512i bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) bv[v] = _mm512_loadu_si512(b + w * pitch + v * 16);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const __m512i x = splat_word(a + w * lanes + m);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[m][v] = dot(acc[m][v], x, bv[v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    const __m512 scale = _mm512_set1_ps(alpha ? alpha[m] : 1.f);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* p = c + m * ldc + v * 16;
      _mm512_storeu_ps(p, add ? _mm512_fmadd_ps(_mm512_loadu_ps(p), scale, acc[m][v]) : acc[m][v]);
    }
  }
}

template <int NV>
void weighted_tiles(const uint32_t* a, int64_t lanes, int64_t heads, int64_t words, const uint32_t* b, int64_t pitch,
                    float* c, bool add, const float* alpha) {
  int64_t h = 0;
  const auto at = [&](auto tile, int rows) {
    tile(a + h, lanes, words, b, pitch, c + h * pitch, pitch, add, alpha ? alpha + h : nullptr);
    h += rows;
  };
  for (; h + 6 <= heads;) {
    GLM5_COUNT_PATH(NV == 4 ? "sparse_mla pairs weighted 6x4" : "sparse_mla pairs weighted 6x2");
    at(weighted_tile<6, NV>, 6);
  }
  if (h + 4 <= heads) {
    GLM5_COUNT_PATH(NV == 4 ? "sparse_mla pairs weighted 4x4" : "sparse_mla pairs weighted 4x2");
    at(weighted_tile<4, NV>, 4);
  }
  if (h + 2 <= heads) {
    GLM5_COUNT_PATH(NV == 4 ? "sparse_mla pairs weighted 2x4" : "sparse_mla pairs weighted 2x2");
    at(weighted_tile<2, NV>, 2);
  }
  if (h < heads) {
    GLM5_COUNT_PATH(NV == 4 ? "sparse_mla pairs weighted 1x4" : "sparse_mla pairs weighted 1x2");
    at(weighted_tile<1, NV>, 1);
  }
}

// c [heads][pitch] = (add ? c * alpha[head] : 0) + sum over n keys of a (words [n / 2][lanes], heads in lanes) times b
// (words [n / 2][pitch], dims in lanes).
inline void weighted(const uint32_t* a, int64_t lanes, int64_t heads, int64_t n, const uint32_t* b, int64_t pitch, float* c,
                     bool add, const float* alpha) {
  const int64_t words = (n + 1) / 2;
  int64_t d = 0;
  for (; d + 64 <= pitch; d += 64) weighted_tiles<4>(a, lanes, heads, words, b + d, pitch, c + d, add, alpha);
  if (d < pitch) weighted_tiles<2>(a, lanes, heads, words, b + d, pitch, c + d, add, alpha);
}

template <int MR, int NV>
void scatter_tile(const uint16_t* ds, const uint16_t* p, int64_t depth, int64_t words, const uint32_t* q, int64_t ldq,
                  const uint32_t* dout, int64_t ldd, float* const* c, int64_t d) {
  __m512 acc[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[m][v] = _mm512_setzero_ps();
  for (int64_t w = 0; w < words; ++w) {
    __m512i bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) bv[v] = _mm512_loadu_si512(q + w * ldq + d + v * 16);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const __m512i x = splat_word(ds + m * depth + 2 * w);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[m][v] = dot(acc[m][v], x, bv[v]);
    }
  }
  if (dout)
    for (int64_t w = 0; w < words; ++w) {
      __m512i bv[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) bv[v] = _mm512_loadu_si512(dout + w * ldd + d + v * 16);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const __m512i x = splat_word(p + m * depth + 2 * w);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[m][v] = dot(acc[m][v], x, bv[v]);
      }
    }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* to = c[m] + d + v * 16;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), acc[m][v]));
    }
}

template <int MR>
void scatter_rows(const uint16_t* ds, const uint16_t* p, int64_t depth, int64_t words, const uint32_t* q, int64_t dim32,
                  const uint32_t* dout, int64_t value32, float* const* c) {
  GLM5_COUNT_PATH(MR == 6   ? "sparse_mla pairs scatter 6"
                  : MR == 2 ? "sparse_mla pairs scatter 2"
                            : "sparse_mla pairs scatter 1");
  for (int64_t d = 0; d < dim32;) {
    const bool valued = d < value32;
    const int64_t end = valued ? value32 : dim32;
    if (d + 64 <= end) {
      scatter_tile<MR, 4>(ds, p, depth, words, q, dim32, valued ? dout : nullptr, value32, c, d);
      d += 64;
    } else {
      scatter_tile<MR, 2>(ds, p, depth, words, q, dim32, valued ? dout : nullptr, value32, c, d);
      d += 32;
    }
  }
}

// c[i] [dim32] += ds[i] . q + p[i] . dout for n keys: ds and p bf16 [n][depth] along the heads; q and dout words
// [depth / 2][dim32 | value32] with pairs along the heads. A row may come twice.
inline void scatter(const uint16_t* ds, const uint16_t* p, int64_t depth, int64_t heads, int64_t n, const uint32_t* q,
                    int64_t dim32, const uint32_t* dout, int64_t value32, float* const* c) {
  const int64_t words = (heads + 1) / 2;
  int64_t i = 0;
  for (; i + 6 <= n; i += 6) scatter_rows<6>(ds + i * depth, p + i * depth, depth, words, q, dim32, dout, value32, c + i);
  for (; i + 2 <= n; i += 2) scatter_rows<2>(ds + i * depth, p + i * depth, depth, words, q, dim32, dout, value32, c + i);
  if (i < n) scatter_rows<1>(ds + i * depth, p + i * depth, depth, words, q, dim32, dout, value32, c + i);
}

#else  // AMX: tiles of 16 rows x 16 words

// GCC does not know that a tile load reads memory: keeps stores from sinking below it.
GLM5_INLINE void stores_are_done() { __asm__ volatile("" ::: "memory"); }

// Tile registers are configured for the life of this object, on this thread: 16 x 16 words, or products of a depth of
// `words` < 16 only (A narrower, B lower), which take as much less time.
struct TileSession {
  explicit TileSession(int64_t words = 16) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    const int64_t depth = words < 16 ? words : 16;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? 4 * depth : 64);
      config.rows[i] = static_cast<uint8_t>(i >= 6 ? depth : 16);
    }
    // GCC 12's intrinsic names 8 bytes of the configuration as its input; without this the other stores are dropped.
    __asm__ volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~TileSession() { _tile_release(); }
};

// Tiles 0..3 accumulate (row group r, column group c in 2r + c), 4 and 5 hold A, 6 and 7 hold B.
template <int R, int C>
GLM5_INLINE void tile_step(const void* a, int64_t a_bytes, int64_t a_next, const void* b, int64_t b_bytes) {
  const char* ap = static_cast<const char*>(a);
  const char* bp = static_cast<const char*>(b);
  _tile_loadd(4, ap, a_bytes);
  if constexpr (R > 1) _tile_loadd(5, ap + a_next, a_bytes);
  _tile_loadd(6, bp, b_bytes);
  if constexpr (C > 1) _tile_loadd(7, bp + 64, b_bytes);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (C > 1) _tile_dpbf16ps(1, 4, 7);
  if constexpr (R > 1) _tile_dpbf16ps(2, 5, 6);
  if constexpr (R > 1 && C > 1) _tile_dpbf16ps(3, 5, 7);
}
template <int R, int C>
GLM5_INLINE void tile_zero() {
  _tile_zero(0);
  if constexpr (C > 1) _tile_zero(1);
  if constexpr (R > 1) _tile_zero(2);
  if constexpr (R > 1 && C > 1) _tile_zero(3);
}
template <int R, int C>
GLM5_INLINE void tile_store(float* c, int64_t ldc) {
  _tile_stored(0, c, ldc * 4);
  if constexpr (C > 1) _tile_stored(1, c + 16, ldc * 4);
  if constexpr (R > 1) _tile_stored(2, c + 16 * ldc, ldc * 4);
  if constexpr (R > 1 && C > 1) _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
}

template <int C>
void score_tiles(const uint16_t* rows, int64_t pitch, const uint32_t* b, int64_t lanes, int64_t words, float* s,
                 const Ahead& ahead, int64_t i) {
  GLM5_COUNT_PATH(C == 2 ? "sparse_mla tiles scores 2x2" : "sparse_mla tiles scores 2x1");
  stores_are_done();
  tile_zero<2, C>();
  for (int64_t w = 0; w < words; w += 16) {
    // One line of each of the 32 rows that the next block holds in these places.
    for (int64_t k = i; k < i + 32 && k < ahead.n; ++k)
      if (2 * w < ahead.dim) prefetch(ahead.kv + ahead.keys[k] * ahead.dim + 2 * w);
    tile_step<2, C>(rows + 2 * w, pitch * 2, 16 * pitch * 2, b + w * lanes, lanes * 4);
  }
  tile_store<2, C>(s, lanes);
}

inline void scores(const uint16_t* rows, int64_t pitch, int64_t n, const uint32_t* b, int64_t heads, int64_t lanes,
                   int64_t words, float* s, const Ahead& ahead) {
  (void)heads;
  const Ahead none{nullptr, 0, nullptr, 0};
  for (int64_t i = 0; i < n; i += 32)
    for (int64_t h = 0; h < lanes; h += 32) {
      const Ahead& fetch = h ? none : ahead;
      if (lanes - h >= 32) score_tiles<2>(rows + i * pitch, pitch, b + h, lanes, words, s + i * lanes + h, fetch, i);
      else score_tiles<1>(rows + i * pitch, pitch, b + h, lanes, words, s + i * lanes + h, fetch, i);
    }
  for (int64_t i = round_up(n, 32); i < ahead.n; ++i) prefetch_row(ahead.kv + ahead.keys[i] * ahead.dim, ahead.dim);
}

#endif

}  // namespace
}  // namespace glm5::cpu::GLM5_ISA

#endif  // GLM5_ISA_LEVEL == 2
