// int8 elements as words of 32 bits, the steps of tile.h's register blocks and of AMX tiles: four elements where the set
// multiplies four at a time (vpdpbusd, TDPBSSD), two that are widened to 16 bits in avx2 (vpmaddwd).
#pragma once

#include "lightning_indexer/tile.h"
#include "lightning_indexer_int8/lightning_indexer_int8.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

struct i8 {
  int8_t value;
};

#if GLM5_ISA_LEVEL > 0

constexpr int64_t kPerWord = GLM5_ISA_LEVEL == 2 ? 4 : 2;

template <>
struct Packing<i8> {
  using Element = uint32_t;
  static int64_t steps(int64_t dim) {
    constexpr int64_t kBlock = kPerWord * GLM5_INDEXER_STEP_BLOCK;
    return (dim + kBlock - 1) / kBlock * GLM5_INDEXER_STEP_BLOCK;
  }
};

// One row as words, those beyond its end being zero.
inline void pack_row(const i8* row, int64_t dim, int64_t steps, uint32_t* words) {
#if GLM5_ISA_LEVEL == 2
  std::memcpy(words, row, dim);
  std::memset(reinterpret_cast<char*>(words) + dim, 0, 4 * steps - dim);
#else
  int64_t d = 0;
  for (; d + 16 <= dim; d += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + d / 2),
                        _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + d))));
  for (; d < 2 * steps; d += 2) {
    const uint32_t even = d < dim ? static_cast<uint16_t>(row[d].value) : 0;
    const uint32_t odd = d + 1 < dim ? static_cast<uint16_t>(row[d + 1].value) : 0;
    words[d / 2] = even | odd << 16;
  }
#endif
}

// Whether a row is words as it lies in memory.
inline bool is_words(const i8* rows, int64_t dim) {
  return GLM5_ISA_LEVEL == 2 && dim == 4 * Packing<i8>::steps(dim) && reinterpret_cast<uintptr_t>(rows) % 4 == 0;
}

// As pack_keys of tile.h: a word is moved as if it were a float.
inline void pack_keys(const KeyRows<i8>& k, int64_t count, uint32_t* packed) {
  const int64_t steps = Packing<i8>::steps(k.dim);
  const void* rows = k.base;
  if (!k.base || k.indices || !is_words(k.base, k.dim)) {
    uint32_t* words = static_cast<uint32_t*>(thread_scratch(3, 4 * (count * steps + 1)));
    for (int64_t i = 0; i < count; ++i) pack_row(k[i], k.dim, steps, words + i * steps);
    rows = words;
  }
  pack_keys(KeyRows<float>{static_cast<const float*>(rows), steps}, count, reinterpret_cast<float*>(packed));
}

// As pack_heads of tile.h.
inline const uint32_t* pack_heads(const i8* q, int64_t num_heads, int64_t dim, uint32_t* buffer) {
  if (is_words(q, dim)) return reinterpret_cast<const uint32_t*>(q);
  const int64_t steps = Packing<i8>::steps(dim);
  for (int64_t h = 0; h < num_heads; ++h) pack_row(q + h * dim, dim, steps, buffer + h * steps);
  return buffer;
}

#endif

}  // namespace
}  // namespace glm5::cpu::GLM5_ISA
