#include "common/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace glm5 {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "amx"};

#if defined(__x86_64__)
// The tile registers need the kernel's leave (arch_prctl), asked for once per process.
bool tiles_are_permitted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx() {
  unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  // AMX-BF16, AMX-TILE, AMX-INT8, and GFNI, which no processor with tiles lacks.
  return ((edx >> 22) & 1u) && ((edx >> 24) & 1u) && ((edx >> 25) & 1u) && ((ecx >> 8) & 1u);
}
#endif

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
                      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
  if (avx512 && has_amx() && tiles_are_permitted()) return Isa::amx;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

Isa parse(const char* name) {
  for (int i = 0; i < 4; ++i)
    if (std::strcmp(name, kNames[i]) == 0) return static_cast<Isa>(i);
  throw std::invalid_argument(std::string("GLM5_CPU_ISA: got '") + name + "', want one of portable, avx2, avx512, amx");
}

Isa checked(const char* name) {
  const Isa wanted = parse(name);
  if (wanted > best_isa())
    throw std::invalid_argument(std::string("GLM5_CPU_ISA: this processor lacks '") + name + "'; its best is '" +
                                kNames[static_cast<int>(best_isa())] + "'");
  return wanted;
}

std::atomic<int> g_isa{-1};

}  // namespace

Isa current_isa() {
  int isa = g_isa.load(std::memory_order_relaxed);
  if (isa < 0) {
    const char* wanted = std::getenv("GLM5_CPU_ISA");
    isa = static_cast<int>(wanted && *wanted ? checked(wanted) : best_isa());
    g_isa.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

}  // namespace glm5

// Plain C entry points for glm5._native (ctypes): no torch type crosses them.
extern "C" {

__attribute__((visibility("default"))) const char* glm5_cpu_best_isa() { return glm5::isa_name(glm5::best_isa()); }

// Returns the set in force, or null (with the reason in glm5_last_error) when GLM5_CPU_ISA cannot be honoured.
static thread_local std::string g_last_error;

__attribute__((visibility("default"))) const char* glm5_cpu_isa() {
  try {
    return glm5::isa_name(glm5::current_isa());
  } catch (const std::exception& error) {
    g_last_error = error.what();
    return nullptr;
  }
}

// Switches the whole process to `name`; 0 on success. Meant for tests and benchmarks, between op calls.
__attribute__((visibility("default"))) int glm5_set_cpu_isa(const char* name) {
  try {
    glm5::g_isa.store(static_cast<int>(glm5::checked(name)));
    return 0;
  } catch (const std::exception& error) {
    g_last_error = error.what();
    return -1;
  }
}

__attribute__((visibility("default"))) const char* glm5_last_error() { return g_last_error.c_str(); }
}
