// The int8 indexer's scores on the CPU, a register block of heads and keys at a time; the portable set takes one dot product
// after the other. Sums of products are exact, so only the order of heads matters to the bits, and it is always the same.
#include "lightning_indexer/forward.h"
#include "lightning_indexer_int8/pack.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

#if GLM5_ISA_LEVEL > 0

struct Ints {
  static constexpr int kLanes = F::kLanes;
  using Scalar = int32_t;
#if GLM5_ISA_LEVEL == 2
  __m512i v;
#else
  __m256i v;
#endif
};

// A step of the inner loop, as tile.h wants it: q's words and k's, vpdpbusd taking the first as unsigned.
struct Word {
  uint32_t bits;
};

#if GLM5_ISA_LEVEL == 2
GLM5_INLINE Ints load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
GLM5_INLINE F to_real(Ints x) { return {_mm512_cvtepi32_ps(x.v)}; }
GLM5_INLINE PairLanes load_step(const Word* p) { return {_mm512_loadu_si512(p)}; }
GLM5_INLINE PairLanes splat_step(const Word* p) { return {_mm512_set1_epi32(static_cast<int>(p->bits))}; }
GLM5_INLINE Ints multiply_add(PairLanes q, PairLanes k, Ints c) {
  // Around its own intrinsic GCC 12 copies every sum, and spills some: 62 % of the peak instead of 83.
  __asm__("vpdpbusd %2, %1, %0" : "+v"(c.v) : "v"(q.v), "v"(k.v));
  return c;
}
#else
GLM5_INLINE Ints load_ints(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
GLM5_INLINE F to_real(Ints x) { return {_mm256_cvtepi32_ps(x.v)}; }
struct ShortLanes {
  __m256i v;
};
GLM5_INLINE ShortLanes load_step(const Word* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
GLM5_INLINE ShortLanes splat_step(const Word* p) { return {_mm256_set1_epi32(static_cast<int>(p->bits))}; }
GLM5_INLINE Ints multiply_add(ShortLanes q, ShortLanes k, Ints c) {
  return {_mm256_add_epi32(c.v, _mm256_madd_epi16(q.v, k.v))};
}
#endif

// What a dot product of each key of a tile starts from. vpdpbusd multiplies q + 128, as 8 bits without a sign: 128 times
// the sum of the key's elements is too much.
inline void starting_points(const Word* keys, int64_t steps, int32_t* start) {
#if GLM5_ISA_LEVEL == 2
  __m512i sum[4] = {};
  for (int64_t s = 0; s < steps; ++s)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
      sum[v] = _mm512_dpbusd_epi32(sum[v], _mm512_set1_epi8(1), _mm512_loadu_si512(keys + s * kTileKeys + 16 * v));
  for (int v = 0; v < 4; ++v)
    _mm512_storeu_si512(start + 16 * v, _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sum[v], 7)));
#else
  (void)keys, (void)steps;
  std::memset(start, 0, sizeof(int32_t) * kTileKeys);
#endif
}

// The heads of `count` queries as [query][head][step], q + 128 where that is what is multiplied.
inline const Word* pack_queries(const i8* q, int64_t count, int64_t dim, uint32_t* buffer) {
  const int64_t steps = Packing<i8>::steps(dim);
  const uint32_t* words = pack_heads(q, count, dim, buffer);
#if GLM5_ISA_LEVEL == 2
  for (int64_t i = 0; i < count * steps; ++i) buffer[i] = words[i] ^ 0x80808080u;
#endif
  (void)words, (void)steps;
  return reinterpret_cast<const Word*>(buffer);
}

// Adds NH heads to NV vectors of scores.
template <int NH, int NV>
GLM5_INLINE void add_heads(const Word* heads, const float* weights, int64_t steps, const Word* keys, const int32_t* start,
                           F (&total)[NV]) {
  Ints dots[NH][NV];
#pragma GCC unroll 8
  for (int h = 0; h < NH; ++h)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) dots[h][v] = load_ints(start + v * F::kLanes);
  add_dot_products<NH, NV>(heads, steps, keys, dots);
#pragma GCC unroll 8
  for (int h = 0; h < NH; ++h) {
    const F weight = splat<F>(weights[h]);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) total[v] = fma(weight, max(splat<F>(0), to_real(dots[h][v])), total[v]);
  }
}

template <int NV>
void score_vectors(const Word* heads, const float* weights, int64_t num_heads, int64_t steps, const Word* keys,
                   const int32_t* start, const float* scale, float* scores) {
  F total[NV];
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) total[v] = splat<F>(0);
  int64_t h = 0;
  for (; h + kHeads <= num_heads; h += kHeads)
    add_heads<kHeads, NV>(heads + h * steps, weights + h, steps, keys, start, total);
  if (h < num_heads) GLM5_COUNT_PATH("lightning_indexer_int8: single head");
  for (; h < num_heads; ++h) add_heads<1, NV>(heads + h * steps, weights + h, steps, keys, start, total);
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) store(scores + v * F::kLanes, total[v] * load(scale + v * F::kLanes));
}

// A tile of keys, and the heads of a block of queries beside it.
struct Block {
  int64_t num_heads, dim, steps;
  uint32_t* keys;
  uint32_t* buffer;
  const Word* heads;
  alignas(64) int32_t start[kTileKeys];
  alignas(64) float scale[kTileKeys] = {};

  Block(const LightningIndexerArgs& a, int64_t q0, int64_t q1)
      : num_heads(a.num_heads), dim(a.dim), steps(Packing<i8>::steps(a.dim)) {
    const Scratch<i8> scratch(a, kBlockQueries);
    keys = scratch.keys, buffer = scratch.heads;
    heads = pack_queries(static_cast<const i8*>(a.q) + q0 * num_heads * dim, (q1 - q0) * num_heads, dim, buffer);
  }

  void load_keys(const LightningIndexerArgs& a, int64_t first) {
    const int64_t count = min_of(kTileKeys, a.num_keys - first);
    pack_keys(KeyRows<i8>{static_cast<const i8*>(a.k) + first * dim, dim}, count, keys);
    std::memcpy(scale, a.k_scale + first, sizeof(float) * count);
    starting_points(reinterpret_cast<const Word*>(keys), steps, start);
  }

  // scores[i] for the block's query t and the keys i of the tile in [first, last), and perhaps for their neighbours.
  void score(int64_t t, const float* weights, int64_t first, int64_t last, float* scores) const {
    constexpr int64_t L = F::kLanes;
    const Word* mine = heads + t * num_heads * steps;
    const Word* words = reinterpret_cast<const Word*>(keys);
    int64_t i = first / L * L;
    for (; i + kVectors * L <= kTileKeys && i + (kVectors - 1) * L < last; i += kVectors * L) {
      GLM5_COUNT_PATH("lightning_indexer_int8: full register block");
      score_vectors<kVectors>(mine, weights, num_heads, steps, words + i, start + i, scale + i, scores + i);
    }
    for (; i < last; i += L) {
      GLM5_COUNT_PATH("lightning_indexer_int8: single vector of keys");
      score_vectors<1>(mine, weights, num_heads, steps, words + i, start + i, scale + i, scores + i);
    }
  }
};

#else

inline int16_t* widen(const i8* from, int64_t count, int16_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i].value;
  return to;
}

inline int32_t dot(const int16_t* a, const int16_t* b, int64_t n) {
  int32_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// The same in plain C++, elements widened to 16 bits.
struct Block {
  int64_t num_heads, dim;
  int16_t* keys;
  const int16_t* heads;
  float scale[kTileKeys] = {};

  Block(const LightningIndexerArgs& a, int64_t q0, int64_t q1) : num_heads(a.num_heads), dim(a.dim) {
    const int64_t rows = (q1 - q0) * num_heads;
    keys = static_cast<int16_t*>(thread_scratch(0, sizeof(int16_t) * ((kTileKeys + rows) * dim + 1)));
    heads = widen(static_cast<const i8*>(a.q) + q0 * num_heads * dim, rows * dim, keys + kTileKeys * dim);
  }

  void load_keys(const LightningIndexerArgs& a, int64_t first) {
    const int64_t count = min_of(kTileKeys, a.num_keys - first);
    widen(static_cast<const i8*>(a.k) + first * dim, count * dim, keys);
    std::memcpy(scale, a.k_scale + first, sizeof(float) * count);
  }

  void score(int64_t t, const float* weights, int64_t first, int64_t last, float* scores) const {
    GLM5_COUNT_PATH("lightning_indexer_int8: one key at a time");
    for (int64_t i = first; i < last; ++i) {
      float total = 0;
      for (int64_t h = 0; h < num_heads; ++h) {
        const int32_t product = dot(heads + (t * num_heads + h) * dim, keys + i * dim, dim);
        total = __builtin_fmaf(weights[h], static_cast<float>(product > 0 ? product : 0), total);
      }
      scores[i] = total * scale[i];
    }
  }
};

#endif

template <>
void score_block<i8>(const LightningIndexerArgs& a, int64_t q0, int64_t q1, int64_t first, int64_t last, float* scores,
                     int64_t stride) {
  int64_t low, high;
  visible_range(a, q0, q1, first, last, &low, &high);
  if (low >= high) return;
  Block block(a, q0, q1);
  alignas(64) float tile_scores[kTileKeys];
  for (int64_t tile = low / kTileKeys * kTileKeys; tile < high; tile += kTileKeys) {
    block.load_keys(a, tile);
    for (int64_t t = q0; t < q1; ++t) {
      const int64_t begin = max_of(max_of(a.ks[t], first), tile), end = min_of(min_of(a.ke[t], last), tile + kTileKeys);
      if (begin >= end) continue;
      const float* weights = static_cast<const float*>(a.weights) + t * a.num_heads;
      float* out = scores + (t - q0) * stride + begin - first;
      if (end - begin == kTileKeys) {
        block.score(t - q0, weights, 0, kTileKeys, out);
      } else {
        block.score(t - q0, weights, begin - tile, end - tile, tile_scores);
        std::memcpy(out, tile_scores + begin - tile, sizeof(float) * (end - begin));
      }
    }
  }
}

}  // namespace

void lightning_indexer_logits_int8(const LightningIndexerArgs& args) { logits<i8>(args); }
void lightning_indexer_topk_int8(const LightningIndexerArgs& args) { topk<i8>(args); }

}  // namespace glm5::cpu::GLM5_ISA
