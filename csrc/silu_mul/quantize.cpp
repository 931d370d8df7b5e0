// silu(gate) * up, quantised to FP8 or int8 while it lies in the cache: the bits of silu_mul and then quantize_fp8 (1 x 128)
// or quantize_int8.
#include "common/quantize.h"
#include "common/pieces.h"
#include "silu_mul/activation.h"
#include "silu_mul/silu_mul.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int64_t kBlock = 128;

template <class T>
void to_fp8(const SiluMulQuantizeArgs& a) {
  over_pieces(a.rows, a.width, kBlock, [&](int64_t row, int64_t begin, int64_t end) {
    const T* gate = static_cast<const T*>(a.x) + row * 2 * a.width;
    const T* up = gate + a.width;
    e4m3* q = static_cast<e4m3*>(a.q) + row * a.width;
    float* scale = a.scale + row * ((a.width + kBlock - 1) / kBlock);
    T y[kBlocksAhead * kBlock];
    for (int64_t i = begin; i < end; i += kBlocksAhead * kBlock) {
      const int64_t n = end - i < kBlocksAhead * kBlock ? end - i : kBlocksAhead * kBlock;
      activate(gate + i, up + i, n, y);
      row_to_fp8(y, n, a.power_of_two, q + i, scale + i / kBlock);
    }
  });
}

template <class T>
void to_int8(const SiluMulQuantizeArgs& a) {
  // A row has one scale: it is not cut.
  over_pieces(a.rows, a.width, a.width, [&](int64_t row, int64_t, int64_t n) {
    const T* gate = static_cast<const T*>(a.x) + row * 2 * n;
    T* y = static_cast<T*>(thread_scratch(0, static_cast<size_t>(n) * sizeof(T)));
    activate(gate, gate + n, n, y);
    const float scale = a.scale[row] = int8_scale(largest_magnitude(y, n));
    encode_int8(y, n, scale, static_cast<int8_t*>(a.q) + row * n);
  });
}

}  // namespace

void silu_mul_quantize(const SiluMulQuantizeArgs& args) {
  if (!args.to_int8) return args.dtype == 0 ? to_fp8<bf16>(args) : to_fp8<float>(args);
  if (args.width == 0)
    for (int64_t row = 0; row < args.rows; ++row) args.scale[row] = int8_scale(0);
  args.dtype == 0 ? to_int8<bf16>(args) : to_int8<float>(args);
}

}  // namespace glm5::cpu::GLM5_ISA
