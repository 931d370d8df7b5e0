// Register-only loops: enough independent accumulators to hide the latency, few enough not to spill.
#include "common/peak/peak.h"

#include "common/simd.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

#if GLM5_ISA_LEVEL == 0
constexpr int kAccumulators = 8;
#else
constexpr int kAccumulators = 12;
#endif

// The compiler must believe that the vector changed, or it would fold the loop.
GLM5_INLINE void touch(F& x) { __asm__ volatile("" : "+x"(x.v)); }

template <class Step>
GLM5_INLINE double run(int64_t rounds, double flops_a_step, const Step& step) {
  F c[kAccumulators];
  F a = splat<F>(0.f), b = splat<F>(0.f);
#pragma GCC unroll 16
  for (int i = 0; i < kAccumulators; ++i) c[i] = splat<F>(0.f);
  touch(a);
  touch(b);
  for (int64_t r = 0; r < rounds * 1000; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < kAccumulators; ++i) c[i] = step(a, b, c[i]);
#pragma GCC unroll 16
  for (int i = 0; i < kAccumulators; ++i) touch(c[i]);
  return rounds * 1000.0 * kAccumulators * flops_a_step;
}

}  // namespace

double peak_float32(int64_t rounds) {
  return run(rounds, 2.0 * F::kLanes, [](F a, F b, F c) {
    c = fma(a, b, c);
    touch(c);
    return c;
  });
}

double peak_bf16(int64_t rounds) {
#if GLM5_ISA_LEVEL == 2
  return run(rounds, 4.0 * F::kLanes, [](F a, F b, F c) {
    c.v = _mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v));
    touch(c);
    return c;
  });
#else
  return peak_float32(rounds);
#endif
}

double peak_int8(int64_t rounds) {
#if GLM5_ISA_LEVEL == 2
  return run(rounds, 8.0 * F::kLanes, [](F a, F b, F c) {
    c.v = _mm512_castsi512_ps(
        _mm512_dpbusd_epi32(_mm512_castps_si512(c.v), _mm512_castps_si512(a.v), _mm512_castps_si512(b.v)));
    touch(c);
    return c;
  });
#elif GLM5_ISA_LEVEL == 1
  return run(rounds, 8.0 * F::kLanes, [](F a, F b, F c) {
    F products = {_mm256_castsi256_ps(_mm256_maddubs_epi16(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v)))};
    touch(products);
    c.v = _mm256_castsi256_ps(_mm256_add_epi16(_mm256_castps_si256(c.v), _mm256_castps_si256(products.v)));
    touch(c);
    return c;
  });
#else
  return peak_float32(rounds);
#endif
}

float peak_read(const void* data, int64_t bytes) {
  constexpr int64_t kFloats = F::kLanes;
  const float* p = static_cast<const float*>(data);
  F sums[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) sums[i] = splat<F>(0.f);
  for (int64_t i = 0; i + 8 * kFloats <= bytes / 4; i += 8 * kFloats)
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sums[j] = sums[j] + load(p + i + j * kFloats);
  F total = sums[0];
  for (int i = 1; i < 8; ++i) total = total + sums[i];
  return sum(total);
}

}  // namespace glm5::cpu::GLM5_ISA
