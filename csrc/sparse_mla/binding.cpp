// Schemas, argument checks and dispatch of the sparse MLA family.
#include "sparse_mla/sparse_mla.h"

#include "common/checks.h"
#include "sparse_mla/bf16.h"
#include "sparse_mla/paged.h"

// Calls the kernel of the set in force, where there are tiles for bf16 the one that uses them.
#if defined(__x86_64__)
#define GLM5_CALL_SPARSE_MLA(fn, args) \
  do { \
    if ((args).dtype == 0 && ::glm5::current_isa() == ::glm5::Isa::amx) ::glm5::cpu::amx::fn##_bf16(args); \
    else GLM5_CALL_KERNEL((args).dtype == 2, fn, args); \
  } while (0)
#else
#define GLM5_CALL_SPARSE_MLA(fn, args) GLM5_CALL_KERNEL((args).dtype == 2, fn, args)
#endif

namespace glm5 {
namespace {

struct Inputs {
  Tensor q, kv, indices;
};

ScalarType acc_type(const SparseMlaArgs& args) { return args.dtype == 2 ? ScalarType::Double : ScalarType::Float; }

// Checks what every op of the family shares. The tensors in `in` must outlive the arguments.
SparseMlaArgs shared_args(const char* op, const Inputs& in, double scale, int64_t value_dim) {
  check_cpu(op, "q", in.q);
  check_cpu(op, "kv", in.kv);
  check_cpu(op, "indices", in.indices);
  const Dtype dtype = float_dtype(op, "q", in.q);
  check_same_dtype(op, "kv", in.kv, "q", in.q);
  check_dtype(op, "indices", in.indices, {ScalarType::Int});
  check_dim(op, "q", in.q, 3, "[queries, heads, dim]");
  check_dim(op, "kv", in.kv, 2, "[keys, dim]");
  check_dim(op, "indices", in.indices, 2, "[queries, topk]");
  check_size(op, "kv", in.kv, 1, in.q.size(2), "dim of q");
  check_size(op, "indices", in.indices, 0, in.q.size(0), "queries of q");
  if (in.q.size(1) < 1 || in.q.size(2) < 1)
    fail(op, ": q has shape ", shape_of(in.q), ", want at least one head and one dimension");
  if (value_dim < 1 || value_dim > in.q.size(2))
    fail(op, ": d_v is ", value_dim, ", want 1 to ", in.q.size(2), " (the dim of q and kv)");
  if (!(scale - scale == 0)) fail(op, ": scale is ", scale, ", want a finite number");
  if (in.kv.size(0) > std::numeric_limits<int32_t>::max())
    fail(op, ": kv has ", in.kv.size(0), " rows, want at most ", std::numeric_limits<int32_t>::max());
  SparseMlaArgs args{};
  args.dtype = static_cast<int>(dtype);
  args.queries = in.q.size(0);
  args.heads = in.q.size(1);
  args.dim = in.q.size(2);
  args.keys = in.kv.size(0);
  args.value_dim = value_dim;
  args.topk = in.indices.size(1);
  args.scale = scale;
  args.q = in.q.const_data_ptr();
  args.kv = in.kv.const_data_ptr();
  args.indices = static_cast<const int32_t*>(in.indices.const_data_ptr());
  int64_t bad = -1;
  args.bad_index = &bad;
  GLM5_CALL_KERNEL(false, sparse_mla_find_bad_index, args);
  if (bad >= 0)
    fail(op, ": indices[", bad / args.topk, ", ", bad % args.topk, "] is ", args.indices[bad], ", want -1 (none) or 0 to ",
         args.keys - 1, " (a row of kv)");
  args.bad_index = nullptr;
  return args;
}

Inputs contiguous_inputs(const Tensor& q, const Tensor& kv, const Tensor& indices) {
  return {torch::stable::contiguous(q), torch::stable::contiguous(kv), torch::stable::contiguous(indices)};
}

// lse or its gradient: [queries, heads] in the accumulation type.
void check_lse(const char* op, const char* name, const Tensor& t, const SparseMlaArgs& args) {
  check_cpu(op, name, t);
  check_dtype(op, name, t, {acc_type(args)});
  check_dim(op, name, t, 2, "[queries, heads]");
  check_size(op, name, t, 0, args.queries, "queries of q");
  check_size(op, name, t, 1, args.heads, "heads of q");
}

std::tuple<Tensor, Tensor> sparse_mla(const Tensor& q, const Tensor& kv, const Tensor& indices, double scale, int64_t d_v) {
  const Inputs in = contiguous_inputs(q, kv, indices);
  SparseMlaArgs args = shared_args("sparse_mla", in, scale, d_v);
  Tensor out = empty_cpu({args.queries, args.heads, d_v}, in.q.scalar_type());
  Tensor lse = empty_cpu({args.queries, args.heads}, acc_type(args));
  args.out = out.mutable_data_ptr();
  args.lse = lse.mutable_data_ptr();
  GLM5_CALL_SPARSE_MLA(sparse_mla_forward, args);
  return {out, lse};
}

std::tuple<Tensor, Tensor> sparse_mla_backward(const Tensor& dout_in, std::optional<Tensor> dlse_in, const Tensor& q,
                                               const Tensor& kv, const Tensor& indices, const Tensor& lse_in, double scale) {
  const char* op = "sparse_mla_backward";
  const Inputs in = contiguous_inputs(q, kv, indices);
  const Tensor dout = torch::stable::contiguous(dout_in), lse = torch::stable::contiguous(lse_in);
  check_dim(op, "dout", dout, 3, "[queries, heads, d_v]");
  if (q.dim() == 3 && (dout.size(2) < 1 || dout.size(2) > q.size(2)))
    fail(op, ": dout has shape ", shape_of(dout), ", want a last dimension of 1 to ", q.size(2), " (the dim of q and kv)");
  SparseMlaArgs args = shared_args(op, in, scale, dout.size(2));
  check_cpu(op, "dout", dout);
  check_same_dtype(op, "dout", dout, "q", in.q);
  check_size(op, "dout", dout, 0, args.queries, "queries of q");
  check_size(op, "dout", dout, 1, args.heads, "heads of q");
  check_lse(op, "lse", lse, args);
  Tensor dlse = lse;
  if (dlse_in.has_value()) {
    dlse = torch::stable::contiguous(*dlse_in);
    check_lse(op, "dlse", dlse, args);
    args.dlse = dlse.const_data_ptr();
  }
  Tensor dq = empty_like_contiguous(in.q), dkv = empty_like_contiguous(in.kv);
  Tensor dkv_acc = args.dtype == 0 ? empty_cpu({args.keys, (args.dim + 31) / 32 * 32}, ScalarType::Float) : dkv;
  args.dout = dout.const_data_ptr();
  args.lse = const_cast<void*>(lse.const_data_ptr());
  args.dq = dq.mutable_data_ptr();
  args.dkv = dkv.mutable_data_ptr();
  args.dkv_acc = dkv_acc.mutable_data_ptr();
  GLM5_CALL_SPARSE_MLA(sparse_mla_backward, args);
  return {dq, dkv};
}

Tensor sparse_mla_attn_target(const Tensor& q, const Tensor& kv, const Tensor& indices, const Tensor& lse_in, double scale) {
  const char* op = "sparse_mla_attn_target";
  const Inputs in = contiguous_inputs(q, kv, indices);
  const Tensor lse = torch::stable::contiguous(lse_in);
  SparseMlaArgs args = shared_args(op, in, scale, 1);
  check_lse(op, "lse", lse, args);
  Tensor target = empty_cpu({args.queries, args.topk}, acc_type(args));
  args.lse = const_cast<void*>(lse.const_data_ptr());
  args.target = target.mutable_data_ptr();
  GLM5_CALL_SPARSE_MLA(sparse_mla_attn_target, args);
  return target;
}

std::tuple<Tensor, Tensor> sparse_mla_paged(const Tensor& q, const Tensor& cache, const Tensor& block_table,
                                            const Tensor& sequence, const Tensor& indices, double scale, int64_t d_v) {
  return attend_to_pages(q, cache, block_table, sequence, indices, scale, d_v,
                         [](const SparseMlaArgs& args) { GLM5_CALL_SPARSE_MLA(sparse_mla_forward, args); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glm5, m) {
  m.def("sparse_mla(Tensor q, Tensor kv, Tensor indices, float scale, int d_v) -> (Tensor out, Tensor lse)");
  m.def(
      "sparse_mla_paged(Tensor q, Tensor cache, Tensor block_table, Tensor sequence, Tensor indices, float scale, int d_v) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "sparse_mla_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor kv, Tensor indices, Tensor lse, float scale) "
      "-> (Tensor dq, Tensor dkv)");
  m.def("sparse_mla_attn_target(Tensor q, Tensor kv, Tensor indices, Tensor lse, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(glm5, CPU, m) {
  GLM5_IMPL(m, sparse_mla);
  GLM5_IMPL(m, sparse_mla_paged);
  GLM5_IMPL(m, sparse_mla_backward);
  GLM5_IMPL(m, sparse_mla_attn_target);
}

}  // namespace glm5
