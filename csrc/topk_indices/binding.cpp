// Schema, argument checks and dispatch of top-k selection.
#include "topk_indices/topk_indices.h"

#include <optional>

#include "common/checks.h"

namespace glm5 {
namespace {

Tensor range_bound(const char* op, const char* name, const Tensor& t, int64_t rows) {
  check_cpu(op, name, t);
  check_dtype(op, name, t, {ScalarType::Int});
  check_dim(op, name, t, 1, "[rows]");
  check_size(op, name, t, 0, rows, "the rows of scores");
  return torch::stable::contiguous(t);
}

Tensor topk_indices(const Tensor& scores_in, int64_t k, std::optional<Tensor> ks_in, std::optional<Tensor> ke_in) {
  const char* op = "topk_indices";
  check_cpu(op, "scores", scores_in);
  const Dtype dtype = float_dtype(op, "scores", scores_in);
  check_dim(op, "scores", scores_in, 2, "[rows, cols]");
  if (scores_in.size(1) > std::numeric_limits<int32_t>::max())
    fail(op, ": scores has shape ", shape_of(scores_in), ", want at most 2^31 - 1 columns");
  if (k < 0) fail(op, ": k is ", k, ", want a number >= 0");
  const Tensor scores = torch::stable::contiguous(scores_in);
  TopkIndicesArgs args{};
  args.dtype = static_cast<int>(dtype);
  args.rows = scores.size(0);
  args.cols = scores.size(1);
  args.k = k;
  args.scores = scores.const_data_ptr();
  Tensor ks = scores, ke = scores;
  if (ks_in) {
    ks = range_bound(op, "ks", *ks_in, args.rows);
    args.ks = ks.const_data_ptr<int32_t>();
    for (int64_t row = 0; row < args.rows; ++row)
      if (args.ks[row] < 0) fail(op, ": ks is ", args.ks[row], " in row ", row, ", want a number >= 0");
  }
  if (ke_in) {
    ke = range_bound(op, "ke", *ke_in, args.rows);
    args.ke = ke.const_data_ptr<int32_t>();
    for (int64_t row = 0; row < args.rows; ++row)
      if (args.ke[row] > args.cols)
        fail(op, ": ke is ", args.ke[row], " in row ", row, ", want at most the ", args.cols, " columns of scores");
  }
  Tensor indices = empty_cpu({args.rows, k}, ScalarType::Int);
  args.indices = indices.mutable_data_ptr<int32_t>();
  GLM5_CALL_KERNEL(dtype == Dtype::float64, topk_indices, args);
  return indices;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glm5, m) {
  m.def("topk_indices(Tensor scores, int k, Tensor? ks=None, Tensor? ke=None) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(glm5, CPU, m) { GLM5_IMPL(m, topk_indices); }

}  // namespace glm5
