// Schemas, argument checks and dispatch of the norm family.
#include "norm/norm.h"

#include "common/checks.h"

namespace glm5 {
namespace {

RmsNormArgs rms_norm_args(const char* op, const Tensor& x, const Tensor& weight, double eps) {
  check_cpu(op, "x", x);
  check_cpu(op, "weight", weight);
  const Dtype dtype = float_dtype(op, "x", x);
  check_same_dtype(op, "weight", weight, "x", x);
  if (x.dim() < 1 || x.size(x.dim() - 1) < 1) fail(op, ": x has shape ", shape_of(x), ", want a non-empty last dimension");
  check_dim(op, "weight", weight, 1, "[dim]");
  check_size(op, "weight", weight, 0, x.size(x.dim() - 1), "the last dimension of x");
  if (!(eps >= 0)) fail(op, ": eps is ", eps, ", want a number >= 0");
  RmsNormArgs args{};
  args.dtype = static_cast<int>(dtype);
  args.dim = weight.size(0);
  args.rows = x.numel() / args.dim;
  args.eps = eps;
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr();
  return args;
}

void check_like_x(const char* op, const Tensor& dy, const Tensor& x) {
  bool same = dy.dim() == x.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = dy.size(i) == x.size(i);
  if (!same) fail(op, ": dy has shape ", shape_of(dy), ", want that of x, ", shape_of(x));
}

Tensor rms_norm(const Tensor& x_in, const Tensor& weight_in, double eps) {
  const Tensor x = as_contiguous(x_in), weight = as_contiguous(weight_in);
  RmsNormArgs args = rms_norm_args("rms_norm", x, weight, eps);
  Tensor y = empty_like_contiguous(x);
  args.y = y.mutable_data_ptr();
  GLM5_CALL_KERNEL(args.dtype == 2, rms_norm_forward, args);
  return y;
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy_in, const Tensor& x_in, const Tensor& weight_in, double eps) {
  const char* op = "rms_norm_backward";
  const Tensor x = as_contiguous(x_in), weight = as_contiguous(weight_in);
  const Tensor dy = as_contiguous(dy_in);
  RmsNormArgs args = rms_norm_args(op, x, weight, eps);
  check_cpu(op, "dy", dy);
  check_same_dtype(op, "dy", dy, "x", x);
  check_like_x(op, dy, x);
  Tensor dx = empty_like_contiguous(x), dweight = empty_like_contiguous(weight);
  Tensor partial = empty_cpu({(args.rows + kRmsNormRowBlock - 1) / kRmsNormRowBlock, args.dim},
                             args.dtype == 2 ? ScalarType::Double : ScalarType::Float);
  args.dy = dy.const_data_ptr();
  args.dx = dx.mutable_data_ptr();
  args.dweight = dweight.mutable_data_ptr();
  args.partial = partial.mutable_data_ptr();
  GLM5_CALL_KERNEL(args.dtype == 2, rms_norm_backward, args);
  return {dx, dweight};
}

LayerNormArgs layer_norm_args(const char* op, const Tensor& x, const Tensor& weight, double eps) {
  const RmsNormArgs common = rms_norm_args(op, x, weight, eps);
  LayerNormArgs args{};
  args.dtype = common.dtype;
  args.rows = common.rows;
  args.dim = common.dim;
  args.eps = eps;
  args.x = common.x;
  args.weight = common.weight;
  return args;
}

Tensor layer_norm(const Tensor& x_in, const Tensor& weight_in, const Tensor& bias_in, double eps) {
  const char* op = "layer_norm";
  const Tensor x = as_contiguous(x_in), weight = as_contiguous(weight_in);
  const Tensor bias = as_contiguous(bias_in);
  LayerNormArgs args = layer_norm_args(op, x, weight, eps);
  check_cpu(op, "bias", bias);
  check_same_dtype(op, "bias", bias, "x", x);
  check_dim(op, "bias", bias, 1, "[dim]");
  check_size(op, "bias", bias, 0, args.dim, "the last dimension of x");
  Tensor y = empty_like_contiguous(x);
  args.bias = bias.const_data_ptr();
  args.y = y.mutable_data_ptr();
  GLM5_CALL_KERNEL(args.dtype == 2, layer_norm_forward, args);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy_in, const Tensor& x_in, const Tensor& weight_in,
                                                       double eps) {
  const char* op = "layer_norm_backward";
  const Tensor x = as_contiguous(x_in), weight = as_contiguous(weight_in);
  const Tensor dy = as_contiguous(dy_in);
  LayerNormArgs args = layer_norm_args(op, x, weight, eps);
  check_cpu(op, "dy", dy);
  check_same_dtype(op, "dy", dy, "x", x);
  check_like_x(op, dy, x);
  Tensor dx = empty_like_contiguous(x), dweight = empty_like_contiguous(weight), dbias = empty_like_contiguous(weight);
  Tensor partial = empty_cpu({(args.rows + kRmsNormRowBlock - 1) / kRmsNormRowBlock, 2, args.dim},
                             args.dtype == 2 ? ScalarType::Double : ScalarType::Float);
  args.dy = dy.const_data_ptr();
  args.dx = dx.mutable_data_ptr();
  args.dweight = dweight.mutable_data_ptr();
  args.dbias = dbias.mutable_data_ptr();
  args.partial = partial.mutable_data_ptr();
  GLM5_CALL_KERNEL(args.dtype == 2, layer_norm_backward, args);
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glm5, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, float eps) -> (Tensor dx, Tensor dweight)");
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor");
  m.def("layer_norm_backward(Tensor dy, Tensor x, Tensor weight, float eps) -> (Tensor dx, Tensor dweight, Tensor dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(glm5, CPU, m) {
  GLM5_IMPL(m, rms_norm);
  GLM5_IMPL(m, rms_norm_backward);
  GLM5_IMPL(m, layer_norm);
  GLM5_IMPL(m, layer_norm_backward);
}

}  // namespace glm5
