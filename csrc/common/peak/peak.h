// What this processor can do at best: loops that touch registers only, and a plain read of memory. Benchmarks divide by
// them. Compiled once per instruction set, since each has its own ceiling.
#pragma once

#include <cstdint>

#include "common/isa.h"

// Each runs about `rounds` x 1000 dependent-free steps on the calling thread and returns the floating-point operations done.
// peak_bf16 is what bf16 products run on: TDPBF16PS in the amx set, vdpbf16ps in the avx512 set, float32 elsewhere.
// peak_int8 is what int8 products run on: TDPBSSD, vpdpbusd, vpmaddubsw with a 16-bit sum in the avx2 set (no int32 sum
// is faster), float32 in the portable one.
// The operands are zeros; normally distributed ones ran at the same rate within 0.1 %, each way (Sapphire Rapids).
// peak_read sums `bytes` bytes (a multiple of 1024) and returns the sum, so that the reads cannot be dropped.
GLM5_DECLARE_KERNEL(double peak_float32(int64_t rounds); double peak_bf16(int64_t rounds); double peak_int8(int64_t rounds);
                    float peak_read(const void* data, int64_t bytes))

#if defined(__x86_64__)
namespace glm5::cpu::amx {
double peak_bf16(int64_t rounds);  // TDPBF16PS
double peak_int8(int64_t rounds);  // TDPBSSD
}  // namespace glm5::cpu::amx
#endif
