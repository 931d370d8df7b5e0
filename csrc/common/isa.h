// Which instruction set the CPU kernels run on: chosen once at load time from what the processor has, or forced by
// GLM5_CPU_ISA. Kernels are compiled once per set, each in its own namespace, so that the linker can never merge
// AVX-512 code into the portable path. This file knows nothing about any op.
#pragma once

namespace glm5 {

// Ordered: a processor that has a set has every set before it.
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, amx = 3 };

// The set in force. Throws std::invalid_argument when GLM5_CPU_ISA names a set that does not exist or that this
// processor lacks.
Isa current_isa();
const char* isa_name(Isa isa);

}  // namespace glm5

// Declares `signature` once in each per-set namespace: GLM5_DECLARE_KERNEL(void rms_norm(const RmsNormArgs& args)).
#define GLM5_DECLARE_KERNEL(...) \
  namespace glm5::cpu { \
  namespace portable { \
  __VA_ARGS__; \
  } \
  namespace avx2 { \
  __VA_ARGS__; \
  } \
  namespace avx512 { \
  __VA_ARGS__; \
  } \
  }

// Calls the kernel of the set in force. float64 exists in the portable namespace only (it is there for gradcheck).
#if defined(__x86_64__)
#define GLM5_CALL_KERNEL(is_float64, fn, ...) \
  do { \
    const ::glm5::Isa glm5_isa = (is_float64) ? ::glm5::Isa::portable : ::glm5::current_isa(); \
    if (glm5_isa >= ::glm5::Isa::avx512) ::glm5::cpu::avx512::fn(__VA_ARGS__); \
    else if (glm5_isa == ::glm5::Isa::avx2) ::glm5::cpu::avx2::fn(__VA_ARGS__); \
    else ::glm5::cpu::portable::fn(__VA_ARGS__); \
  } while (0)
#else
#define GLM5_CALL_KERNEL(is_float64, fn, ...) \
  do { \
    (void)(is_float64); \
    ::glm5::current_isa(); \
    ::glm5::cpu::portable::fn(__VA_ARGS__); \
  } while (0)
#endif
