// Plain C entry points of the ceilings, for benchmarks (ctypes). Each runs on all of torch's threads.
#include "common/peak/peak.h"

#include <atomic>
#include <cstring>

#include "common/parallel.h"

namespace glm5 {
namespace {

double float32_flops(int64_t rounds) {
#if defined(__x86_64__)
  if (current_isa() >= Isa::avx512) return cpu::avx512::peak_float32(rounds);
  if (current_isa() == Isa::avx2) return cpu::avx2::peak_float32(rounds);
#endif
  return cpu::portable::peak_float32(rounds);
}

double bf16_flops(int64_t rounds) {
#if defined(__x86_64__)
  if (current_isa() == Isa::amx) return cpu::amx::peak_bf16(rounds);
  if (current_isa() == Isa::avx512) return cpu::avx512::peak_bf16(rounds);
  if (current_isa() == Isa::avx2) return cpu::avx2::peak_bf16(rounds);
#endif
  return cpu::portable::peak_bf16(rounds);
}

double int8_flops(int64_t rounds) {
#if defined(__x86_64__)
  if (current_isa() == Isa::amx) return cpu::amx::peak_int8(rounds);
  if (current_isa() == Isa::avx512) return cpu::avx512::peak_int8(rounds);
  if (current_isa() == Isa::avx2) return cpu::avx2::peak_int8(rounds);
#endif
  return cpu::portable::peak_int8(rounds);
}

float read_sum(const void* data, int64_t bytes) {
#if defined(__x86_64__)
  if (current_isa() >= Isa::avx512) return cpu::avx512::peak_read(data, bytes);
  if (current_isa() == Isa::avx2) return cpu::avx2::peak_read(data, bytes);
#endif
  return cpu::portable::peak_read(data, bytes);
}

}  // namespace
}  // namespace glm5

extern "C" {

// Runs `tasks` shares of the loop `name` ("float32", "bf16", "int8": what the set in force multiplies those with) over all
// threads; returns the operations done, or -1 for another name. The caller holds the clock.
__attribute__((visibility("default"))) double glm5_peak_flops(const char* name, int64_t tasks) {
  double (*loop)(int64_t) = std::strcmp(name, "float32") == 0 ? glm5::float32_flops
                            : std::strcmp(name, "bf16") == 0  ? glm5::bf16_flops
                            : std::strcmp(name, "int8") == 0  ? glm5::int8_flops
                                                              : nullptr;
  if (!loop) return -1;
  std::atomic<int64_t> flops{0};
  glm5::parallel_tasks(tasks, [&](int64_t) { flops += static_cast<int64_t>(loop(20)); });
  return static_cast<double>(flops.load());
}

// Reads `bytes` bytes once, over all threads, in pieces of 1 MiB; returns how many it read.
__attribute__((visibility("default"))) double glm5_peak_read(const void* data, int64_t bytes) {
  constexpr int64_t kPiece = 1 << 20;
  const int64_t pieces = bytes / kPiece;
  std::atomic<int64_t> sink{0};
  glm5::parallel_tasks(pieces, [&](int64_t piece) {
    sink += static_cast<int64_t>(glm5::read_sum(static_cast<const char*>(data) + piece * kPiece, kPiece) != 0.f);
  });
  return static_cast<double>(pieces * kPiece);
}
}
