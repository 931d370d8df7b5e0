// Prepacking and its inverse: nibbles change places, nothing is computed. A task moves one block of columns.
#include "common/parallel.h"
#include "w4a8_gemm/layout.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

// Signed codes in two's complement <-> codes from 0: the top bit of every nibble turned over.
GLM5_INLINE uint32_t sign_bits(const W4A8Weight& w) { return w.zeros ? 0u : 0x88888888u; }

// 16 bits as four bytes, a nibble each, and back.
GLM5_INLINE uint32_t spread(uint32_t x) {
  x = (x | x << 8) & 0x00ff00ffu;
  return (x | x << 4) & 0x0f0f0f0fu;
}
GLM5_INLINE uint32_t gather(uint32_t x) {
  x = (x | x >> 4) & 0x00ff00ffu;
  return (x | x >> 8) & 0x0000ffffu;
}

// Nibbles 0 1 2 3 4 5 6 7 (the lowest first) as 0 4 1 5 2 6 3 7, and back.
GLM5_INLINE uint32_t interleaved(uint32_t x) { return spread(x & 0xffffu) | spread(x >> 16) << 4; }
GLM5_INLINE uint32_t in_order(uint32_t x) { return gather(x & 0x0f0f0f0fu) | gather(x >> 4 & 0x0f0f0f0fu) << 16; }

// fn(line, bytes, from, to) for every line of every column: `bytes` (up to 4) at `from` in packed, 4 at `to` in w.
template <class Fn>
GLM5_INLINE void each_line(const W4A8Weight& w, int64_t columns, int64_t group_bytes, const Fn& fn) {
  const int64_t lines = group_lines(w), row = inner(w) / 2;
  for (int64_t g = 0; g < w.groups; ++g)
    for (int64_t line = 0; line < lines; ++line) {
      const int64_t at = (g * w.group_size + line * kLineK) / 2, left = (w.group_size - line * kLineK) / 2;
      for (int64_t c = 0; c < columns; ++c)
        fn(left < 4 ? left : 4, c * row + at, g * group_bytes + (line * columns + c) * 4);
    }
}

}  // namespace

void w4a8_pack(const W4A8PackArgs& a) {
  const W4A8Weight& w = a.weight;
  const int64_t blocks = num_blocks(w), size = w.n * w.groups * w.row_bytes;
  parallel_tasks(a.count * blocks, [&](int64_t task) {
    const int64_t which = task / blocks, first = task % blocks * kBlock;
    const Block b = block_of(w, a.w + which * size, task % blocks);
    uint8_t* out = const_cast<uint8_t*>(b.data);
    const uint8_t* packed = a.packed + (which * w.n + first) * inner(w) / 2;
    const int64_t meta = (which * w.n + first) * w.groups;
    each_line(w, b.columns, b.group_bytes, [&](int64_t bytes, int64_t from, int64_t to) {
      uint32_t codes = 0;
      if (bytes == 4) std::memcpy(&codes, packed + from, 4);
      else std::memcpy(&codes, packed + from, bytes);
      codes = interleaved(codes ^ sign_bits(w));
      std::memcpy(out + to, &codes, 4);
    });
    for (int64_t g = 0; g < w.groups; ++g)
      for (int64_t c = 0; c < b.columns; ++c)
        std::memcpy(out + (g + 1) * b.group_bytes - 4 * (b.columns - c), a.scale + meta + c * w.groups + g, 4);
    uint8_t* rest = out + w.groups * b.group_bytes;
    for (int64_t g = 0; g < w.groups && w.zeros; ++g)
      for (int64_t c = 0; c < b.columns; ++c) *rest++ = a.zeros[meta + c * w.groups + g];
    const int64_t padding = out + b.columns * w.groups * w.row_bytes - rest;
    if (padding > 0) std::memset(rest, 0, padding);
  });
}

void w4a8_unpack(const W4A8PackArgs& a) {
  const W4A8Weight& w = a.weight;
  const int64_t blocks = num_blocks(w), size = w.n * w.groups * w.row_bytes;
  parallel_tasks(a.count * blocks, [&](int64_t task) {
    const int64_t which = task / blocks, first = task % blocks * kBlock;
    const Block b = block_of(w, a.w + which * size, task % blocks);
    uint8_t* packed = a.packed + (which * w.n + first) * inner(w) / 2;
    const int64_t meta = (which * w.n + first) * w.groups;
    each_line(w, b.columns, b.group_bytes, [&](int64_t bytes, int64_t at, int64_t from) {
      uint32_t codes;
      std::memcpy(&codes, b.data + from, 4);
      codes = in_order(codes) ^ sign_bits(w);
      if (bytes == 4) std::memcpy(packed + at, &codes, 4);
      else std::memcpy(packed + at, &codes, bytes);
    });
    for (int64_t g = 0; g < w.groups; ++g)
      for (int64_t c = 0; c < b.columns; ++c) {
        std::memcpy(a.scale + meta + c * w.groups + g, b.data + (g + 1) * b.group_bytes - 4 * (b.columns - c), 4);
        if (w.zeros) a.zeros[meta + c * w.groups + g] = b.zeros[g * b.columns + c];
      }
  });
}

}  // namespace glm5::cpu::GLM5_ISA
