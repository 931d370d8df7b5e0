// The ceiling of the AMX tile unit: four accumulator tiles fed from registers.
#include "common/peak/peak.h"

#include <immintrin.h>
#include <cstring>

namespace glm5::cpu::amx {

namespace {

template <class Step>
double run(int64_t rounds, double flops_a_step, const Step& step) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
  // GCC 12's intrinsic names 8 bytes of the configuration as its input; without this the other stores are dropped.
  __asm__ volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t r = 0; r < rounds * 100; ++r) step();
  _tile_release();
  return rounds * 100.0 * 4 * flops_a_step;
}

}  // namespace

double peak_bf16(int64_t rounds) {
  return run(rounds, 2 * 16 * 16 * 32, [] {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  });
}

double peak_int8(int64_t rounds) {
  return run(rounds, 2 * 16 * 16 * 64, [] {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  });
}

}  // namespace glm5::cpu::amx
