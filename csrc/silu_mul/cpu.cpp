// silu(gate) * up on the CPU: elementwise in float32, rounded once.
#include "common/pieces.h"
#include "silu_mul/activation.h"
#include "silu_mul/silu_mul.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

template <class T>
void forward(const SiluMulArgs& a) {
  over_pieces(a.rows, a.width, 64, [&](int64_t row, int64_t begin, int64_t end) {
    const T* gate = static_cast<const T*>(a.x) + row * 2 * a.width + begin;
    activate(gate, gate + a.width, end - begin, static_cast<T*>(a.y) + row * a.width + begin);
  });
}

// With s = sigmoid(gate): dup = dy gate s, dgate = dy up s (1 + gate (1 - s)). 1 - s is formed as e^-g / (1 + e^-g), which
// keeps its digits where s is next to 1.
template <class T>
void backward(const SiluMulArgs& a) {
  using V = Vector<T>;
  const V one = splat<V>(1), zero = splat<V>(0), highest = splat<V>(80);
  over_pieces(a.rows, a.width, 64, [&](int64_t row, int64_t begin, int64_t end) {
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
