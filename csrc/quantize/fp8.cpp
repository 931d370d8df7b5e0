// Quantisation to e4m3 in blocks of 1 x 128 and 128 x 128, and back.
#include "common/pieces.h"
#include "common/quantize.h"
#include "quantize/quantize.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int64_t kBlock = 128;
// Blocks of 128 x 128 that are taken together, so that a row is read 8 blocks at a time: 256 KiB of bf16.
constexpr int64_t kBlocksTogether = 8;

GLM5_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
void quantize_rows(const Fp8Args& a) {
  over_pieces(a.batch * a.rows, a.columns, kBlock, [&](int64_t row, int64_t begin, int64_t end) {
    const int64_t first = row * a.columns + begin;
    row_to_fp8(static_cast<const T*>(a.x) + first, end - begin, a.power_of_two, reinterpret_cast<e4m3*>(a.q) + first,
               a.scale + row * a.column_blocks + begin / kBlock);
  });
}

// Runs fn(first row, rows, first column block, column blocks) over tiles of 128 rows and kBlocksTogether blocks, where rows
// are counted through the batch and the blocks through its scales.
template <class Fn>
void over_tiles(const Fp8Args& a, const Fn& fn) {
  const int64_t across = (a.column_blocks + kBlocksTogether - 1) / kBlocksTogether;
  parallel_tasks(a.batch * a.row_blocks * across, [&](int64_t task) {
    const int64_t stripe = task / across, in_batch = stripe % a.row_blocks * kBlock;
    const int64_t first = task % across * kBlocksTogether;
    fn(stripe / a.row_blocks * a.rows + in_batch, least(kBlock, a.rows - in_batch), stripe * a.column_blocks + first,
       first * kBlock, least((first + kBlocksTogether) * kBlock, a.columns));
  });
}

template <class T>
void quantize_tiles(const Fp8Args& a) {
  over_tiles(a, [&](int64_t first_row, int64_t rows, int64_t first_scale, int64_t begin, int64_t end) {
    const T* x = static_cast<const T*>(a.x) + first_row * a.columns;
    e4m3* q = reinterpret_cast<e4m3*>(a.q) + first_row * a.columns;
    LargestMagnitude<T> largest[kBlocksTogether];
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = begin, block = 0; i < end; i += kBlock, ++block)
        largest[block].add(x + row * a.columns + i, least(kBlock, end - i));
    float scale[kBlocksTogether];
    for (int64_t i = begin, block = 0; i < end; i += kBlock, ++block)
      scale[block] = a.scale[first_scale + block] = fp8_scale(largest[block].value(), a.power_of_two);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = begin, block = 0; i < end; i += kBlock, ++block)
        encode_fp8(x + row * a.columns + i, least(kBlock, end - i), scale[block], q + row * a.columns + i);
  });
}

template <class T>
GLM5_INLINE void decode_run(const e4m3* q, int64_t n, float scale, T* out) {
  const F s = splat<F>(scale);
  int64_t i = 0;
  for (; i + F::kLanes <= n; i += F::kLanes) store_one_nan(out + i, load(q + i) * s);
  if (i < n) store_one_nan_n(out + i, load_n(q + i, n - i) * s, n - i);
}

template <class T>
void dequantize(const Fp8Args& a) {
  over_pieces(a.batch * a.rows, a.columns, kBlock, [&](int64_t row, int64_t begin, int64_t end) {
    const e4m3* q = reinterpret_cast<const e4m3*>(a.codes) + row * a.columns;
    T* out = static_cast<T*>(a.out) + row * a.columns;
    const int64_t stripe = row / a.rows * a.row_blocks + row % a.rows / a.block_rows;
    const float* scale = a.scales + stripe * a.column_blocks + begin / kBlock;
    int64_t i = begin;
    for (; i + kBlock <= end; i += kBlock) decode_run(q + i, kBlock, *scale++, out + i);
    if (i < end) decode_run(q + i, end - i, *scale, out + i);
  });
}

}  // namespace

void quantize_fp8(const Fp8Args& args) {
  if (args.block_rows == 1) args.dtype == 0 ? quantize_rows<bf16>(args) : quantize_rows<float>(args);
  else args.dtype == 0 ? quantize_tiles<bf16>(args) : quantize_tiles<float>(args);
}

void dequantize_fp8(const Fp8Args& args) { args.dtype == 0 ? dequantize<bf16>(args) : dequantize<float>(args); }

}  // namespace glm5::cpu::GLM5_ISA
