// Schema, argument checks and dispatch of the Hadamard rotation.
#include "hadamard/hadamard.h"

#include "common/checks.h"

namespace glm5 {
namespace {

Tensor rotate_hadamard(const Tensor& x_in) {
  const char* op = "rotate_hadamard";
  check_cpu(op, "x", x_in);
  const Dtype dtype = float_dtype(op, "x", x_in);
  const int64_t dim = x_in.dim() < 1 ? 0 : x_in.size(x_in.dim() - 1);
  if (dim < 1 || (dim & (dim - 1)))
    fail(op, ": x has shape ", shape_of(x_in), ", want a last dimension that is a power of two");
  const Tensor x = torch::stable::contiguous(x_in);
  Tensor y = empty_like_contiguous(x);
  HadamardArgs args{static_cast<int>(dtype), x.numel() / dim, dim, x.const_data_ptr(), y.mutable_data_ptr()};
  GLM5_CALL_KERNEL(dtype == Dtype::float64, rotate_hadamard, args);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glm5, m) { m.def("rotate_hadamard(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(glm5, CPU, m) { GLM5_IMPL(m, rotate_hadamard); }

}  // namespace glm5
