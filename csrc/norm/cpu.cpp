// RMS normalisation on the CPU. A row is normalised by one task from its own values alone (row invariance).
#include "norm/norm.h"

#include "common/parallel.h"
#include "common/parts.h"
#include "common/simd.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

// 1 / sqrt(mean(x^2) + eps), the sum taken in vector lanes from element 0.
template <class T>
Acc<T> reciprocal_rms(const T* x, int64_t dim, double eps) {
  using V = Vector<T>;
  constexpr int L = V::kLanes;
  V total = splat<V>(0);
  int64_t i = 0;
  for (; i + L <= dim; i += L) {
    const V v = load(x + i);
    total = fma(v, v, total);
  }
  if (i < dim) {
    const V v = load_n(x + i, dim - i);
    total = fma(v, v, total);
  }
  const Acc<T> mean = sum(total) / static_cast<Acc<T>>(dim) + static_cast<Acc<T>>(eps);
  if constexpr (sizeof(Acc<T>) == 8) return 1 / __builtin_sqrt(mean);
  else return 1 / __builtin_sqrtf(mean);
}

template <class T>
void forward(const RmsNormArgs& a) {
  using V = Vector<T>;
  constexpr int L = V::kLanes;
  const T* weight = static_cast<const T*>(a.weight);
  const int64_t block = kRmsNormRowBlock;
  parallel_tasks((a.rows + block - 1) / block, [&](int64_t task) {
    const int64_t end = (task + 1) * block < a.rows ? (task + 1) * block : a.rows;
    for (int64_t row = task * block; row < end; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.dim;
      T* y = static_cast<T*>(a.y) + row * a.dim;
      const V scale = splat<V>(reciprocal_rms(x, a.dim, a.eps));
      int64_t i = 0;
      for (; i + L <= a.dim; i += L) store(y + i, through_storage<T>(load(x + i) * scale) * load(weight + i));
      if (i < a.dim)
        store_n(y + i, through_storage<T>(load_n(x + i, a.dim - i) * scale) * load_n(weight + i, a.dim - i), a.dim - i);
    }
  });
}

// With r = 1/rms(x) and g = dy * weight:  dx = r * (g - x * r^2 * mean(g * x)),  dweight = sum over rows of dy * x * r.
template <class T>
void backward(const RmsNormArgs& a) {
  using V = Vector<T>;
  using S = Acc<T>;
  constexpr int L = V::kLanes;
  const T* weight = static_cast<const T*>(a.weight);
  const int64_t block = kRmsNormRowBlock, blocks = (a.rows + block - 1) / block;
  parallel_tasks(blocks, [&](int64_t task) {
    S* partial = static_cast<S*>(a.partial) + task * a.dim;
    std::memset(partial, 0, sizeof(S) * a.dim);
    const int64_t end = (task + 1) * block < a.rows ? (task + 1) * block : a.rows;
    for (int64_t row = task * block; row < end; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.dim;
      const T* dy = static_cast<const T*>(a.dy) + row * a.dim;
      T* dx = static_cast<T*>(a.dx) + row * a.dim;
      const S r = reciprocal_rms(x, a.dim, a.eps);
      V dot = splat<V>(0);
      for (int64_t i = 0; i < a.dim; i += L) {
        const int64_t n = a.dim - i;
        dot = fma(load_n(dy + i, n) * load_n(weight + i, n), load_n(x + i, n), dot);
      }
      const V scale = splat<V>(r), shift = splat<V>(r * r * r * (sum(dot) / static_cast<S>(a.dim)));
      for (int64_t i = 0; i < a.dim; i += L) {
        const int64_t n = a.dim - i;
        const V xv = load_n(x + i, n), g = load_n(dy + i, n);
        store_n(dx + i, fnma(xv, shift, g * load_n(weight + i, n) * scale), n);
        store_n(partial + i, fma(g, xv * scale, load_n(partial + i, n)), n);
      }
    }
  });
  add_parts(static_cast<const S*>(a.partial), blocks, a.dim, 0, a.dim, static_cast<T*>(a.dweight));
}

}  // namespace

void rms_norm_forward(const RmsNormArgs& args) {
  if (args.dtype == 0) forward<bf16>(args);
  else if (args.dtype == 1) forward<float>(args);
#if GLM5_ISA_LEVEL == 0
  else forward<double>(args);
#endif
}

void rms_norm_backward(const RmsNormArgs& args) {
  if (args.dtype == 0) backward<bf16>(args);
  else if (args.dtype == 1) backward<float>(args);
#if GLM5_ISA_LEVEL == 0
  else backward<double>(args);
#endif
}

}  // namespace glm5::cpu::GLM5_ISA
