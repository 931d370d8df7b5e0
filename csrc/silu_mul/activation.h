// The activation itself, elementwise in float32 and rounded once, alone or on the way to being quantised.
#pragma once

#include "common/simd.h"

namespace glm5::cpu::GLM5_ISA {

// y[i] = silu(gate[i]) * up[i].
template <class T>
GLM5_INLINE void activate(const T* gate, const T* up, int64_t n, T* y) {
  using V = Vector<T>;
  const V one = splat<V>(1), zero = splat<V>(0);
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) {
    const V g = load(gate + i);
    store(y + i, g / (one + exp(zero - g)) * load(up + i));
  }
  if (i < n) {
    const V g = load_n(gate + i, n - i);
    store_n(y + i, g / (one + exp(zero - g)) * load_n(up + i, n - i), n - i);
  }
}

}  // namespace glm5::cpu::GLM5_ISA
