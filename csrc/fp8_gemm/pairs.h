// e4m3 as pairs of bf16, sixty-four values at once, for the sets that multiply such pairs.
#pragma once

#include "common/e4m3.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

#if GLM5_ISA_LEVEL == 2

// The two bytes of the bf16 value of every magnitude.
struct E4m3Bytes {
  alignas(64) uint8_t low[128], high[128];
  constexpr E4m3Bytes() : low(), high() {
    for (int i = 0; i < 128; ++i) {
      int bits = (i << 4) + (120 << 7);
      if (i < 8) {  // i 2^-9
        int power = 0;
        while (i >> (power + 1)) ++power;
        bits = i == 0 ? 0 : ((118 + power) << 7) + (i << (7 - power)) - 128;
      }
      if (i == 127) bits = 0x7fc0;
      low[i] = static_cast<uint8_t>(bits & 255);
      high[i] = static_cast<uint8_t>(bits >> 8);
    }
  }
};
constexpr E4m3Bytes kE4m3Bytes;

// In the order that costs least: 32 bits of `even` hold values 4 i and 4 i + 2, those of `odd` values 4 i + 1 and 4 i + 3.
struct PairDecoder {
  __m512i low0, low1, high0, high1;
  GLM5_INLINE PairDecoder()
      : low0(_mm512_load_si512(kE4m3Bytes.low)),
        low1(_mm512_load_si512(kE4m3Bytes.low + 64)),
        high0(_mm512_load_si512(kE4m3Bytes.high)),
        high1(_mm512_load_si512(kE4m3Bytes.high + 64)) {}
  GLM5_INLINE void operator()(__m512i x, __m512i& even, __m512i& odd) const {
    const __m512i even_bytes = _mm512_set1_epi16(0xff), sign = _mm512_set1_epi8(static_cast<char>(0x80));
    const __m512i low = _mm512_permutex2var_epi8(low0, x, low1);
    // 0xea: a & b | c; 0xba: a & ~b | c.
    const __m512i high = _mm512_ternarylogic_epi64(x, sign, _mm512_permutex2var_epi8(high0, x, high1), 0xea);
    even = _mm512_ternarylogic_epi64(low, even_bytes, _mm512_slli_epi16(high, 8), 0xea);
    odd = _mm512_ternarylogic_epi64(high, even_bytes, _mm512_srli_epi16(low, 8), 0xba);
  }
};

GLM5_INLINE __m512i load_64(const e4m3* p) { return _mm512_loadu_si512(p); }
// As many as there are of 64; the others are 0.
GLM5_INLINE __m512i load_64(const e4m3* p, int64_t n) {
  return n <= 0 ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi8(n >= 64 ? ~0ull : (1ull << n) - 1, p);
}

#endif

}  // namespace
}  // namespace glm5::cpu::GLM5_ISA
