// Schemas, argument checks and dispatch of the w4a8_gemm family.
#include "w4a8_gemm/w4a8_gemm.h"

#include <cstring>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "w4a8_gemm/amx.h"

namespace glm5 {
namespace {

// Kernels split sums of x over a group into 11 and 16 bits: those of 2^18 numbers fit. So do the products in an int32.
constexpr int64_t kLongestGroup = int64_t{1} << 18;

bool is_group_size(int64_t size) { return size == 32 || size == 64 || size == 128; }

// What a column takes in a group: whole lines of 8 k, the scale, the zero point, and a byte for every two k that fill the
// last line. The shape [..., n, groups, row_bytes] and the dtype (int8: no zero points) say all that a product must know.
W4A8Weight describe(int64_t n, int64_t groups, int64_t group_size, bool zeros) {
  const int64_t lines = (group_size + 7) / 8;
  return {n, groups, group_size, zeros, 4 * lines + 4 + zeros + (8 * lines - group_size) / 2};
}

// The weight of a tensor that w4a8_prepack made; `dim` dimensions (any number from 3 on, if 0).
W4A8Weight weight_of(const char* op, const Tensor& w, int64_t dim, const char* layout) {
  check_cpu(op, "w", w);
  check_dtype(op, "w", w, {ScalarType::Char, ScalarType::Byte});
  if (dim) check_dim(op, "w", w, dim, layout);
  else if (w.dim() < 3) fail(op, ": w has shape ", shape_of(w), ", want at least 3 dimensions ", layout);
  const int64_t n = w.size(w.dim() - 3), groups = w.size(w.dim() - 2), row_bytes = w.size(w.dim() - 1);
  const bool zeros = w.scalar_type() == ScalarType::Byte;
  const int64_t lines = (row_bytes - 4 - zeros) / 4, padding = (row_bytes - 4 - zeros) % 4;
  const int64_t group_size = 8 * lines - 2 * padding;
  if (row_bytes < 4 + zeros || group_size < 0 || group_size > kLongestGroup || (groups == 0 && group_size != 0) ||
      (groups > 1 && !is_group_size(group_size)))
    fail(op, ": w has shape ", shape_of(w), ", want that of a weight from w4a8_prepack");
  return describe(n, groups, group_size, zeros);
}

std::vector<int64_t> leading(const Tensor& t, int64_t without) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < t.dim() - without; ++i) sizes.push_back(t.size(i));
  return sizes;
}

int64_t product_of(const std::vector<int64_t>& sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) product *= size;
  return product;
}

Tensor w4a8_prepack(const Tensor& packed_in, const Tensor& scale_in, const std::optional<Tensor>& zeros_in) {
  const char* op = "w4a8_prepack";
  check_cpu(op, "packed", packed_in);
  check_cpu(op, "scale", scale_in);
  check_dtype(op, "packed", packed_in, {ScalarType::Byte});
  check_dtype(op, "scale", scale_in, {ScalarType::Float});
  const int64_t dim = packed_in.dim();
  if (dim < 2) fail(op, ": packed has shape ", shape_of(packed_in), ", want at least 2 dimensions [..., N, K/2]");
  check_dim(op, "scale", scale_in, dim, "[..., N, groups]");
  for (int64_t i = 0; i < dim - 1; ++i) check_size(op, "scale", scale_in, i, packed_in.size(i), "as packed");
  const int64_t n = packed_in.size(dim - 2), k = 2 * packed_in.size(dim - 1), groups = scale_in.size(dim - 1);
  const int64_t group_size = groups ? k / groups : 0;
  if (group_size * groups != k || (groups > 1 && !is_group_size(group_size)))
    fail(op, ": scale has shape ", shape_of(scale_in), ", want one scale a row, or for each 32, 64 or 128 of the ", k,
         " k of packed");
  if (group_size > kLongestGroup)
    fail(op, ": packed has shape ", shape_of(packed_in), ", want at most ", kLongestGroup, " k in a group");
  std::optional<Tensor> zeros;
  if (zeros_in) {
    check_cpu(op, "zeros", *zeros_in);
    check_dtype(op, "zeros", *zeros_in, {ScalarType::Byte});
    check_dim(op, "zeros", *zeros_in, dim, "[..., N, groups]");
    for (int64_t i = 0; i < dim; ++i) check_size(op, "zeros", *zeros_in, i, scale_in.size(i), "as scale");
    zeros = as_contiguous(*zeros_in);
    const uint8_t* values = static_cast<const uint8_t*>(zeros->const_data_ptr());
    for (int64_t i = 0; i < zeros->numel(); ++i)
      if (values[i] > 15) fail(op, ": zeros holds ", static_cast<int>(values[i]), ", want zero points in [0, 15]");
  }
  const Tensor packed = as_contiguous(packed_in), scale = as_contiguous(scale_in);
  W4A8PackArgs args{};
  args.weight = describe(n, groups, group_size, zeros.has_value());
  std::vector<int64_t> sizes = leading(packed, 2);
  args.count = product_of(sizes);
  for (const int64_t size : {n, groups, args.weight.row_bytes}) sizes.push_back(size);
  Tensor w = empty_cpu({sizes.data(), sizes.size()}, zeros ? ScalarType::Byte : ScalarType::Char);
  args.w = static_cast<uint8_t*>(w.mutable_data_ptr());
  args.packed = static_cast<uint8_t*>(const_cast<void*>(packed.const_data_ptr()));
  args.scale = static_cast<float*>(const_cast<void*>(scale.const_data_ptr()));
  if (zeros) args.zeros = static_cast<uint8_t*>(const_cast<void*>(zeros->const_data_ptr()));
  GLM5_CALL_KERNEL(false, w4a8_pack, args);
  return w;
}

std::tuple<Tensor, Tensor, Tensor> w4a8_unpack(const Tensor& w_in) {
  W4A8PackArgs args{};
  args.weight = weight_of("w4a8_unpack", w_in, 0, "[..., N, groups, bytes]");
  const Tensor w = as_contiguous(w_in);
  const int64_t n = args.weight.n, groups = args.weight.groups;
  const std::vector<int64_t> before = leading(w, 3);
  args.count = product_of(before);
  const auto output = [&](int64_t last, ScalarType dtype) {
    std::vector<int64_t> sizes = before;
    sizes.push_back(n);
    sizes.push_back(last);
    return empty_cpu({sizes.data(), sizes.size()}, dtype);
  };
  Tensor packed = output(groups * args.weight.group_size / 2, ScalarType::Byte);
  Tensor scale = output(groups, ScalarType::Float);
  Tensor zeros = output(args.weight.zeros ? groups : 0, ScalarType::Byte);
  args.w = static_cast<uint8_t*>(const_cast<void*>(w.const_data_ptr()));
  args.packed = static_cast<uint8_t*>(packed.mutable_data_ptr());
  args.scale = static_cast<float*>(scale.mutable_data_ptr());
  args.zeros = static_cast<uint8_t*>(zeros.mutable_data_ptr());
  GLM5_CALL_KERNEL(false, w4a8_unpack, args);
  return {packed, scale, zeros};
}

// Checks x, x_scale and out_dtype, makes the output. Of the result, products are still to be filled in.
W4A8Args product_args(const char* op, const Tensor& x, const Tensor& x_scale, const W4A8Weight& weight, const Tensor& w,
                      ScalarType out_dtype) {
  check_cpu(op, "x", x);
  check_cpu(op, "x_scale", x_scale);
  check_dtype(op, "x", x, {ScalarType::Char});
  check_dtype(op, "x_scale", x_scale, {ScalarType::Float});
  check_dim(op, "x", x, 2, "[M, K]");
  check_dim(op, "x_scale", x_scale, 1, "[M]");
  check_size(op, "x_scale", x_scale, 0, x.size(0), "the rows of x");
  if (x.size(1) != weight.groups * weight.group_size)
    fail(op, ": x has shape ", shape_of(x), ", want size ", weight.groups * weight.group_size,
         " in dimension 1 (the k of w, of shape ", shape_of(w), ")");
  if (out_dtype != ScalarType::BFloat16 && out_dtype != ScalarType::Float)
    fail(op, ": out_dtype is ", torch::headeronly::toString(out_dtype), ", want BFloat16 or Float");
  W4A8Args args{};
  args.weight = weight;
  args.out_bf16 = out_dtype == ScalarType::BFloat16;
  args.rows = x.size(0);
  return args;
}

void run(W4A8Args& args, const Tensor& x_in, const Tensor& x_scale_in, Tensor& out,
         const std::vector<W4A8Product>& products) {
  const Tensor x = as_contiguous(x_in), x_scale = as_contiguous(x_scale_in);
  args.x = static_cast<const int8_t*>(x.const_data_ptr());
  args.x_scale = static_cast<const float*>(x_scale.const_data_ptr());
  args.out = out.mutable_data_ptr();
  std::vector<W4A8Product> rest = products;
#if defined(__x86_64__)
  if (current_isa() == Isa::amx) {
    std::vector<W4A8Product> tall;
    rest.clear();
    for (const W4A8Product& product : products) (product.m >= cpu::amx::kW4A8TileRows ? tall : rest).push_back(product);
    args.products = tall.data();
    args.count = static_cast<int64_t>(tall.size());
    cpu::amx::w4a8_gemm_tiles(args);
  }
#endif
  args.products = rest.data();
  args.count = static_cast<int64_t>(rest.size());
  GLM5_CALL_KERNEL(false, w4a8_gemm, args);
}

Tensor w4a8_gemm(const Tensor& x, const Tensor& x_scale, const Tensor& w_in, ScalarType out_dtype) {
  const char* op = "w4a8_gemm";
  const W4A8Weight weight = weight_of(op, w_in, 3, "[N, groups, bytes]");
  W4A8Args args = product_args(op, x, x_scale, weight, w_in, out_dtype);
  const Tensor w = as_contiguous(w_in);
  Tensor out = empty_cpu({args.rows, weight.n}, out_dtype);
  run(args, x, x_scale, out, {{0, args.rows, static_cast<const uint8_t*>(w.const_data_ptr())}});
  return out;
}

Tensor w4a8_grouped_gemm(const Tensor& x, const Tensor& x_scale, const Tensor& w_in, const Tensor& group_ends_in,
                         ScalarType out_dtype) {
  const char* op = "w4a8_grouped_gemm";
  const W4A8Weight weight = weight_of(op, w_in, 4, "[E, N, groups, bytes]");
  W4A8Args args = product_args(op, x, x_scale, weight, w_in, out_dtype);
  check_cpu(op, "group_ends", group_ends_in);
  check_dtype(op, "group_ends", group_ends_in, {ScalarType::Int});
  check_dim(op, "group_ends", group_ends_in, 1, "[E]");
  check_size(op, "group_ends", group_ends_in, 0, w_in.size(0), "dimension 0 of w");
  const Tensor w = as_contiguous(w_in), group_ends = as_contiguous(group_ends_in);
  const int32_t* ends = static_cast<const int32_t*>(group_ends.const_data_ptr());
  const uint8_t* data = static_cast<const uint8_t*>(w.const_data_ptr());
  std::vector<W4A8Product> products;
  int64_t first = 0;
  for (int64_t e = 0; e < group_ends.size(0); ++e) {
    if (ends[e] < first || ends[e] > args.rows)
      fail(op, ": group_ends[", e, "] is ", ends[e], ", want a number in [", first, ", ", args.rows,
           "]: row numbers that never fall");
    if (ends[e] > first)
      products.push_back({first, ends[e] - first, data + e * weight.n * weight.groups * weight.row_bytes});
    first = ends[e];
  }
  Tensor out = empty_cpu({args.rows, weight.n}, out_dtype);
  run(args, x, x_scale, out, products);
  // Rows past the last group belong to no expert.
  const int64_t row = weight.n * (args.out_bf16 ? 2 : 4);
  if (args.rows > first) std::memset(static_cast<char*>(out.mutable_data_ptr()) + first * row, 0, (args.rows - first) * row);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glm5, m) {
  m.def("w4a8_prepack(Tensor packed, Tensor scale, Tensor? zeros=None) -> Tensor");
  m.def("w4a8_unpack(Tensor w) -> (Tensor, Tensor, Tensor)");
  m.def("w4a8_gemm(Tensor x, Tensor x_scale, Tensor w, ScalarType out_dtype) -> Tensor");
  m.def("w4a8_grouped_gemm(Tensor x, Tensor x_scale, Tensor w, Tensor group_ends, ScalarType out_dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(glm5, CPU, m) {
  GLM5_IMPL(m, w4a8_prepack);
  GLM5_IMPL(m, w4a8_unpack);
  GLM5_IMPL(m, w4a8_gemm);
  GLM5_IMPL(m, w4a8_grouped_gemm);
}

}  // namespace glm5
