// Schemas, argument checks and dispatch of the linear family. Each op is a list of matrix products for the GEMM core: the
// strides of dx and dw say "transposed", nothing is copied.
#include "linear/linear.h"

#include <cstring>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/groups.h"

namespace glm5 {
namespace {

using Products = std::vector<GemmArgs>;

// The tensor itself where its last dimension is contiguous (slices of wider tensors pass), else a contiguous copy.
Tensor rows_in_place(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return last < 0 || t.size(last) <= 1 || t.stride(last) != 1 ? as_contiguous(t) : t;
}

int64_t element_size(int dtype) { return dtype == 0 ? 2 : dtype == 1 ? 4 : 8; }

const void* at(const Tensor& t, int64_t elements, int dtype) {
  return static_cast<const char*>(t.const_data_ptr()) + elements * element_size(dtype);
}

void* at(Tensor& t, int64_t elements, int dtype) {
  return static_cast<char*>(t.mutable_data_ptr()) + elements * element_size(dtype);
}

// Both on the CPU, of one float dtype, of `dim_a` and `dim_b` dimensions.
Dtype check_pair(const char* op, const char* name_a, const Tensor& a, int64_t dim_a, const char* layout_a,
                 const char* name_b, const Tensor& b, int64_t dim_b, const char* layout_b) {
  check_cpu(op, name_a, a);
  check_cpu(op, name_b, b);
  const Dtype dtype = float_dtype(op, name_a, a);
  check_same_dtype(op, name_b, b, name_a, a);
  check_dim(op, name_a, a, dim_a, layout_a);
  check_dim(op, name_b, b, dim_b, layout_b);
  return dtype;
}

GemmArgs product(Dtype dtype, int64_t m, int64_t n, int64_t k) {
  GemmArgs g{};
  g.dtype = g.out_dtype = static_cast<int>(dtype);
  g.m = m;
  g.n = n;
  g.k = k;
  return g;
}

void run(Dtype dtype, const Products& products) {
  GLM5_CALL_KERNEL(dtype == Dtype::float64, gemm, products.data(), static_cast<int64_t>(products.size()));
}

// ---- linear, and batched_linear: one product a head -----------------------------------------------------------------

// A tensor as one matrix a head, its lines contiguous: of rows [M, C] or [M, H, C], or of weights [R, C] or [H, R, C].
struct Matrices {
  Tensor t;
  int64_t heads, lines, width;
  int64_t line_stride, head_stride;
  bool transposed = false;  // the matrices are the transposes of those lines
};

Matrices of_rows(const Tensor& t_in) {
  const Tensor t = rows_in_place(t_in);
  const bool heads = t.dim() == 3;
  return {t, heads ? t.size(1) : 1, t.size(0), t.size(t.dim() - 1), t.stride(0), heads ? t.stride(1) : 0};
}

// Weights may also be views that read lines of memory as columns, such as the transpose of W_UK where it is absorbed.
Matrices of_weights(const Tensor& t_in) {
  const int64_t line = t_in.dim() - 2;
  if (t_in.size(line) > 1 && t_in.stride(line) == 1 && t_in.size(line + 1) > 1)
    return {t_in,
            line ? t_in.size(0) : 1,
            t_in.size(line + 1),
            t_in.size(line),
            t_in.stride(line + 1),
            line ? t_in.stride(0) : 0,
            true};
  const Tensor t = rows_in_place(t_in);
  return {t, line ? t.size(0) : 1, t.size(line), t.size(line + 1), t.stride(line), line ? t.stride(0) : 0};
}

// The products a b of every head, either side read transposed; the result is laid out like rows or like weights.
enum class Result { rows, weights };
Tensor multiply(Dtype dtype, const Matrices& a, bool a_transposed, const Matrices& b, bool b_transposed, Result result,
                ScalarType out_type, const void* bias = nullptr) {
  a_transposed ^= a.transposed, b_transposed ^= b.transposed;
  const int64_t m = a_transposed ? a.width : a.lines, k = a_transposed ? a.lines : a.width;
  const int64_t n = b_transposed ? b.lines : b.width, heads = a.heads;
  const bool like_rows = result == Result::rows;
  Tensor c = a.t.dim() == 2 ? empty_cpu({m, n}, out_type)
             : like_rows    ? empty_cpu({m, heads, n}, out_type)
                            : empty_cpu({heads, m, n}, out_type);
  Products products(heads, product(dtype, m, n, k));
  for (int64_t h = 0; h < heads; ++h) {
    GemmArgs& g = products[h];
    if (out_type != a.t.scalar_type()) g.out_dtype = static_cast<int>(Dtype::float32);
    g.a = at(a.t, h * a.head_stride, g.dtype);
    g.a_row = a_transposed ? 1 : a.line_stride, g.a_col = a_transposed ? a.line_stride : 1;
    g.b = at(b.t, h * b.head_stride, g.dtype);
    g.b_row = b_transposed ? 1 : b.line_stride, g.b_col = b_transposed ? b.line_stride : 1;
    g.c = at(c, like_rows ? h * n : h * m * n, g.out_dtype), g.c_row = like_rows ? heads * n : n;
    g.bias = bias;
  }
  run(dtype, products);
  return c;
}

// `dim` is 2, or 3 with heads.
Tensor product_y(const char* op, int64_t dim, const Tensor& x, const Tensor& w, std::optional<ScalarType> out_dtype,
                 const std::optional<Tensor>& bias_in) {
  const Dtype dtype = dim == 2 ? check_pair(op, "x", x, 2, "[M, K]", "w", w, 2, "[N, K]")
                               : check_pair(op, "x", x, 3, "[M, H, K]", "w", w, 3, "[H, N, K]");
  if (dim == 3) check_size(op, "w", w, 0, x.size(1), "the heads of x");
  check_size(op, "w", w, dim - 1, x.size(dim - 1), "the last dimension of x");
  const ScalarType out_type = out_dtype.value_or(x.scalar_type());
  if (out_type != x.scalar_type() && !(dtype == Dtype::bf16 && out_type == ScalarType::Float))
    fail(op, ": out_dtype is ", torch::headeronly::toString(out_type), ", want that of x, ",
         torch::headeronly::toString(x.scalar_type()), ", or Float for BFloat16");
  std::optional<Tensor> bias;
  if (bias_in) {
    check_cpu(op, "bias", *bias_in);
    check_same_dtype(op, "bias", *bias_in, "x", x);
    check_dim(op, "bias", *bias_in, 1, "[N]");
    check_size(op, "bias", *bias_in, 0, w.size(0), "the first dimension of w");
    bias = as_contiguous(*bias_in);
  }
  return multiply(dtype, of_rows(x), false, of_weights(w), true, Result::rows, out_type,
                  bias ? bias->const_data_ptr() : nullptr);
}

Tensor product_dx(const char* op, int64_t dim, const Tensor& dy, const Tensor& w) {
  const Dtype dtype = dim == 2 ? check_pair(op, "dy", dy, 2, "[M, N]", "w", w, 2, "[N, K]")
                               : check_pair(op, "dy", dy, 3, "[M, H, N]", "w", w, 3, "[H, N, K]");
  if (dim == 3) check_size(op, "dy", dy, 1, w.size(0), "the heads of w");
  check_size(op, "dy", dy, dim - 1, w.size(dim - 2), "the rows of w");
  return multiply(dtype, of_rows(dy), false, of_weights(w), false, Result::rows, dy.scalar_type());
}

Tensor product_dw(const char* op, int64_t dim, const Tensor& dy, const Tensor& x) {
  const Dtype dtype = dim == 2 ? check_pair(op, "dy", dy, 2, "[M, N]", "x", x, 2, "[M, K]")
                               : check_pair(op, "dy", dy, 3, "[M, H, N]", "x", x, 3, "[M, H, K]");
  check_size(op, "dy", dy, 0, x.size(0), "the rows of x");
  if (dim == 3) check_size(op, "dy", dy, 1, x.size(1), "the heads of x");
  return multiply(dtype, of_rows(dy), true, of_rows(x), false, Result::weights, dy.scalar_type());
}

Tensor linear(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias,
              const std::optional<ScalarType>& out_dtype) {
  return product_y("linear", 2, x, w, out_dtype, bias);
}
Tensor linear_dx(const Tensor& dy, const Tensor& w) { return product_dx("linear_dx", 2, dy, w); }
Tensor linear_dw(const Tensor& dy, const Tensor& x) { return product_dw("linear_dw", 2, dy, x); }

Tensor batched_linear(const Tensor& x, const Tensor& w) {
  return product_y("batched_linear", 3, x, w, std::nullopt, std::nullopt);
}
Tensor batched_linear_dx(const Tensor& dy, const Tensor& w) { return product_dx("batched_linear_dx", 3, dy, w); }
Tensor batched_linear_dw(const Tensor& dy, const Tensor& x) { return product_dw("batched_linear_dw", 3, dy, x); }

Tensor linear_dbias(const Tensor& dy_in) {
  const char* op = "linear_dbias";
  check_cpu(op, "dy", dy_in);
  const Dtype dtype = float_dtype(op, "dy", dy_in);
  check_dim(op, "dy", dy_in, 2, "[M, N]");
  const Tensor dy = rows_in_place(dy_in);
  Tensor dbias = empty_cpu({dy.size(1)}, dy.scalar_type());
  SumRowsArgs args{};
  args.dtype = static_cast<int>(dtype);
  args.rows = dy.size(0);
  args.cols = dy.size(1);
  args.x = dy.const_data_ptr();
  args.x_row = dy.stride(0);
  args.out = dbias.mutable_data_ptr();
  GLM5_CALL_KERNEL(args.dtype == 2, sum_rows, args);
  return dbias;
}

// ---- grouped_linear: one product a group of rows --------------------------------------------------------------------

// The products of groups [bounds[e], bounds[e + 1]) with w[e] [N, K]: y = x w^T, or for dx, x = dy w.
Tensor grouped_rows(const char* op, const char* name, const Tensor& x_in, const Tensor& w_in, const Tensor& group_ends,
                    bool transposed) {
  const Dtype dtype = check_pair(op, name, x_in, 2, transposed ? "[M, N]" : "[M, K]", "w", w_in, 3, "[E, N, K]");
  check_size(op, "w", w_in, transposed ? 1 : 2, x_in.size(1), transposed ? "dimension 1 of dy" : "dimension 1 of x");
  const std::vector<int64_t> bounds = group_bounds(op, group_ends, x_in.size(0));
  const int64_t groups = w_in.size(0);
  check_size(op, "group_ends", group_ends, 0, groups, "dimension 0 of w");
  const Tensor x = rows_in_place(x_in), w = rows_in_place(w_in);
  const int64_t n = w.size(transposed ? 2 : 1), k = x.size(1), rows = x.size(0);
  Tensor y = empty_cpu({rows, n}, x.scalar_type());
  Products products(groups, product(dtype, 0, n, k));
  for (int64_t e = 0; e < groups; ++e) {
    GemmArgs& g = products[e];
    g.m = bounds[e + 1] - bounds[e];
    g.a = at(x, bounds[e] * x.stride(0), g.dtype), g.a_row = x.stride(0), g.a_col = 1;
    g.b = at(w, e * w.stride(0), g.dtype);
    g.b_row = transposed ? w.stride(1) : 1;
    g.b_col = transposed ? 1 : w.stride(1);
    g.c = at(y, bounds[e] * n, g.dtype), g.c_row = n;
  }
  run(dtype, products);
  // Rows past the last group belong to no expert.
  const int64_t size = element_size(static_cast<int>(dtype)), tail = rows - bounds.back();
  if (tail * n > 0) std::memset(at(y, bounds.back() * n, static_cast<int>(dtype)), 0, tail * n * size);
  return y;
}

Tensor grouped_linear(const Tensor& x, const Tensor& w, const Tensor& group_ends) {
  return grouped_rows("grouped_linear", "x", x, w, group_ends, false);
}

Tensor grouped_linear_dx(const Tensor& dy, const Tensor& w, const Tensor& group_ends) {
  return grouped_rows("grouped_linear_dx", "dy", dy, w, group_ends, true);
}

Tensor grouped_linear_dw(const Tensor& dy_in, const Tensor& x_in, const Tensor& group_ends) {
  const char* op = "grouped_linear_dw";
  const Dtype dtype = check_pair(op, "dy", dy_in, 2, "[M, N]", "x", x_in, 2, "[M, K]");
  check_size(op, "dy", dy_in, 0, x_in.size(0), "dimension 0 of x");
  const std::vector<int64_t> bounds = group_bounds(op, group_ends, x_in.size(0));
  const Tensor dy = rows_in_place(dy_in), x = rows_in_place(x_in);
  const int64_t groups = group_ends.size(0), n = dy.size(1), k = x.size(1);
  Tensor dw = empty_cpu({groups, n, k}, dy.scalar_type());
  Products products(groups, product(dtype, n, k, 0));
  for (int64_t e = 0; e < groups; ++e) {
    GemmArgs& g = products[e];
    g.k = bounds[e + 1] - bounds[e];
    g.a = at(dy, bounds[e] * dy.stride(0), g.dtype), g.a_row = 1, g.a_col = dy.stride(0);
    g.b = at(x, bounds[e] * x.stride(0), g.dtype), g.b_row = x.stride(0), g.b_col = 1;
    g.c = at(dw, e * n * k, g.dtype), g.c_row = k;
  }
  run(dtype, products);
  return dw;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glm5, m) {
  m.def("linear(Tensor x, Tensor w, Tensor? bias=None, ScalarType? out_dtype=None) -> Tensor");
  m.def("linear_dx(Tensor dy, Tensor w) -> Tensor");
  m.def("linear_dw(Tensor dy, Tensor x) -> Tensor");
  m.def("linear_dbias(Tensor dy) -> Tensor");
  m.def("batched_linear(Tensor x, Tensor w) -> Tensor");
  m.def("batched_linear_dx(Tensor dy, Tensor w) -> Tensor");
  m.def("batched_linear_dw(Tensor dy, Tensor x) -> Tensor");
  m.def("grouped_linear(Tensor x, Tensor w, Tensor group_ends) -> Tensor");
  m.def("grouped_linear_dx(Tensor dy, Tensor w, Tensor group_ends) -> Tensor");
  m.def("grouped_linear_dw(Tensor dy, Tensor x, Tensor group_ends) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(glm5, CPU, m) {
  GLM5_IMPL(m, linear);
  GLM5_IMPL(m, linear_dx);
  GLM5_IMPL(m, linear_dw);
  GLM5_IMPL(m, linear_dbias);
  GLM5_IMPL(m, batched_linear);
  GLM5_IMPL(m, batched_linear_dx);
  GLM5_IMPL(m, batched_linear_dw);
  GLM5_IMPL(m, grouped_linear);
  GLM5_IMPL(m, grouped_linear_dx);
  GLM5_IMPL(m, grouped_linear_dw);
}

}  // namespace glm5
