// Orthonormal Hadamard rotation of rows on the CPU: log2(dim) rounds of butterflies in float32, one scaling at the end.
// A row is rotated by one task from its own values alone (row invariance).
#include "hadamard/hadamard.h"

#include "common/parallel.h"
#include "common/simd.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int64_t kElementsPerTask = 1 << 15;

// One round: (a, b) -> (a + b, a - b) for every pair `half` apart.
template <class V>
void butterflies(typename V::Scalar* row, int64_t dim, int64_t half) {
  if (half >= V::kLanes) {
    for (int64_t i = 0; i < dim; i += 2 * half)
      for (int64_t j = i; j < i + half; j += V::kLanes) {
        const V a = load(row + j), b = load(row + j + half);
        store(row + j, a + b);
        store(row + j + half, a - b);
      }
  } else {
    for (int64_t i = 0; i < dim; i += 2 * half)
      for (int64_t j = i; j < i + half; ++j) {
        const auto a = row[j], b = row[j + half];
        row[j] = a + b;
        row[j + half] = a - b;
      }
  }
}

template <class T>
void rotate(const HadamardArgs& args) {
  using V = Vector<T>;
  using S = Acc<T>;
  S scale;
  if constexpr (sizeof(S) == 8) scale = 1 / __builtin_sqrt(static_cast<S>(args.dim));
  else scale = 1 / __builtin_sqrtf(static_cast<S>(args.dim));
  const int64_t block = args.dim >= kElementsPerTask ? 1 : kElementsPerTask / args.dim;
  parallel_tasks((args.rows + block - 1) / block, [&](int64_t task) {
    S* row = static_cast<S*>(thread_scratch(0, sizeof(S) * args.dim));
    const int64_t end = (task + 1) * block < args.rows ? (task + 1) * block : args.rows;
    for (int64_t r = task * block; r < end; ++r) {
      const T* x = static_cast<const T*>(args.x) + r * args.dim;
      T* y = static_cast<T*>(args.y) + r * args.dim;
      for (int64_t i = 0; i < args.dim; i += V::kLanes) store_n(row + i, load_n(x + i, args.dim - i), args.dim - i);
      for (int64_t half = 1; half < args.dim; half *= 2) butterflies<V>(row, args.dim, half);
      for (int64_t i = 0; i < args.dim; i += V::kLanes)
        store_n(y + i, load_n(row + i, args.dim - i) * splat<V>(scale), args.dim - i);
    }
  });
}

}  // namespace

void rotate_hadamard(const HadamardArgs& args) {
  if (args.dtype == 0) rotate<bf16>(args);
  else if (args.dtype == 1) rotate<float>(args);
#if GLM5_ISA_LEVEL == 0
  else rotate<double>(args);
#endif
}

}  // namespace glm5::cpu::GLM5_ISA
