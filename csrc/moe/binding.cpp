// Schemas, argument checks and dispatch of the moe family.
#include "moe/moe.h"

#include <optional>
#include <vector>

#include "common/checks.h"

namespace glm5 {
namespace {

const int32_t* ints(const Tensor& t) { return static_cast<const int32_t*>(t.const_data_ptr()); }
int32_t* mutable_ints(Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); }

// ids [tokens, topk] of experts, each in [0, experts), or -1 for none.
void check_ids(const char* op, const char* name, const Tensor& ids, int64_t experts) {
  check_cpu(op, name, ids);
  check_dtype(op, name, ids, {ScalarType::Int});
  check_dim(op, name, ids, 2, "[tokens, topk]");
  const int32_t* p = ints(ids);
  for (int64_t i = 0; i < ids.numel(); ++i)
    if (p[i] < -1 || p[i] >= experts)
      fail(op, ": ", name, "[", i / ids.size(1), ", ", i % ids.size(1), "] is ", p[i], ", want 0 <= id < ", experts,
           " (the number of experts), or -1 for none");
}

void check_distinct(const char* op, const char* name, const Tensor& ids, int64_t experts) {
  const int32_t* p = ints(ids);
  const int64_t topk = ids.size(1);
  std::vector<int64_t> last_row(experts, -1);
  for (int64_t i = 0; i < ids.numel(); ++i) {
    if (p[i] < 0) continue;
    if (last_row[p[i]] == i / topk) fail(op, ": ", name, "[", i / topk, "] holds expert ", p[i], " twice");
    last_row[p[i]] = i / topk;
  }
}

// Each slot at most once: then no two tasks write the same row of dy.
void check_slots(const char* op, const Tensor& slots, int64_t num_slots) {
  check_cpu(op, "slot_of_row", slots);
  check_dtype(op, "slot_of_row", slots, {ScalarType::Int});
  check_dim(op, "slot_of_row", slots, 2, "[tokens, topk]");
  const int32_t* p = ints(slots);
  std::vector<bool> seen(num_slots, false);
  for (int64_t i = 0; i < slots.numel(); ++i) {
    if (p[i] < -1 || p[i] >= num_slots)
      fail(op, ": slot_of_row[", i / slots.size(1), ", ", i % slots.size(1), "] is ", p[i], ", want 0 <= slot < ", num_slots,
           " (the rows given), or -1 for none");
    if (p[i] < 0) continue;
    if (seen[p[i]]) fail(op, ": slot_of_row holds slot ", p[i], " twice");
    seen[p[i]] = true;
  }
}

MoeRouterArgs router_args(const char* op, const Tensor& logits) {
  check_cpu(op, "logits", logits);
  check_dtype(op, "logits", logits, {ScalarType::Float, ScalarType::Double});
  check_dim(op, "logits", logits, 2, "[tokens, experts]");
  MoeRouterArgs args{};
  args.is_float64 = logits.scalar_type() == ScalarType::Double;
  args.tokens = logits.size(0);
  args.experts = logits.size(1);
  args.logits = logits.const_data_ptr();
  return args;
}

std::tuple<Tensor, Tensor> moe_router(const Tensor& logits_in, const Tensor& bias_in, int64_t topk, int64_t num_groups,
                                      int64_t topk_groups, bool renormalize, double scaling,
                                      std::optional<Tensor> replay_in) {
  const char* op = "moe_router";
  const Tensor logits = as_contiguous(logits_in), bias = as_contiguous(bias_in);
  MoeRouterArgs args = router_args(op, logits);
  check_cpu(op, "bias", bias);
  check_same_dtype(op, "bias", bias, "logits", logits);
  check_dim(op, "bias", bias, 1, "[experts]");
  check_size(op, "bias", bias, 0, args.experts, "the experts of logits");
  if (num_groups < 1 || args.experts % num_groups)
    fail(op, ": num_groups is ", num_groups, ", want a divisor of the ", args.experts, " experts");
  if (topk_groups < 1 || topk_groups > num_groups)
    fail(op, ": topk_groups is ", topk_groups, ", want 1 <= topk_groups <= num_groups = ", num_groups);
  const int64_t eligible = args.experts / num_groups * topk_groups;
  if (topk < 1 || topk > eligible)
    fail(op, ": topk is ", topk, ", want 1 <= topk <= ", eligible, " (the experts of topk_groups groups)");
  args.topk = topk;
  args.groups = num_groups;
  args.topk_groups = topk_groups;
  args.renormalize = renormalize;
  args.scaling = scaling;
  args.bias = bias.const_data_ptr();
  std::optional<Tensor> replay;
  if (replay_in) {
    replay = as_contiguous(*replay_in);
    check_ids(op, "replay", *replay, args.experts);
    check_size(op, "replay", *replay, 0, args.tokens, "the tokens of logits");
    check_size(op, "replay", *replay, 1, topk, "topk");
    check_distinct(op, "replay", *replay, args.experts);
    args.replay = ints(*replay);
  }
  Tensor weights = empty_cpu({args.tokens, topk}, logits.scalar_type());
  Tensor ids = empty_cpu({args.tokens, topk}, ScalarType::Int);
  args.weights = weights.mutable_data_ptr();
  args.ids = mutable_ints(ids);
  GLM5_CALL_KERNEL(args.is_float64, moe_router_forward, args);
  return {weights, ids};
}

Tensor moe_router_backward(const Tensor& dweights_in, const Tensor& logits_in, const Tensor& ids_in, bool renormalize,
                           double scaling) {
  const char* op = "moe_router_backward";
  const Tensor logits = as_contiguous(logits_in), dweights = as_contiguous(dweights_in);
  Tensor ids = as_contiguous(ids_in);
  MoeRouterArgs args = router_args(op, logits);
  check_ids(op, "ids", ids, args.experts);
  check_size(op, "ids", ids, 0, args.tokens, "the tokens of logits");
  check_distinct(op, "ids", ids, args.experts);
  check_cpu(op, "dweights", dweights);
  check_same_dtype(op, "dweights", dweights, "logits", logits);
  check_dim(op, "dweights", dweights, 2, "[tokens, topk]");
  check_size(op, "dweights", dweights, 0, args.tokens, "the tokens of logits");
  check_size(op, "dweights", dweights, 1, ids.size(1), "the columns of ids");
  args.topk = ids.size(1);
  args.renormalize = renormalize;
  args.scaling = scaling;
  args.ids = const_cast<int32_t*>(ints(ids));
  args.dweights = dweights.const_data_ptr();
  Tensor dlogits = empty_like_contiguous(logits);
  args.dlogits = dlogits.mutable_data_ptr();
  GLM5_CALL_KERNEL(args.is_float64, moe_router_backward, args);
  return dlogits;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_permute(const Tensor& x_in, const Tensor& ids_in, int64_t num_experts) {
  const char* op = "moe_permute";
  const Tensor x = as_contiguous(x_in), ids = as_contiguous(ids_in);
  check_cpu(op, "x", x);
  float_dtype(op, "x", x);
  check_dim(op, "x", x, 2, "[tokens, dim]");
  if (num_experts < 1) fail(op, ": num_experts is ", num_experts, ", want at least 1");
  check_ids(op, "ids", ids, num_experts);
  check_size(op, "ids", ids, 0, x.size(0), "the tokens of x");
  if (ids.numel() > std::numeric_limits<int32_t>::max())
    fail(op, ": ids has shape ", shape_of(ids), ", want below 2^31 slots");
  MoePermuteArgs args{};
  args.tokens = x.size(0);
  args.topk = ids.size(1);
  args.experts = num_experts;
  args.row_bytes = x.size(1) * static_cast<int64_t>(x.element_size());
  Tensor xp = empty_cpu({ids.numel(), x.size(1)}, x.scalar_type());
  Tensor row_of_slot = empty_cpu({ids.numel()}, ScalarType::Int);
  Tensor slot_of_row = empty_cpu({args.tokens, args.topk}, ScalarType::Int);
  Tensor group_ends = empty_cpu({num_experts}, ScalarType::Int);
  args.x = x.const_data_ptr();
  args.ids = ints(ids);
  args.xp = xp.mutable_data_ptr();
  args.row_of_slot = mutable_ints(row_of_slot);
  args.slot_of_row = mutable_ints(slot_of_row);
  args.group_ends = mutable_ints(group_ends);
  GLM5_CALL_KERNEL(false, moe_permute, args);
  return {xp, row_of_slot, slot_of_row, group_ends};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_dispatch_layout(const Tensor& ids_in, int64_t num_experts, int64_t num_ranks,
                                                               int64_t ranks_per_node) {
  const char* op = "moe_dispatch_layout";
  const Tensor ids = as_contiguous(ids_in);
  if (num_experts < 1) fail(op, ": num_experts is ", num_experts, ", want at least 1");
  if (num_ranks < 1 || num_experts % num_ranks)
    fail(op, ": num_ranks is ", num_ranks, ", want a divisor of the ", num_experts, " experts");
  if (ranks_per_node < 1 || num_ranks % ranks_per_node)
    fail(op, ": ranks_per_node is ", ranks_per_node, ", want a divisor of the ", num_ranks, " ranks");
  check_ids(op, "ids", ids, num_experts);
  if (ids.numel() > std::numeric_limits<int32_t>::max())
    fail(op, ": ids has shape ", shape_of(ids), ", want below 2^31 choices");
  Tensor per_rank = empty_cpu({num_ranks}, ScalarType::Int);
  Tensor per_node = empty_cpu({num_ranks / ranks_per_node}, ScalarType::Int);
  Tensor per_expert = empty_cpu({num_experts}, ScalarType::Int);
  Tensor in_rank = empty_cpu({ids.size(0), num_ranks}, ScalarType::Bool);
  MoeDispatchLayoutArgs args{};
  args.tokens = ids.size(0);
  args.topk = ids.size(1);
  args.experts = num_experts;
  args.ranks = num_ranks;
  args.ranks_per_node = ranks_per_node;
  args.ids = ints(ids);
  args.tokens_per_rank = mutable_ints(per_rank);
  args.tokens_per_node = mutable_ints(per_node);
  args.tokens_per_expert = mutable_ints(per_expert);
  args.is_token_in_rank = static_cast<bool*>(in_rank.mutable_data_ptr());
  GLM5_CALL_KERNEL(false, moe_dispatch_layout, args);
  return {per_rank, per_node, per_expert, in_rank};
}

MoeCombineArgs combine_args(const char* op, const char* rows_name, const Tensor& rows, const Tensor& slots) {
  check_cpu(op, rows_name, rows);
  MoeCombineArgs args{};
  args.dtype = static_cast<int>(float_dtype(op, rows_name, rows));
  check_dim(op, rows_name, rows, 2, "[slots, dim]");
  check_slots(op, slots, rows.size(0));
  args.slots = rows.size(0);
  args.tokens = slots.size(0);
  args.topk = slots.size(1);
  args.dim = rows.size(1);
  args.slot_of_row = ints(slots);
  args.y = rows.const_data_ptr();
  return args;
}

Tensor moe_permute_backward(const Tensor& dxp_in, const Tensor& slots_in) {
  const Tensor dxp = as_contiguous(dxp_in), slots = as_contiguous(slots_in);
  MoeCombineArgs args = combine_args("moe_permute_backward", "dxp", dxp, slots);
  Tensor dx = empty_cpu({args.tokens, args.dim}, dxp.scalar_type());
  args.out = dx.mutable_data_ptr();
  GLM5_CALL_KERNEL(args.dtype == 2, moe_combine_forward, args);
  return dx;
}

void check_weights(const char* op, const Tensor& weights, const Tensor& slots, int dtype) {
  check_cpu(op, "weights", weights);
  check_dtype(op, "weights", weights, {dtype == 2 ? ScalarType::Double : ScalarType::Float});
  check_dim(op, "weights", weights, 2, "[tokens, topk]");
  check_size(op, "weights", weights, 0, slots.size(0), "the tokens of slot_of_row");
  check_size(op, "weights", weights, 1, slots.size(1), "the columns of slot_of_row");
}

Tensor moe_unpermute(const Tensor& y_in, const Tensor& slots_in, const Tensor& weights_in) {
  const char* op = "moe_unpermute";
  const Tensor y = as_contiguous(y_in), slots = as_contiguous(slots_in);
  const Tensor weights = as_contiguous(weights_in);
  MoeCombineArgs args = combine_args(op, "y", y, slots);
  check_weights(op, weights, slots, args.dtype);
  Tensor out = empty_cpu({args.tokens, args.dim}, y.scalar_type());
  args.weights = weights.const_data_ptr();
  args.out = out.mutable_data_ptr();
  GLM5_CALL_KERNEL(args.dtype == 2, moe_combine_forward, args);
  return out;
}

std::tuple<Tensor, Tensor> moe_unpermute_backward(const Tensor& dout_in, const Tensor& y_in, const Tensor& slots_in,
                                                  const Tensor& weights_in) {
  const char* op = "moe_unpermute_backward";
  const Tensor dout = as_contiguous(dout_in), y = as_contiguous(y_in);
  const Tensor slots = as_contiguous(slots_in), weights = as_contiguous(weights_in);
  MoeCombineArgs args = combine_args(op, "y", y, slots);
  check_weights(op, weights, slots, args.dtype);
  check_cpu(op, "dout", dout);
  check_same_dtype(op, "dout", dout, "y", y);
  check_dim(op, "dout", dout, 2, "[tokens, dim]");
  check_size(op, "dout", dout, 0, args.tokens, "the tokens of slot_of_row");
  check_size(op, "dout", dout, 1, args.dim, "the columns of y");
  Tensor dy = empty_like_contiguous(y), dweights = empty_like_contiguous(weights);
  args.weights = weights.const_data_ptr();
  args.dout = dout.const_data_ptr();
  args.dy = dy.mutable_data_ptr();
  args.dweights = dweights.mutable_data_ptr();
  GLM5_CALL_KERNEL(args.dtype == 2, moe_combine_backward, args);
  return {dy, dweights};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glm5, m) {
  m.def(
      "moe_router(Tensor logits, Tensor bias, int topk, int num_groups, int topk_groups, bool renormalize, "
      "float scaling, Tensor? replay) -> (Tensor weights, Tensor ids)");
  m.def("moe_router_backward(Tensor dweights, Tensor logits, Tensor ids, bool renormalize, float scaling) -> Tensor");
  m.def(
      "moe_permute(Tensor x, Tensor ids, int num_experts) -> "
      "(Tensor xp, Tensor row_of_slot, Tensor slot_of_row, Tensor group_ends)");
  m.def(
      "moe_dispatch_layout(Tensor ids, int num_experts, int num_ranks, int ranks_per_node) -> "
      "(Tensor tokens_per_rank, Tensor tokens_per_node, Tensor tokens_per_expert, Tensor is_token_in_rank)");
  m.def("moe_permute_backward(Tensor dxp, Tensor slot_of_row) -> Tensor");
  m.def("moe_unpermute(Tensor y, Tensor slot_of_row, Tensor weights) -> Tensor");
  m.def(
      "moe_unpermute_backward(Tensor dout, Tensor y, Tensor slot_of_row, Tensor weights) -> "
      "(Tensor dy, Tensor dweights)");
}

STABLE_TORCH_LIBRARY_IMPL(glm5, CPU, m) {
  GLM5_IMPL(m, moe_router);
  GLM5_IMPL(m, moe_router_backward);
  GLM5_IMPL(m, moe_permute);
  GLM5_IMPL(m, moe_dispatch_layout);
  GLM5_IMPL(m, moe_permute_backward);
  GLM5_IMPL(m, moe_unpermute);
  GLM5_IMPL(m, moe_unpermute_backward);
}

}  // namespace glm5
