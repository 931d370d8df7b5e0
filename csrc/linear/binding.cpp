// Schemas, argument checks and dispatch of the linear family. Each op is a list of matrix products for the GEMM core: the
// strides of dx and dw say "transposed", nothing is copied.
#include "linear/linear.h"

#include <cstring>
#include <optional>
#include <vector>

#include "common/checks.h"

namespace glm5 {
namespace {

using Products = std::vector<GemmArgs>;

// The tensor itself where its last dimension is contiguous (slices of wider tensors pass), else a contiguous copy.
Tensor rows_in_place(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return last < 0 || t.size(last) <= 1 || t.stride(last) != 1 ? torch::stable::contiguous(t) : t;
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

// ---- linear -------------------------------------------------------------------------------------------------------

Tensor linear(const Tensor& x_in, const Tensor& w_in, const std::optional<Tensor>& bias_in,
              const std::optional<ScalarType>& out_dtype) {
  const char* op = "linear";
  const Dtype dtype = check_pair(op, "x", x_in, 2, "[M, K]", "w", w_in, 2, "[N, K]");
  check_size(op, "w", w_in, 1, x_in.size(1), "the last dimension of x");
  const ScalarType out_type = out_dtype.value_or(x_in.scalar_type());
  if (out_type != x_in.scalar_type() && !(dtype == Dtype::bf16 && out_type == ScalarType::Float))
    fail(op, ": out_dtype is ", torch::headeronly::toString(out_type), ", want that of x, ",
         torch::headeronly::toString(x_in.scalar_type()), ", or Float for BFloat16");
  const Tensor x = rows_in_place(x_in), w = rows_in_place(w_in);
  std::optional<Tensor> bias;
  if (bias_in) {
    check_cpu(op, "bias", *bias_in);
    check_same_dtype(op, "bias", *bias_in, "x", x);
    check_dim(op, "bias", *bias_in, 1, "[N]");
    check_size(op, "bias", *bias_in, 0, w.size(0), "the first dimension of w");
    bias = torch::stable::contiguous(*bias_in);
  }
  GemmArgs g = product(dtype, x.size(0), w.size(0), x.size(1));
  if (out_type != x.scalar_type()) g.out_dtype = static_cast<int>(Dtype::float32);
  Tensor y = empty_cpu({g.m, g.n}, out_type);
  g.a = x.const_data_ptr(), g.a_row = x.stride(0), g.a_col = 1;
  g.b = w.const_data_ptr(), g.b_row = 1, g.b_col = w.stride(0);
  g.c = y.mutable_data_ptr(), g.c_row = g.n;
  g.bias = bias ? bias->const_data_ptr() : nullptr;
  run(dtype, {g});
  return y;
}

Tensor linear_dx(const Tensor& dy_in, const Tensor& w_in) {
  const char* op = "linear_dx";
  const Dtype dtype = check_pair(op, "dy", dy_in, 2, "[M, N]", "w", w_in, 2, "[N, K]");
  check_size(op, "dy", dy_in, 1, w_in.size(0), "the first dimension of w");
  const Tensor dy = rows_in_place(dy_in), w = rows_in_place(w_in);
  GemmArgs g = product(dtype, dy.size(0), w.size(1), w.size(0));
  Tensor dx = empty_cpu({g.m, g.n}, dy.scalar_type());
  g.a = dy.const_data_ptr(), g.a_row = dy.stride(0), g.a_col = 1;
  g.b = w.const_data_ptr(), g.b_row = w.stride(0), g.b_col = 1;
  g.c = dx.mutable_data_ptr(), g.c_row = g.n;
  run(dtype, {g});
  return dx;
}

Tensor linear_dw(const Tensor& dy_in, const Tensor& x_in) {
  const char* op = "linear_dw";
  const Dtype dtype = check_pair(op, "dy", dy_in, 2, "[M, N]", "x", x_in, 2, "[M, K]");
  check_size(op, "dy", dy_in, 0, x_in.size(0), "the first dimension of x");
  const Tensor dy = rows_in_place(dy_in), x = rows_in_place(x_in);
  GemmArgs g = product(dtype, dy.size(1), x.size(1), x.size(0));
  Tensor dw = empty_cpu({g.m, g.n}, dy.scalar_type());
  g.a = dy.const_data_ptr(), g.a_row = 1, g.a_col = dy.stride(0);
  g.b = x.const_data_ptr(), g.b_row = x.stride(0), g.b_col = 1;
  g.c = dw.mutable_data_ptr(), g.c_row = g.n;
  run(dtype, {g});
  return dw;
}

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

// ---- batched_linear: one product a head -----------------------------------------------------------------------------

Tensor batched_linear(const Tensor& x_in, const Tensor& w_in) {
  const char* op = "batched_linear";
  const Dtype dtype = check_pair(op, "x", x_in, 3, "[M, H, K]", "w", w_in, 3, "[H, N, K]");
  check_size(op, "w", w_in, 0, x_in.size(1), "dimension 1 of x");
  check_size(op, "w", w_in, 2, x_in.size(2), "dimension 2 of x");
  const Tensor x = rows_in_place(x_in), w = rows_in_place(w_in);
  const int64_t heads = w.size(0), n = w.size(1);
  Tensor y = empty_cpu({x.size(0), heads, n}, x.scalar_type());
  Products products(heads, product(dtype, x.size(0), n, w.size(2)));
  for (int64_t h = 0; h < heads; ++h) {
    GemmArgs& g = products[h];
    g.a = at(x, h * x.stride(1), g.dtype), g.a_row = x.stride(0), g.a_col = 1;
    g.b = at(w, h * w.stride(0), g.dtype), g.b_row = 1, g.b_col = w.stride(1);
    g.c = at(y, h * n, g.dtype), g.c_row = heads * n;
  }
  run(dtype, products);
  return y;
}

Tensor batched_linear_dx(const Tensor& dy_in, const Tensor& w_in) {
  const char* op = "batched_linear_dx";
  const Dtype dtype = check_pair(op, "dy", dy_in, 3, "[M, H, N]", "w", w_in, 3, "[H, N, K]");
  check_size(op, "dy", dy_in, 1, w_in.size(0), "dimension 0 of w");
  check_size(op, "dy", dy_in, 2, w_in.size(1), "dimension 1 of w");
  const Tensor dy = rows_in_place(dy_in), w = rows_in_place(w_in);
  const int64_t heads = w.size(0), k = w.size(2);
  Tensor dx = empty_cpu({dy.size(0), heads, k}, dy.scalar_type());
  Products products(heads, product(dtype, dy.size(0), k, w.size(1)));
  for (int64_t h = 0; h < heads; ++h) {
    GemmArgs& g = products[h];
    g.a = at(dy, h * dy.stride(1), g.dtype), g.a_row = dy.stride(0), g.a_col = 1;
    g.b = at(w, h * w.stride(0), g.dtype), g.b_row = w.stride(1), g.b_col = 1;
    g.c = at(dx, h * k, g.dtype), g.c_row = heads * k;
  }
  run(dtype, products);
  return dx;
}

Tensor batched_linear_dw(const Tensor& dy_in, const Tensor& x_in) {
  const char* op = "batched_linear_dw";
  const Dtype dtype = check_pair(op, "dy", dy_in, 3, "[M, H, N]", "x", x_in, 3, "[M, H, K]");
  check_size(op, "dy", dy_in, 0, x_in.size(0), "dimension 0 of x");
  check_size(op, "dy", dy_in, 1, x_in.size(1), "dimension 1 of x");
  const Tensor dy = rows_in_place(dy_in), x = rows_in_place(x_in);
  const int64_t heads = x.size(1), n = dy.size(2), k = x.size(2);
  Tensor dw = empty_cpu({heads, n, k}, dy.scalar_type());
  Products products(heads, product(dtype, n, k, x.size(0)));
  for (int64_t h = 0; h < heads; ++h) {
    GemmArgs& g = products[h];
    g.a = at(dy, h * dy.stride(1), g.dtype), g.a_row = 1, g.a_col = dy.stride(0);
    g.b = at(x, h * x.stride(1), g.dtype), g.b_row = x.stride(0), g.b_col = 1;
    g.c = at(dw, h * n * k, g.dtype), g.c_row = k;
  }
  run(dtype, products);
  return dw;
}

// ---- grouped_linear: one product a group of rows --------------------------------------------------------------------

// group_ends [E] int32 as [E + 1] row numbers from 0, checked: never falling, none past `rows`.
std::vector<int64_t> group_bounds(const char* op, const Tensor& ends_in, int64_t rows) {
  check_cpu(op, "group_ends", ends_in);
  check_dtype(op, "group_ends", ends_in, {ScalarType::Int});
  check_dim(op, "group_ends", ends_in, 1, "[E]");
  const Tensor ends = torch::stable::contiguous(ends_in);
  const int32_t* values = static_cast<const int32_t*>(ends.const_data_ptr());
  std::vector<int64_t> bounds(1, 0);
  for (int64_t e = 0; e < ends.size(0); ++e) {
    if (values[e] < bounds.back() || values[e] > rows)
      fail(op, ": group_ends[", e, "] is ", values[e], ", want a number in [", bounds.back(), ", ", rows,
           "]: row numbers that never fall");
    bounds.push_back(values[e]);
  }
  return bounds;
}

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
