// Orthonormal Hadamard rotation of rows on the CPU, in float32, with one scaling at the end. The matrix of dim is the
// Kronecker product of that of dim / lanes and that of a vector's lanes: the former is rounds of butterflies between
// vectors, the latter a product with the small matrix itself, which needs no shuffles. A row is rotated by one task from its
// own values alone (row invariance).
#include "hadamard/hadamard.h"

#include "common/parallel.h"
#include "common/simd.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int64_t kElementsPerTask = 1 << 15;

// One round: (a, b) -> (a + b, a - b) for every pair `half` apart.
template <class V>
void butterflies(typename V::Scalar* row, int64_t dim, int64_t half) {
  constexpr int64_t step = V::kLanes;
  for (int64_t i = 0; i < dim; i += 2 * half)
    for (int64_t j = i; j < i + half; j += step) {
      const V a = load(row + j), b = load(row + j + half);
      store(row + j, a + b);
      store(row + j + half, a - b);
    }
}

// Rotates each vector of the row by the matrix of its lanes.
template <class V>
void rotate_lanes(typename V::Scalar* row, int64_t dim, const typename V::Scalar* signs) {
  constexpr int L = V::kLanes;
  for (int64_t i = 0; i < dim; i += L) {
    V even = splat<V>(0), odd = splat<V>(0);  // two chains, so that an addition need not wait for the one before
#pragma GCC unroll 8
    for (int j = 0; j < L; j += 2) {
      even = fma(splat<V>(row[i + j]), load(signs + j * L), even);
      odd = fma(splat<V>(row[i + j + 1]), load(signs + (j + 1) * L), odd);
    }
    store(row + i, even + odd);
  }
}

template <class S>
void rotate_short(S* row, int64_t dim) {
  for (int64_t half = 1; half < dim; half *= 2)
    for (int64_t i = 0; i < dim; i += 2 * half)
      for (int64_t j = i; j < i + half; ++j) {
        const S a = row[j], b = row[j + half];
        row[j] = a + b;
        row[j + half] = a - b;
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
    constexpr int L = V::kLanes;
    S* row = static_cast<S*>(thread_scratch(0, sizeof(S) * args.dim));
    S signs[L * L];
    for (int i = 0; i < L * L; ++i) signs[i] = __builtin_parity(static_cast<unsigned>((i / L) & (i % L))) ? -1 : 1;
    const int64_t end = (task + 1) * block < args.rows ? (task + 1) * block : args.rows;
    for (int64_t r = task * block; r < end; ++r) {
      const T* x = static_cast<const T*>(args.x) + r * args.dim;
      T* y = static_cast<T*>(args.y) + r * args.dim;
      for (int64_t i = 0; i < args.dim; i += V::kLanes) store_n(row + i, load_n(x + i, args.dim - i), args.dim - i);
      if (args.dim >= L) {
        rotate_lanes<V>(row, args.dim, signs);
        for (int64_t half = L; half < args.dim; half *= 2) butterflies<V>(row, args.dim, half);
      } else {
        rotate_short(row, args.dim);
      }
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
