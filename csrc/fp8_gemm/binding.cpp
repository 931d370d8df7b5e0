// Schemas, argument checks and dispatch of the FP8 products.
#include "fp8_gemm/fp8_gemm.h"

#include <cstring>
#include <vector>

#include "common/checks.h"
#include "common/groups.h"

namespace glm5 {
namespace {

int64_t blocks_of(int64_t size) { return (size + kFp8Block - 1) / kFp8Block; }

// The tensor itself where its last dimension is contiguous (slices of wider tensors pass), else a contiguous copy.
Tensor rows_in_place(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) != 1 ? as_contiguous(t) : t;
}

// a, b and their scales, checked; `dim` is that of b: 2, or 3 where it is one matrix a group.
struct Inputs {
  Tensor a, a_scale, b, b_scale;
  int64_t m, n, k;
  ScalarType out_type;

  Inputs(const char* op, const Tensor& a_in, const Tensor& a_scale_in, const Tensor& b_in, const Tensor& b_scale_in,
         int64_t dim, ScalarType out_dtype) {
    check_cpu(op, "a", a_in);
    check_cpu(op, "a_scale", a_scale_in);
    check_cpu(op, "b", b_in);
    check_cpu(op, "b_scale", b_scale_in);
    check_dtype(op, "a", a_in, {ScalarType::Float8_e4m3fn});
    check_dim(op, "a", a_in, 2, "[M, K]");
    check_dtype(op, "a_scale", a_scale_in, {ScalarType::Float});
    check_dim(op, "a_scale", a_scale_in, 2, "[M, ceil(K / 128)]");
    check_size(op, "a_scale", a_scale_in, 0, a_in.size(0), "the rows of a");
    check_size(op, "a_scale", a_scale_in, 1, blocks_of(a_in.size(1)), "blocks of 128 in a row of a");
    check_dtype(op, "b", b_in, {ScalarType::Float8_e4m3fn});
    check_dim(op, "b", b_in, dim, dim == 2 ? "[N, K]" : "[E, N, K]");
    check_size(op, "b", b_in, dim - 1, a_in.size(1), "the last dimension of a");
    check_dtype(op, "b_scale", b_scale_in, {ScalarType::Float});
    check_dim(op, "b_scale", b_scale_in, dim,
              dim == 2 ? "[ceil(N / 128), ceil(K / 128)]" : "[E, ceil(N / 128), ceil(K / 128)]");
    if (dim == 3) check_size(op, "b_scale", b_scale_in, 0, b_in.size(0), "the groups of b");
    check_size(op, "b_scale", b_scale_in, dim - 2, blocks_of(b_in.size(dim - 2)), "blocks of 128 in the rows of b");
    check_size(op, "b_scale", b_scale_in, dim - 1, blocks_of(b_in.size(dim - 1)), "blocks of 128 in a row of b");
    if (out_dtype != ScalarType::BFloat16 && out_dtype != ScalarType::Float)
      fail(op, ": out_dtype is ", torch::headeronly::toString(out_dtype), ", want BFloat16 or Float");
    a = rows_in_place(a_in), b = rows_in_place(b_in);
    a_scale = as_contiguous(a_scale_in), b_scale = as_contiguous(b_scale_in);
    m = a.size(0), n = b.size(dim - 2), k = a.size(1);
    out_type = out_dtype;
  }

  // Rows [first, last) of a with matrix e of b.
  Fp8GemmArgs product(int64_t first, int64_t last, int64_t e, Tensor& c) const {
    Fp8GemmArgs g{};
    g.m = last - first, g.n = n, g.k = k;
    g.a = static_cast<const char*>(a.const_data_ptr()) + first * a.stride(0);
    g.a_row = a.stride(0);
    g.a_scale = static_cast<const float*>(a_scale.const_data_ptr()) + first * blocks_of(k);
    g.b = static_cast<const char*>(b.const_data_ptr()) + (b.dim() == 3 ? e * b.stride(0) : 0);
    g.b_row = b.stride(b.dim() - 2);
    g.b_scale = static_cast<const float*>(b_scale.const_data_ptr()) + e * blocks_of(n) * blocks_of(k);
    g.out_float32 = out_type == ScalarType::Float;
    g.c = static_cast<char*>(c.mutable_data_ptr()) + first * n * (g.out_float32 ? 4 : 2);
    return g;
  }
};

void run(const std::vector<Fp8GemmArgs>& products) {
  const int64_t count = static_cast<int64_t>(products.size());
#if defined(__x86_64__)
  if (current_isa() == Isa::amx) return cpu::amx::fp8_gemm(products.data(), count);
#endif
  GLM5_CALL_KERNEL(false, fp8_gemm, products.data(), count);
}

Tensor fp8_gemm(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale, ScalarType out_dtype) {
  const Inputs in("fp8_gemm", a, a_scale, b, b_scale, 2, out_dtype);
  Tensor c = empty_cpu({in.m, in.n}, in.out_type);
  run({in.product(0, in.m, 0, c)});
  return c;
}

Tensor fp8_grouped_gemm(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
                        const Tensor& group_ends, ScalarType out_dtype) {
  const char* op = "fp8_grouped_gemm";
  const Inputs in(op, a, a_scale, b, b_scale, 3, out_dtype);
  const std::vector<int64_t> bounds = group_bounds(op, group_ends, in.m);
  check_size(op, "group_ends", group_ends, 0, b.size(0), "dimension 0 of b");
  Tensor c = empty_cpu({in.m, in.n}, in.out_type);
  std::vector<Fp8GemmArgs> products;
  for (size_t e = 0; e + 1 < bounds.size(); ++e)
    if (bounds[e] < bounds[e + 1]) products.push_back(in.product(bounds[e], bounds[e + 1], static_cast<int64_t>(e), c));
  run(products);
  // Rows past the last group belong to no expert.
  const int64_t row_bytes = in.n * (in.out_type == ScalarType::Float ? 4 : 2), tail = in.m - bounds.back();
  if (tail * row_bytes > 0)
    std::memset(static_cast<char*>(c.mutable_data_ptr()) + bounds.back() * row_bytes, 0, tail * row_bytes);
  return c;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glm5, m) {
  m.def("fp8_gemm(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, ScalarType out_dtype) -> Tensor");
  m.def(
      "fp8_grouped_gemm(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor group_ends, ScalarType out_dtype) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(glm5, CPU, m) {
  GLM5_IMPL(m, fp8_gemm);
  GLM5_IMPL(m, fp8_grouped_gemm);
}

}  // namespace glm5
