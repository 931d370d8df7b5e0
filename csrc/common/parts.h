// The end of a sum whose terms were added in parts: by a fixed cut of the rows, so that the order, and with it every bit,
// is free of the thread count.
#pragma once

#include "common/simd.h"

namespace glm5::cpu::GLM5_ISA {

// out[i] = parts[i] + parts[stride + i] + ..., count parts in order, for first <= i < last.
template <class T>
GLM5_INLINE void add_parts(const Acc<T>* parts, int64_t count, int64_t stride, int64_t first, int64_t last, T* out) {
  using V = Vector<T>;
  for (int64_t i = first; i < last; i += V::kLanes) {
    V total = splat<V>(0);
    for (int64_t part = 0; part < count; ++part) total = total + load_n(parts + part * stride + i, last - i);
    store_n(out + i, total, last - i);
  }
}

}  // namespace glm5::cpu::GLM5_ISA
