// Rotary position embedding on the CPU. cos and sin of a token are spread over the row once, so that every head is
// y = x * c + partner(x) * s, elementwise: a row's bits depend on that row and its position alone.
#include "common/parallel.h"
#include "common/simd.h"
#include "rope/rope.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int64_t kTokenBlock = 16;

// (1, 0, 3, 2, ...)
#if GLM5_ISA_LEVEL == 2
GLM5_INLINE F swap_pairs(F a) { return {_mm512_permute_ps(a.v, 0xB1)}; }
#elif GLM5_ISA_LEVEL == 1
GLM5_INLINE F swap_pairs(F a) { return {_mm256_permute_ps(a.v, 0xB1)}; }
#else
GLM5_INLINE F swap_pairs(F a) { return {F::Native{a.v[1], a.v[0], a.v[3], a.v[2]}}; }
GLM5_INLINE D swap_pairs(D a) { return {D::Native{a.v[1], a.v[0]}}; }
#endif

template <class T, bool kInterleaved>
void rotate(const RopeArgs& a) {
  using V = Vector<T>;
  using S = Acc<T>;
  constexpr int L = V::kLanes;
  const int64_t half = a.dim / 2;
  parallel_tasks((a.tokens + kTokenBlock - 1) / kTokenBlock, [&](int64_t task) {
    S* c = static_cast<S*>(thread_scratch(0, sizeof(S) * 2 * a.dim));
    S* s = c + a.dim;
    const int64_t end = (task + 1) * kTokenBlock < a.tokens ? (task + 1) * kTokenBlock : a.tokens;
    for (int64_t t = task * kTokenBlock; t < end; ++t) {
      const int64_t position = a.wide_positions ? static_cast<const int64_t*>(a.positions)[t]
                                                : static_cast<const int32_t*>(a.positions)[t];
      const S* cos = static_cast<const S*>(a.cos) + position * half;
      const S* sin = static_cast<const S*>(a.sin) + position * half;
      for (int64_t i = 0; i < half; ++i) {
        const S turn = static_cast<S>(a.sign) * sin[i];
        const int64_t first = kInterleaved ? 2 * i : i, second = kInterleaved ? 2 * i + 1 : i + half;
        c[first] = c[second] = cos[i];
        s[first] = -turn;
        s[second] = turn;
      }
      for (int64_t h = 0; h < a.heads; ++h) {
        const T* x = static_cast<const T*>(a.x) + t * a.x_token_stride + h * a.x_head_stride;
        T* y = static_cast<T*>(a.y) + (t * a.heads + h) * a.dim;
        if constexpr (kInterleaved) {
          for (int64_t i = 0; i < a.dim; i += L) {
            const int64_t n = a.dim - i;
            const V v = load_n(x + i, n);
            store_n(y + i, v * load_n(c + i, n) + swap_pairs(v) * load_n(s + i, n), n);
          }
        } else {
          for (int64_t i = 0; i < half; i += L) {
            const int64_t n = half - i;
            const V v = load_n(x + i, n), w = load_n(x + half + i, n), cv = load_n(c + i, n);
            store_n(y + i, v * cv + w * load_n(s + i, n), n);
            store_n(y + half + i, w * cv + v * load_n(s + half + i, n), n);
          }
        }
      }
    }
  });
}

template <class T>
void rotate_any(const RopeArgs& a) {
  if (a.interleaved) rotate<T, true>(a);
  else rotate<T, false>(a);
}

}  // namespace

void rope(const RopeArgs& args) {
  if (args.dtype == 0) rotate_any<bf16>(args);
  else if (args.dtype == 1) rotate_any<float>(args);
#if GLM5_ISA_LEVEL == 0
  else rotate_any<double>(args);
#endif
}

}  // namespace glm5::cpu::GLM5_ISA
