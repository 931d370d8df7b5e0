// Layer normalisation on the CPU. A row is normalised by one task from its own values alone (row invariance).
#include "common/parallel.h"
#include "common/parts.h"
#include "common/simd.h"
#include "norm/norm.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

// Sum over i < dim of term(i, n) vectors, in vector lanes from element 0, in blocks short enough for float32.
template <class V, class Term>
GLM5_INLINE typename V::Scalar row_sum(int64_t dim, const Term& term) {
  constexpr int64_t kBlock = 128 * V::kLanes;
  typename V::Scalar total = 0;
  for (int64_t begin = 0; begin < dim; begin += kBlock) {
    const int64_t end = begin + kBlock < dim ? begin + kBlock : dim;
    V part = splat<V>(0);
    for (int64_t i = begin; i < end; i += V::kLanes) part = part + term(i, dim - i);
    total += sum(part);
  }
  return total;
}

template <class S>
struct Moments {
  S mean, rstd;
};

template <class T>
Moments<Acc<T>> moments(const T* x, int64_t dim, double eps) {
  using V = Vector<T>;
  using S = Acc<T>;
  const S mean = row_sum<V>(dim, [&](int64_t i, int64_t n) { return load_n(x + i, n); }) / static_cast<S>(dim);
  const V shift = splat<V>(mean);
  const S squares = row_sum<V>(dim, [&](int64_t i, int64_t n) {
    // The lanes past the end must add nothing: a masked load would give (0 - mean)^2 there.
    S d[V::kLanes];
    store(d, load_n(x + i, n) - shift);
    const V dv = load_n(d, n);
    return dv * dv;
  });
  const S variance = squares / static_cast<S>(dim) + static_cast<S>(eps);
  if constexpr (sizeof(S) == 8) return {mean, 1 / __builtin_sqrt(variance)};
  else return {mean, 1 / __builtin_sqrtf(variance)};
}

template <class T>
void forward(const LayerNormArgs& a) {
  using V = Vector<T>;
  const T* weight = static_cast<const T*>(a.weight);
  const T* bias = static_cast<const T*>(a.bias);
  const int64_t block = kRmsNormRowBlock;
  parallel_tasks((a.rows + block - 1) / block, [&](int64_t task) {
    const int64_t end = (task + 1) * block < a.rows ? (task + 1) * block : a.rows;
    for (int64_t row = task * block; row < end; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.dim;
      T* y = static_cast<T*>(a.y) + row * a.dim;
      const auto m = moments(x, a.dim, a.eps);
      const V mean = splat<V>(m.mean), rstd = splat<V>(m.rstd);
      for (int64_t i = 0; i < a.dim; i += V::kLanes) {
        const int64_t n = a.dim - i;
        store_n(y + i, fma((load_n(x + i, n) - mean) * rstd, load_n(weight + i, n), load_n(bias + i, n)), n);
      }
    }
  });
}

// With xhat = (x - mean) r and g = dy * weight: dx = r (g - mean(g) - xhat mean(g xhat)),
// dweight = sum over rows of dy xhat, dbias = sum over rows of dy.
template <class T>
void backward(const LayerNormArgs& a) {
  using V = Vector<T>;
  using S = Acc<T>;
  constexpr int L = V::kLanes;
  const T* weight = static_cast<const T*>(a.weight);
  const int64_t block = kRmsNormRowBlock, blocks = (a.rows + block - 1) / block;
  parallel_tasks(blocks, [&](int64_t task) {
    S* dweight = static_cast<S*>(a.partial) + task * 2 * a.dim;
    S* dbias = dweight + a.dim;
    std::memset(dweight, 0, sizeof(S) * 2 * a.dim);
    const int64_t end = (task + 1) * block < a.rows ? (task + 1) * block : a.rows;
    for (int64_t row = task * block; row < end; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.dim;
      const T* dy = static_cast<const T*>(a.dy) + row * a.dim;
      T* dx = static_cast<T*>(a.dx) + row * a.dim;
      const auto m = moments(x, a.dim, a.eps);
      const V mean = splat<V>(m.mean), rstd = splat<V>(m.rstd);
      const auto g = [&](int64_t i, int64_t n) { return load_n(dy + i, n) * load_n(weight + i, n); };
      const auto xhat = [&](int64_t i, int64_t n) { return (load_n(x + i, n) - mean) * rstd; };
      const S size = static_cast<S>(a.dim);
      const V g_mean = splat<V>(row_sum<V>(a.dim, g) / size);
      const V gx_mean = splat<V>(row_sum<V>(a.dim, [&](int64_t i, int64_t n) { return g(i, n) * xhat(i, n); }) / size);
      for (int64_t i = 0; i < a.dim; i += L) {
        const int64_t n = a.dim - i;
        const V h = xhat(i, n), d = load_n(dy + i, n);
        store_n(dx + i, fnma(h, gx_mean, g(i, n) - g_mean) * rstd, n);
        store_n(dweight + i, fma(d, h, load_n(dweight + i, n)), n);
        store_n(dbias + i, d + load_n(dbias + i, n), n);
      }
    }
  });
  const S* parts = static_cast<const S*>(a.partial);
  add_parts(parts, blocks, 2 * a.dim, 0, a.dim, static_cast<T*>(a.dweight));
  add_parts(parts + a.dim, blocks, 2 * a.dim, 0, a.dim, static_cast<T*>(a.dbias));
}

}  // namespace

void layer_norm_forward(const LayerNormArgs& args) {
  if (args.dtype == 0) forward<bf16>(args);
  else if (args.dtype == 1) forward<float>(args);
#if GLM5_ISA_LEVEL == 0
  else forward<double>(args);
#endif
}

void layer_norm_backward(const LayerNormArgs& args) {
  if (args.dtype == 0) backward<bf16>(args);
  else if (args.dtype == 1) backward<float>(args);
#if GLM5_ISA_LEVEL == 0
  else backward<double>(args);
#endif
}

}  // namespace glm5::cpu::GLM5_ISA
