// silu(gate) * up on the CPU: elementwise in float32, rounded once.
#include "common/parallel.h"
#include "common/simd.h"
#include "silu_mul/silu_mul.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int64_t kTaskElements = 1 << 14;

// Runs fn(row, begin, end) over pieces of about kTaskElements columns. Columns are cut at multiples of 64, but since the
// arithmetic is elementwise the cut shows in no bit.
template <class Fn>
void over_pieces(int64_t rows, int64_t width, const Fn& fn) {
  if (rows == 0 || width == 0) return;
  if (width >= kTaskElements) {
    const int64_t pieces = (width + kTaskElements - 1) / kTaskElements;
    parallel_tasks(rows * pieces, [&](int64_t task) {
      const int64_t begin = task % pieces * kTaskElements;
      fn(task / pieces, begin, begin + kTaskElements < width ? begin + kTaskElements : width);
    });
    return;
  }
  const int64_t block = kTaskElements / width;
  parallel_tasks((rows + block - 1) / block, [&](int64_t task) {
    const int64_t end = (task + 1) * block < rows ? (task + 1) * block : rows;
    for (int64_t row = task * block; row < end; ++row) fn(row, int64_t{0}, width);
  });
}

template <class T>
void forward(const SiluMulArgs& a) {
  using V = Vector<T>;
  const V one = splat<V>(1), zero = splat<V>(0);
  over_pieces(a.rows, a.width, [&](int64_t row, int64_t begin, int64_t end) {
    const T* gate = static_cast<const T*>(a.x) + row * 2 * a.width;
    const T* up = gate + a.width;
    T* y = static_cast<T*>(a.y) + row * a.width;
    int64_t i = begin;
    for (; i + V::kLanes <= end; i += V::kLanes) {
      const V g = load(gate + i);
      store(y + i, g / (one + exp(zero - g)) * load(up + i));
    }
    if (i < end) {
      const V g = load_n(gate + i, end - i);
      store_n(y + i, g / (one + exp(zero - g)) * load_n(up + i, end - i), end - i);
    }
  });
}

// With s = sigmoid(gate): dup = dy gate s, dgate = dy up s (1 + gate (1 - s)). 1 - s is formed as e^-g / (1 + e^-g), which
// keeps its digits where s is next to 1.
template <class T>
void backward(const SiluMulArgs& a) {
  using V = Vector<T>;
  const V one = splat<V>(1), zero = splat<V>(0), highest = splat<V>(80);
  over_pieces(a.rows, a.width, [&](int64_t row, int64_t begin, int64_t end) {
    const T* gate = static_cast<const T*>(a.x) + row * 2 * a.width;
    const T* up = gate + a.width;
    const T* dy = static_cast<const T*>(a.dy) + row * a.width;
    T* dgate = static_cast<T*>(a.dx) + row * 2 * a.width;
    T* dup = dgate + a.width;
    for (int64_t i = begin; i < end; i += V::kLanes) {
      const int64_t n = end - i;
      const V g = load_n(gate + i, n), u = load_n(up + i, n), d = load_n(dy + i, n);
      const V minus = zero - g;
      const V e = exp(min(highest, minus));  // of NaN: NaN
      const V inverse = one / (one + e), rest = e * inverse;
      const V s = where_lt(highest, minus, zero, inverse);
      store_n(dup + i, d * (g * s), n);
      store_n(dgate + i, d * u * (s * fma(g, rest, one)), n);
    }
  });
}

}  // namespace

void silu_mul_forward(const SiluMulArgs& args) {
  if (args.dtype == 0) forward<bf16>(args);
  else if (args.dtype == 1) forward<float>(args);
#if GLM5_ISA_LEVEL == 0
  else forward<double>(args);
#endif
}

void silu_mul_backward(const SiluMulArgs& args) {
  if (args.dtype == 0) backward<bf16>(args);
  else if (args.dtype == 1) backward<float>(args);
#if GLM5_ISA_LEVEL == 0
  else backward<double>(args);
#endif
}

}  // namespace glm5::cpu::GLM5_ISA
