// The arithmetic that the indexer's forward and backward share: the dot products of one query's heads with a tile of up
// to 64 keys. Keys lie in vector lanes: a tile is packed [step][key], a step being one element of the head dimension, or
// a pair of bf16 elements where the set multiplies pairs (vdpbf16ps). A dot product is summed over steps in order, in its
// own lane, so it does not depend on where in a tile its key lies or which heads share the registers.
#pragma once

#include "common/e4m3.h"
#include "common/gemm/pack.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "lightning_indexer/lightning_indexer.h"

namespace glm5::cpu::GLM5_ISA {

namespace {

constexpr int64_t kTileKeys = 64;
constexpr int64_t kPackAheadKeys = 16;  // between the keys that are packed and those that are prefetched

GLM5_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
GLM5_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// What scores of storage type T are computed and stored as.
template <class T>
struct RealOf {
  using Type = float;
};
template <>
struct RealOf<double> {
  using Type = double;
};
template <class T>
using Real = typename RealOf<T>::Type;

template <class T>
struct Packing {
  using Element = Real<T>;
  static int64_t steps(int64_t dim) { return dim; }
  GLM5_INLINE static Element element(const T* row, int64_t, int64_t step) { return to_float(row[step]); }
};

// The number of steps is a multiple of this, the ones beyond the head dimension being zero.
#ifndef GLM5_INDEXER_STEP_BLOCK
#define GLM5_INDEXER_STEP_BLOCK 1
#endif

#if GLM5_ISA_LEVEL == 2
template <class T>
struct PairPacking {
  using Element = uint32_t;
  static int64_t steps(int64_t dim) {
    return ((dim + 1) / 2 + GLM5_INDEXER_STEP_BLOCK - 1) / GLM5_INDEXER_STEP_BLOCK * GLM5_INDEXER_STEP_BLOCK;
  }
  GLM5_INLINE static uint32_t bits(bf16 x) { return x.bits; }
  GLM5_INLINE static uint32_t bits(e4m3 x) {
    const float y = to_float(x);
    uint32_t b;
    std::memcpy(&b, &y, 4);
    return b >> 16;
  }
  GLM5_INLINE static Element element(const T* row, int64_t dim, int64_t step) {
    return (2 * step < dim ? bits(row[2 * step]) : 0u) | (2 * step + 1 < dim ? bits(row[2 * step + 1]) << 16 : 0u);
  }
};
template <>
struct Packing<bf16> : PairPacking<bf16> {};
template <>
struct Packing<e4m3> : PairPacking<e4m3> {};
#endif

template <class T>
using Element = typename Packing<T>::Element;

// Where keys lie: one after the other from `base`, or those that `indices` names, or each somewhere.
template <class T>
struct KeyRows {
  const T* base;
  int64_t dim;
  const int32_t* indices = nullptr;
  const T* const* each = nullptr;
  const T* const* next = nullptr;  // of the tile that will be packed after this one
  GLM5_INLINE void fetch_next(int64_t i) const {
    if (next)
      for (int64_t d = 0; d < dim; d += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(next[i] + d, 0, 2);
  }
  GLM5_INLINE const T* operator[](int64_t i) const { return each ? each[i] : base + (indices ? indices[i] : i) * dim; }
};

template <class T>
struct Scratch {
  Element<T>* keys;   // [steps][kTileKeys]
  Element<T>* heads;  // [queries][num_heads][steps], and a tile of rows to spare
  Scratch(const LightningIndexerArgs& a, int64_t queries) {
    const int64_t steps = Packing<T>::steps(a.dim);
    keys = static_cast<Element<T>*>(
        thread_scratch(0, sizeof(Element<T>) * (steps * (kTileKeys + queries * a.num_heads + 16) + 16)));
    heads = keys + steps * kTileKeys;
  }
};

#if GLM5_ISA_LEVEL == 2

// row[j][i] -> column[i][j] for 16 x 16 values of 32 bits, in four rounds of exchanges.
GLM5_INLINE void transpose16(__m512i (&r)[16]) {
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
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// Packs `count` keys, k[i] as key i; missing keys are zero.
inline void pack_keys(const KeyRows<bf16>& k, int64_t count, uint32_t* packed) {
  const int64_t dim = k.dim, steps = Packing<bf16>::steps(dim);
  for (int64_t i = 0; i < kTileKeys; i += 16) {
    const bf16* row[16];
    for (int64_t j = 0; j < 16; ++j) row[j] = i + j < count ? k[i + j] : nullptr;
    const bool all = i + 16 <= count;
    int64_t s = 0;
    for (; 2 * (s + 16) <= dim; s += 16) {
      __m512i r[16];
      if (k.next)
        for (int j = 0; j < 16; ++j) __builtin_prefetch(k.next[i + j] + 2 * s, 0, 2);
      if (all) {
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) r[j] = _mm512_loadu_si512(row[j] + 2 * s);
      } else {
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) r[j] = i + j < count ? _mm512_loadu_si512(row[j] + 2 * s) : _mm512_setzero_si512();
      }
      transpose16(r);
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) _mm512_storeu_si512(packed + (s + j) * kTileKeys + i, r[j]);
    }
    for (int64_t j = i; j < i + 16; ++j)
      for (int64_t rest = s; rest < steps; ++rest)
        packed[rest * kTileKeys + j] = j < count ? Packing<bf16>::element(k[j], dim, rest) : 0u;
  }
}

// Exactly the bf16 values of n e4m3 ones.
inline void decode(const e4m3* from, int64_t n, bf16* to) {
  const __m512i subnormal = _mm512_castsi128_si512(
      _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));  // 0..7 times 2^-9
  for (int64_t i = 0; i < n; i += 32) {
    const __mmask32 there = n - i >= 32 ? 0xffffffffu : (1u << (n - i)) - 1u;
    const __m512i x = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(there, from + i));
    const __m512i magnitude = _mm512_and_si512(x, _mm512_set1_epi16(0x7f));
    __m512i y = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
    y = _mm512_mask_permutexvar_epi16(y, _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8)), magnitude, subnormal);
    y = _mm512_mask_mov_epi16(y, _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f)), _mm512_set1_epi16(0x7fc0));
    y = _mm512_or_si512(y, _mm512_slli_epi16(_mm512_and_si512(x, _mm512_set1_epi16(0x80)), 8));
    _mm512_mask_storeu_epi16(to + i, there, y);
  }
}

inline void pack_keys(const KeyRows<e4m3>& k, int64_t count, uint32_t* packed) {
  bf16* rows = static_cast<bf16*>(thread_scratch(3, sizeof(bf16) * (kTileKeys * k.dim + 32)));
  for (int64_t i = 0; i < count; ++i) {
    k.fetch_next(i);
    decode(k[i], k.dim, rows + i * k.dim);
  }
  pack_keys(KeyRows<bf16>{rows, k.dim}, count, packed);
}

#endif

// The same for every other storage type.
template <class T>
void pack_keys(const KeyRows<T>& k, int64_t count, Element<T>* packed) {
  const int64_t dim = k.dim, steps = Packing<T>::steps(dim);
  int64_t whole = 0;  // keys packed in squares, as many as a vector has lanes
#if GLM5_ISA_LEVEL > 0
  if constexpr (sizeof(T) == 2 || sizeof(T) == 4) {
    constexpr int L = F::kLanes;
    for (; whole + L <= count; whole += L) {
      const T* rows[L];
      for (int j = 0; j < L; ++j) {
        rows[j] = k[whole + j];
        k.fetch_next(whole + j);
      }
      int64_t s = 0;
      for (; s + L <= dim; s += L) {
        F r[L];
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) {
          if (k.base && !k.indices) __builtin_prefetch(rows[j] + kPackAheadKeys * dim + s);  // the same place of later keys
          r[j] = load(rows[j] + s);
        }
        transpose(r);
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) store(packed + (s + j) * kTileKeys + whole, r[j]);
      }
      for (; s < steps; ++s)
        for (int j = 0; j < L; ++j) packed[s * kTileKeys + whole + j] = Packing<T>::element(rows[j], dim, s);
    }
    if (whole > 0 && dim >= L) GLM5_COUNT_PATH("lightning_indexer: keys packed in squares");
  }
#endif
  for (int64_t i = whole; i < count; ++i) {
    const T* row = k[i];
    for (int64_t s = 0; s < steps; ++s) packed[s * kTileKeys + i] = Packing<T>::element(row, dim, s);
  }
  if (count < kTileKeys)
    for (int64_t s = 0; s < steps; ++s)
      std::memset(packed + s * kTileKeys + count, 0, sizeof(*packed) * (kTileKeys - count));
}

// The keys that a block of queries sees, a tile at a time: rows of k, or of the pages of a sequence.
template <class T>
struct TileKeys {
  const LightningIndexerArgs& a;
  const T* nothing = nullptr;  // a row of zeros
  struct Place {
    int64_t tile = -1;
    const T* rows[kTileKeys];
    float scales[kTileKeys];
  };
  Place places[2];  // of this tile and of the next, by turns
  int turn = 0;
  const float* scale = nullptr;  // of the tile's key i, or null

  explicit TileKeys(const LightningIndexerArgs& args) : a(args) {
    if (!a.pages.table) return;
    void* row = thread_scratch(5, sizeof(T) * a.dim + 64);
    std::memset(row, 0, sizeof(T) * a.dim);
    nothing = static_cast<const T*>(row);
  }

  // Packs the keys from `tile` on. Of pages, what lies outside [low, high) is not looked at: these keys are zero. So are
  // those between two queries' ranges whose page is not there.
  void pack(int64_t tile, int64_t low, int64_t high, Element<T>* packed) {
    if (!a.pages.table) {
      scale = a.k_scale ? a.k_scale + tile : nullptr;
      const T* k = static_cast<const T*>(a.k) + tile * a.dim;
      return pack_keys(KeyRows<T>{k, a.dim}, min_of(kTileKeys, a.num_keys - tile), packed);
    }
    Place &here = places[turn], &next = places[turn ^= 1];
    if (here.tile != tile) find(here, tile, low, high);
    find(next, tile + kTileKeys, low, high);
    scale = sizeof(T) == 1 ? here.scales : nullptr;
    pack_keys(KeyRows<T>{nullptr, a.dim, nullptr, here.rows, next.rows}, min_of(kTileKeys, high - tile), packed);
  }

  // Where the keys from `tile` on lie.
  void find(Place& place, int64_t tile, int64_t low, int64_t high) const {
    const LightningIndexerPages& pages = a.pages;
    const int64_t count = max_of(min_of(kTileKeys, high - tile), 0);
    int64_t i = min_of(max_of(low - tile, 0), count);
    place.tile = tile;
    for (int64_t j = 0; j < kTileKeys; ++j)
      if (j < i || j >= count) place.rows[j] = nothing, place.scales[j] = 0;
    int64_t entry = (tile + i) / pages.page_size, at = (tile + i) % pages.page_size;
    for (; i < count; ++entry, at = 0) {
      const int64_t page = pages.table[entry], end = min_of(i + pages.page_size - at, count);
      const bool there = page >= 0 && page < pages.num_pages;
      const char* begin = static_cast<const char*>(a.k) + (there ? page * pages.page_bytes : 0);
      const char* scale_of = begin + (pages.page_size * a.dim + at * 4);
      const T* row = reinterpret_cast<const T*>(begin) + at * a.dim;
      for (; i < end; ++i, row += a.dim, scale_of += 4) {
        place.rows[i] = there ? row : nothing;
        if constexpr (sizeof(T) == 1) {
          if (there) std::memcpy(place.scales + i, scale_of, 4);
          else place.scales[i] = 0;
        }
      }
    }
  }
};

// The heads of one query as [head][step]: in place where storage already is that, else in `buffer`.
template <class T>
const Element<T>* pack_heads(const T* q, int64_t num_heads, int64_t dim, Element<T>* buffer) {
  if constexpr (sizeof(T) == sizeof(Element<T>)) {
    (void)num_heads, (void)dim, (void)buffer;
    return reinterpret_cast<const Element<T>*>(q);
  } else {
    if constexpr (sizeof(T) == 2 && sizeof(Element<T>) == 4 && GLM5_ISA_LEVEL == 2)
      if (dim % (2 * GLM5_INDEXER_STEP_BLOCK) == 0 && reinterpret_cast<uintptr_t>(q) % 4 == 0)
        return reinterpret_cast<const Element<T>*>(q);
    const int64_t steps = Packing<T>::steps(dim);
    for (int64_t h = 0; h < num_heads; ++h)
      for (int64_t s = 0; s < steps; ++s) buffer[h * steps + s] = Packing<T>::element(q + h * dim, dim, s);
    return buffer;
  }
}

#if GLM5_ISA_LEVEL == 2
struct PairLanes {
  __m512i v;
};
GLM5_INLINE PairLanes load_step(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
GLM5_INLINE PairLanes splat_step(const uint32_t* p) { return {_mm512_set1_epi32(static_cast<int>(*p))}; }
GLM5_INLINE F multiply_add(PairLanes a, PairLanes b, F c) { return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)}; }
#endif
GLM5_INLINE F load_step(const float* p) { return load(p); }
GLM5_INLINE F splat_step(const float* p) { return splat<F>(*p); }
GLM5_INLINE F multiply_add(F a, F b, F c) { return fma(a, b, c); }
#if GLM5_ISA_LEVEL == 0
GLM5_INLINE D load_step(const double* p) { return load(p); }
GLM5_INLINE D splat_step(const double* p) { return splat<D>(*p); }
GLM5_INLINE D multiply_add(D a, D b, D c) { return fma(a, b, c); }
#endif

// Register block: kHeads heads x kVectors vectors of keys, as much as the registers hold.
constexpr int kHeads = 4;
constexpr int kVectors = GLM5_ISA_LEVEL == 2 ? 4 : 2;

// dots[h][v] += heads[h] . keys, for NH heads of a query and NV vectors of keys.
template <int NH, int NV, class E, class V>
GLM5_INLINE void add_dot_products(const E* heads, int64_t steps, const E* keys, V (&dots)[NH][NV]) {
  constexpr int L = V::kLanes;
  for (int64_t s = 0; s < steps; ++s, ++heads, keys += kTileKeys) {
    decltype(load_step(keys)) key[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) key[v] = load_step(keys + v * L);
#pragma GCC unroll 8
    for (int h = 0; h < NH; ++h) {
      const auto head = splat_step(heads + h * steps);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) dots[h][v] = multiply_add(head, key[v], dots[h][v]);
    }
  }
}

// dots[h][v] = heads[h] . keys.
template <int NH, int NV, class E, class V>
GLM5_INLINE void dot_products(const E* heads, int64_t steps, const E* keys, V (&dots)[NH][NV]) {
#pragma GCC unroll 8
  for (int h = 0; h < NH; ++h)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) dots[h][v] = splat<V>(0);
  add_dot_products<NH, NV>(heads, steps, keys, dots);
}

#if GLM5_ISA_LEVEL == 0
#define GLM5_INDEXER_DOUBLE(fn) else if (args.dtype == 2) fn<double>(args);
#else
#define GLM5_INDEXER_DOUBLE(fn)
#endif

}  // namespace
}  // namespace glm5::cpu::GLM5_ISA
