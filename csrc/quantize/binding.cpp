// Schemas, argument checks and dispatch of the quantize family.
#include "quantize/quantize.h"

#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"

namespace glm5 {
namespace {

using Shape = std::vector<int64_t>;

Tensor empty_of(const Shape& shape, ScalarType dtype) {
  return empty_cpu(torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()), dtype);
}

Shape shape_vector(const Tensor& t) {
  Shape shape(static_cast<size_t>(t.dim()));
  for (int64_t i = 0; i < t.dim(); ++i) shape[i] = t.size(i);
  return shape;
}

int64_t product(const Shape& shape, size_t dims) {
  int64_t n = 1;
  for (size_t i = 0; i < dims; ++i) n *= shape[i];
  return n;
}

std::string text_of(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

void check_least_dims(const char* op, const char* name, const Tensor& t, int64_t dims, const char* layout) {
  if (t.dim() < dims) fail(op, ": ", name, " has shape ", shape_of(t), ", want at least ", dims, " dimensions ", layout);
}

void check_shape(const char* op, const char* name, const Tensor& t, const Shape& want, const char* why) {
  if (shape_vector(t) != want) fail(op, ": ", name, " has shape ", shape_of(t), ", want ", text_of(want), " (", why, ")");
}

int short_float(const char* op, const char* name, const Tensor& t) {
  check_cpu(op, name, t);
  check_dtype(op, name, t, {ScalarType::BFloat16, ScalarType::Float});
  return t.scalar_type() == ScalarType::BFloat16 ? 0 : 1;
}

int out_type(const char* op, ScalarType dtype) {
  if (dtype != ScalarType::BFloat16 && dtype != ScalarType::Float)
    fail(op, ": out_dtype is ", torch::headeronly::toString(dtype), ", want BFloat16 or Float");
  return dtype == ScalarType::BFloat16 ? 0 : 1;
}

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Sizes of x or q [..., M, K] and the shape of its scales.
Shape fp8_sizes(const char* op, const char* name, const Tensor& t, int64_t block_rows, int64_t block_columns,
                Fp8Args& args) {
  if ((block_rows != 1 && block_rows != 128) || block_columns != 128)
    fail(op, ": block is (", block_rows, ", ", block_columns, "), want (1, 128) or (128, 128)");
  check_least_dims(op, name, t, 2, "[..., M, K]");
  Shape shape = shape_vector(t);
  const size_t dims = shape.size();
  args.batch = product(shape, dims - 2);
  args.rows = shape[dims - 2];
  args.columns = shape[dims - 1];
  args.block_rows = block_rows;
  shape[dims - 2] = args.row_blocks = blocks(args.rows, block_rows);
  shape[dims - 1] = args.column_blocks = blocks(args.columns, block_columns);
  return shape;
}

std::tuple<Tensor, Tensor> quantize_fp8(const Tensor& x_in, int64_t block_rows, int64_t block_columns, bool power_of_two) {
  const char* op = "quantize_fp8";
  Fp8Args args{};
  args.dtype = short_float(op, "x", x_in);
  const Shape scale_shape = fp8_sizes(op, "x", x_in, block_rows, block_columns, args);
  args.power_of_two = power_of_two;
  const Tensor x = as_contiguous(x_in);
  Tensor q = empty_of(shape_vector(x), ScalarType::Float8_e4m3fn), scale = empty_of(scale_shape, ScalarType::Float);
  args.x = x.const_data_ptr();
  args.q = static_cast<uint8_t*>(q.mutable_data_ptr());
  args.scale = static_cast<float*>(scale.mutable_data_ptr());
  GLM5_CALL_KERNEL(false, quantize_fp8, args);
  return {q, scale};
}

Tensor dequantize_fp8(const Tensor& q_in, const Tensor& scale_in, int64_t block_rows, int64_t block_columns,
                      ScalarType out_dtype) {
  const char* op = "dequantize_fp8";
  check_cpu(op, "q", q_in);
  check_dtype(op, "q", q_in, {ScalarType::Float8_e4m3fn});
  check_cpu(op, "scale", scale_in);
  check_dtype(op, "scale", scale_in, {ScalarType::Float});
  Fp8Args args{};
  const Shape scale_shape = fp8_sizes(op, "q", q_in, block_rows, block_columns, args);
  check_shape(op, "scale", scale_in, scale_shape, "one a block of q");
  args.dtype = out_type(op, out_dtype);
  const Tensor q = as_contiguous(q_in), scale = as_contiguous(scale_in);
  Tensor out = empty_of(shape_vector(q), out_dtype);
  args.codes = static_cast<const uint8_t*>(q.const_data_ptr());
  args.scales = static_cast<const float*>(scale.const_data_ptr());
  args.out = out.mutable_data_ptr();
  GLM5_CALL_KERNEL(false, dequantize_fp8, args);
  return out;
}

std::tuple<Tensor, Tensor> quantize_int8(const Tensor& x_in) {
  const char* op = "quantize_int8";
  Int8Args args{};
  args.dtype = short_float(op, "x", x_in);
  check_least_dims(op, "x", x_in, 1, "[..., K]");
  const Tensor x = as_contiguous(x_in);
  Shape shape = shape_vector(x);
  Tensor q = empty_of(shape, ScalarType::Char);
  args.columns = shape.back();
  shape.pop_back();
  args.rows = product(shape, shape.size());
  Tensor scale = empty_of(shape, ScalarType::Float);
  args.x = x.const_data_ptr();
  args.q = static_cast<int8_t*>(q.mutable_data_ptr());
  args.scale = static_cast<float*>(scale.mutable_data_ptr());
  GLM5_CALL_KERNEL(false, quantize_int8, args);
  return {q, scale};
}

// Sizes of x [..., N, K] and the shape of its scales.
Shape int4_sizes(const char* op, const char* name, const Tensor& t, int64_t group_size, Int4Args& args) {
  if (group_size != 32 && group_size != 64 && group_size != 128 && group_size != -1)
    fail(op, ": group_size is ", group_size, ", want 32, 64, 128 or -1 (a row)");
  check_least_dims(op, name, t, 2, "[..., N, K]");
  Shape shape = shape_vector(t);
  args.columns = shape.back();
  if (group_size == -1 && args.columns % 2)
    fail(op, ": ", name, " has shape ", shape_of(t), ", want an even last dimension (two codes a byte)");
  if (group_size != -1 && args.columns % group_size)
    fail(op, ": ", name, " has shape ", shape_of(t), ", want a last dimension that group_size = ", group_size, " divides");
  args.rows = product(shape, shape.size() - 1);
  shape.back() = args.groups = group_size == -1 ? 1 : args.columns / group_size;
  return shape;
}

// zeros is [0] where the codes are symmetric.
std::tuple<Tensor, Tensor, Tensor> quantize_int4(const Tensor& w_in, int64_t group_size, bool symmetric) {
  const char* op = "quantize_int4";
  Int4Args args{};
  args.dtype = short_float(op, "w", w_in);
  const Shape scale_shape = int4_sizes(op, "w", w_in, group_size, args);
  args.symmetric = symmetric;
  const Tensor w = as_contiguous(w_in);
  Shape shape = shape_vector(w);
  shape.back() /= 2;
  Tensor packed = empty_of(shape, ScalarType::Byte), scale = empty_of(scale_shape, ScalarType::Float);
  Tensor zeros = empty_of(symmetric ? Shape{0} : scale_shape, ScalarType::Byte);
  args.x = w.const_data_ptr();
  args.q = static_cast<uint8_t*>(packed.mutable_data_ptr());
  args.scale = static_cast<float*>(scale.mutable_data_ptr());
  args.zeros = static_cast<uint8_t*>(zeros.mutable_data_ptr());
  GLM5_CALL_KERNEL(false, quantize_int4, args);
  return {packed, scale, zeros};
}

Tensor dequantize_int4(const Tensor& packed_in, const Tensor& scale_in, std::optional<Tensor> zeros_in,
                       ScalarType out_dtype) {
  const char* op = "dequantize_int4";
  check_cpu(op, "packed", packed_in);
  check_dtype(op, "packed", packed_in, {ScalarType::Byte});
  check_least_dims(op, "packed", packed_in, 2, "[..., N, K / 2]");
  check_cpu(op, "scale", scale_in);
  check_dtype(op, "scale", scale_in, {ScalarType::Float});
  check_least_dims(op, "scale", scale_in, 2, "[..., N, groups]");
  Int4Args args{};
  Shape shape = shape_vector(packed_in);
  shape.back() *= 2;
  args.columns = shape.back();
  args.rows = product(shape, shape.size() - 1);
  args.groups = scale_in.size(scale_in.dim() - 1);
  Shape scale_shape = shape;
  scale_shape.back() = args.groups;
  check_shape(op, "scale", scale_in, scale_shape, "one a group of packed's rows");
  if (args.columns && (args.groups == 0 || args.columns % (2 * args.groups)))
    fail(op, ": scale has shape ", shape_of(scale_in), ", want groups of equal, even size for the ", args.columns,
         " codes of a row of packed");
  if (zeros_in) {
    check_cpu(op, "zeros", *zeros_in);
    check_dtype(op, "zeros", *zeros_in, {ScalarType::Byte});
    check_shape(op, "zeros", *zeros_in, scale_shape, "that of scale");
  }
  args.dtype = out_type(op, out_dtype);
  args.symmetric = !zeros_in;
  const Tensor packed = as_contiguous(packed_in), scale = as_contiguous(scale_in);
  std::optional<Tensor> zeros;
  if (zeros_in) zeros = as_contiguous(*zeros_in);
  Tensor out = empty_of(shape, out_dtype);
  args.codes = static_cast<const uint8_t*>(packed.const_data_ptr());
  args.scales = static_cast<const float*>(scale.const_data_ptr());
  args.zero_points = zeros ? static_cast<const uint8_t*>(zeros->const_data_ptr()) : nullptr;
  args.out = out.mutable_data_ptr();
  GLM5_CALL_KERNEL(false, dequantize_int4, args);
  return out;
}

Tensor fake_quantize_int4(const Tensor& x_in, int64_t group_size, bool symmetric) {
  const char* op = "fake_quantize_int4";
  Int4Args args{};
  args.dtype = short_float(op, "x", x_in);
  int4_sizes(op, "x", x_in, group_size, args);
  args.symmetric = symmetric;
  const Tensor x = as_contiguous(x_in);
  Tensor out = empty_like_contiguous(x);
  args.x = x.const_data_ptr();
  args.out = out.mutable_data_ptr();
  GLM5_CALL_KERNEL(false, fake_quantize_int4, args);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glm5, m) {
  m.def("quantize_fp8(Tensor x, int block_rows, int block_columns, bool power_of_two) -> (Tensor, Tensor)");
  m.def("dequantize_fp8(Tensor q, Tensor scale, int block_rows, int block_columns, ScalarType out_dtype) -> Tensor");
  m.def("quantize_int8(Tensor x) -> (Tensor, Tensor)");
  m.def("quantize_int4(Tensor w, int group_size, bool symmetric) -> (Tensor, Tensor, Tensor)");
  m.def("dequantize_int4(Tensor packed, Tensor scale, Tensor? zeros, ScalarType out_dtype) -> Tensor");
  m.def("fake_quantize_int4(Tensor x, int group_size, bool symmetric) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(glm5, CPU, m) {
  GLM5_IMPL(m, quantize_fp8);
  GLM5_IMPL(m, dequantize_fp8);
  GLM5_IMPL(m, quantize_int8);
  GLM5_IMPL(m, quantize_int4);
  GLM5_IMPL(m, dequantize_int4);
  GLM5_IMPL(m, fake_quantize_int4);
}

}  // namespace glm5
