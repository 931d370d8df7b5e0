// Argument checks for op bindings. A failed check throws std::invalid_argument, which Python sees as ValueError; its
// message names the op, the argument, what it got and what it wants. Only binding.cpp files include this.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/isa.h"
#include "common/large_outputs.h"
#include "common/out_of_memory.h"

namespace glm5 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Dtype : int { bf16 = 0, float32 = 1, float64 = 2 };

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream s;
  s << '[';
  for (int64_t i = 0; i < t.dim(); ++i) s << (i ? ", " : "") << t.size(i);
  s << ']';
  return s.str();
}

inline void check_cpu(const char* op, const char* name, const Tensor& t) {
  if (!t.is_cpu()) fail(op, ": ", name, " is on another device, want cpu");
}

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim, const char* layout) {
  if (t.dim() != dim) fail(op, ": ", name, " has shape ", shape_of(t), ", want ", dim, " dimensions ", layout);
}

// `want` is the size that dimension `dim` must have; `why` says where it comes from.
inline void check_size(const char* op, const char* name, const Tensor& t, int64_t dim, int64_t want, const char* why) {
  if (t.size(dim) != want)
    fail(op, ": ", name, " has shape ", shape_of(t), ", want size ", want, " in dimension ", dim, " (", why, ")");
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, std::initializer_list<ScalarType> wanted) {
  const ScalarType got = t.scalar_type();
  for (ScalarType w : wanted)
    if (got == w) return;
  std::ostringstream list;
  const char* comma = "";
  for (ScalarType w : wanted) {
    list << comma << torch::headeronly::toString(w);
    comma = " or ";
  }
  fail(op, ": ", name, " has dtype ", torch::headeronly::toString(got), ", want ", list.str());
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& t, const char* like_name, const Tensor& like) {
  if (t.scalar_type() != like.scalar_type())
    fail(op, ": ", name, " has dtype ", torch::headeronly::toString(t.scalar_type()), ", want that of ", like_name, ", ",
         torch::headeronly::toString(like.scalar_type()));
}

// bfloat16, float32 or float64.
inline Dtype float_dtype(const char* op, const char* name, const Tensor& t) {
  check_dtype(op, name, t, {ScalarType::BFloat16, ScalarType::Float, ScalarType::Double});
  if (t.scalar_type() == ScalarType::BFloat16) return Dtype::bf16;
  return t.scalar_type() == ScalarType::Float ? Dtype::float32 : Dtype::float64;
}

// The tensor itself where it is contiguous, else a copy that is. torch's own looks its op up by name even where there is
// nothing to do.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline size_t element_bytes(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::BFloat16:
      return 2;
    default:
      return 1;
  }
}

// A new contiguous CPU tensor.
inline Tensor empty_cpu(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  size_t bytes = element_bytes(dtype);
  for (const int64_t size : sizes)
    if (__builtin_mul_overflow(bytes, static_cast<size_t>(size), &bytes))
      throw OutOfMemory(std::numeric_limits<size_t>::max());
  if (bytes >= kLargeOutput) {
    if (std::optional<Tensor> large = large_output(sizes, dtype, bytes)) return *large;
    throw OutOfMemory(bytes);
  }
  try {
    return torch::stable::empty(sizes, dtype, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  } catch (const std::runtime_error&) {  // says only that torch's allocator failed
    throw OutOfMemory(bytes);
  }
}

inline Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty_cpu(torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

inline Tensor empty_like_contiguous(const Tensor& t) { return empty_cpu(t.sizes(), t.scalar_type()); }

// Runs an op's body; where there is no memory for what it needs the error names the op.
template <class Body>
void naming_op(const char* op, const Body& body) {
  try {
    body();
  } catch (const OutOfMemory& error) {
    throw OutOfMemory(error.bytes(), op);
  }
}

}  // namespace glm5

// Registers the function `op` as the kernel of the op of that name: GLM5_IMPL(m, rms_norm).
#define GLM5_IMPL(m, op) \
  m.impl(#op, [](StableIValue* stack, uint64_t num_inputs, uint64_t num_outputs) { \
    ::glm5::naming_op(#op, [&] { TORCH_BOX (&op)(stack, num_inputs, num_outputs); }); \
  })
