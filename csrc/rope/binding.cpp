// Schemas, argument checks and dispatch of the rope family.
#include "rope/rope.h"

#include "common/checks.h"

namespace glm5 {
namespace {

template <class Int>
void check_positions(const char* op, const Tensor& positions, int64_t limit) {
  const Int* p = static_cast<const Int*>(positions.const_data_ptr());
  for (int64_t t = 0; t < positions.size(0); ++t)
    if (p[t] < 0 || p[t] >= limit)
      fail(op, ": positions[", t, "] is ", static_cast<int64_t>(p[t]), ", want 0 <= position < ", limit,
           " (the rows of cos)");
}

Tensor rotated(const char* op, const char* x_name, const Tensor& x_in, const Tensor& cos_in, const Tensor& sin_in,
               const Tensor& positions_in, bool interleaved, double sign) {
  check_cpu(op, x_name, x_in);
  const Dtype dtype = float_dtype(op, x_name, x_in);
  if (x_in.dim() != 2 && x_in.dim() != 3)
    fail(op, ": ", x_name, " has shape ", shape_of(x_in), ", want [tokens, heads, dim] or [tokens, dim]");
  const int64_t last = x_in.dim() - 1, dim = x_in.size(last), tokens = x_in.size(0);
  if (dim < 2 || dim % 2) fail(op, ": ", x_name, " has shape ", shape_of(x_in), ", want an even last dimension >= 2");
  const Tensor x = x_in.stride(last) == 1 ? x_in : as_contiguous(x_in);
  const Tensor cos = as_contiguous(cos_in), sin = as_contiguous(sin_in);
  const Tensor positions = as_contiguous(positions_in);
  check_cpu(op, "cos", cos);
  check_cpu(op, "sin", sin);
  check_cpu(op, "positions", positions);
  const ScalarType table = dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
  check_dtype(op, "cos", cos, {table});
  check_dtype(op, "sin", sin, {table});
  check_dim(op, "cos", cos, 2, "[positions, dim / 2]");
  check_dim(op, "sin", sin, 2, "[positions, dim / 2]");
  check_size(op, "cos", cos, 1, dim / 2, "half the last dimension of x");
  check_size(op, "sin", sin, 1, dim / 2, "half the last dimension of x");
  check_size(op, "sin", sin, 0, cos.size(0), "the rows of cos");
  check_dtype(op, "positions", positions, {ScalarType::Int, ScalarType::Long});
  check_dim(op, "positions", positions, 1, "[tokens]");
  check_size(op, "positions", positions, 0, tokens, "the tokens of x");

  RopeArgs args{};
  args.dtype = static_cast<int>(dtype);
  args.interleaved = interleaved;
  args.wide_positions = positions.scalar_type() == ScalarType::Long;
  if (args.wide_positions) check_positions<int64_t>(op, positions, cos.size(0));
  else check_positions<int32_t>(op, positions, cos.size(0));
  args.sign = sign;
  args.tokens = tokens;
  args.heads = x.dim() == 3 ? x.size(1) : 1;
  args.dim = dim;
  args.x_token_stride = x.stride(0);
  args.x_head_stride = x.dim() == 3 ? x.stride(1) : 0;
  Tensor y = empty_like_contiguous(x);
  args.x = x.const_data_ptr();
  args.cos = cos.const_data_ptr();
  args.sin = sin.const_data_ptr();
  args.positions = positions.const_data_ptr();
  args.y = y.mutable_data_ptr();
  GLM5_CALL_KERNEL(args.dtype == 2, rope, args);
  return y;
}

Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& positions, bool interleaved) {
  return rotated("rope", "x", x, cos, sin, positions, interleaved, 1);
}

Tensor rope_backward(const Tensor& dy, const Tensor& cos, const Tensor& sin, const Tensor& positions, bool interleaved) {
  return rotated("rope_backward", "dy", dy, cos, sin, positions, interleaved, -1);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glm5, m) {
  m.def("rope(Tensor x, Tensor cos, Tensor sin, Tensor positions, bool interleaved) -> Tensor");
  m.def("rope_backward(Tensor dy, Tensor cos, Tensor sin, Tensor positions, bool interleaved) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(glm5, CPU, m) {
  GLM5_IMPL(m, rope);
  GLM5_IMPL(m, rope_backward);
}

}  // namespace glm5
