// Cuts a thread's scratch into arrays, each 64-byte aligned, in two passes: the first, from base 0, adds up the size.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/parallel.h"
#include "common/simd.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

struct Carver {
  uintptr_t base;
  size_t used = 0;
  template <class X>
  X* take(int64_t count) {
    X* p = reinterpret_cast<X*>(base + used);
    used += (static_cast<size_t>(count) * sizeof(X) + 63) / 64 * 64;
    return p;
  }
};

// Calls carve(carver) twice: to measure, then with this thread's scratch `slot`.
template <class Fn>
GLM5_INLINE void carve_scratch(int slot, const Fn& carve) {
  Carver measure{0};
  carve(measure);
  Carver cut{reinterpret_cast<uintptr_t>(thread_scratch(slot, measure.used))};
  carve(cut);
}

}  // namespace
}  // namespace glm5::cpu::GLM5_ISA
