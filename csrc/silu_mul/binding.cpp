// Schemas, argument checks and dispatch of the silu_mul family.
#include "silu_mul/silu_mul.h"

#include <tuple>

#include "common/checks.h"

namespace glm5 {
namespace {

SiluMulArgs silu_mul_args(const char* op, const Tensor& x) {
  check_cpu(op, "x", x);
  SiluMulArgs args{};
  args.dtype = static_cast<int>(float_dtype(op, "x", x));
  check_dim(op, "x", x, 2, "[rows, 2 * width]");
  if (x.size(1) % 2) fail(op, ": x has shape ", shape_of(x), ", want an even last dimension (gate, then up)");
  args.rows = x.size(0);
  args.width = x.size(1) / 2;
  args.x = x.const_data_ptr();
  return args;
}

Tensor silu_mul(const Tensor& x_in) {
  const Tensor x = as_contiguous(x_in);
  SiluMulArgs args = silu_mul_args("silu_mul", x);
  Tensor y = empty_cpu({args.rows, args.width}, x.scalar_type());
  args.y = y.mutable_data_ptr();
  GLM5_CALL_KERNEL(args.dtype == 2, silu_mul_forward, args);
  return y;
}

Tensor silu_mul_backward(const Tensor& dy_in, const Tensor& x_in) {
  const char* op = "silu_mul_backward";
  const Tensor x = as_contiguous(x_in), dy = as_contiguous(dy_in);
  SiluMulArgs args = silu_mul_args(op, x);
  check_cpu(op, "dy", dy);
  check_same_dtype(op, "dy", dy, "x", x);
  check_dim(op, "dy", dy, 2, "[rows, width]");
  check_size(op, "dy", dy, 0, args.rows, "the rows of x");
  check_size(op, "dy", dy, 1, args.width, "half the columns of x");
  Tensor dx = empty_like_contiguous(x);
  args.dy = dy.const_data_ptr();
  args.dx = dx.mutable_data_ptr();
  GLM5_CALL_KERNEL(args.dtype == 2, silu_mul_backward, args);
  return dx;
}

std::tuple<Tensor, Tensor> silu_mul_quantize(const Tensor& x_in, ScalarType dtype, bool power_of_two) {
  const char* op = "silu_mul_quantize";
  if (dtype != ScalarType::Float8_e4m3fn && dtype != ScalarType::Char)
    fail(op, ": dtype is ", torch::headeronly::toString(dtype), ", want Float8_e4m3fn or Char (int8)");
  const Tensor x = as_contiguous(x_in);
  const SiluMulArgs checked = silu_mul_args(op, x);
  check_dtype(op, "x", x, {ScalarType::BFloat16, ScalarType::Float});
  SiluMulQuantizeArgs args{};
  args.to_int8 = dtype == ScalarType::Char;
  if (args.to_int8 && power_of_two) fail(op, ": power_of_two is True, want False with int8");
  args.power_of_two = power_of_two;
  args.dtype = checked.dtype;
  args.rows = checked.rows;
  args.width = checked.width;
  args.x = checked.x;
  Tensor q = empty_cpu({args.rows, args.width}, dtype);
  Tensor scale = args.to_int8 ? empty_cpu({args.rows}, ScalarType::Float)
                              : empty_cpu({args.rows, (args.width + 127) / 128}, ScalarType::Float);
  args.q = q.mutable_data_ptr();
  args.scale = static_cast<float*>(scale.mutable_data_ptr());
  GLM5_CALL_KERNEL(false, silu_mul_quantize, args);
  return {q, scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glm5, m) {
  m.def("silu_mul(Tensor x) -> Tensor");
  m.def("silu_mul_backward(Tensor dy, Tensor x) -> Tensor");
  m.def("silu_mul_quantize(Tensor x, ScalarType dtype, bool power_of_two) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(glm5, CPU, m) {
  GLM5_IMPL(m, silu_mul);
  GLM5_IMPL(m, silu_mul_backward);
  GLM5_IMPL(m, silu_mul_quantize);
}

}  // namespace glm5
