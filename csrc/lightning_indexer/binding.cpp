// Schemas, argument checks and dispatch of the lightning indexer.
#include "lightning_indexer/lightning_indexer.h"

#include <optional>
#include <vector>

#include "common/checks.h"

// bf16 and e4m3 on AMX have kernels of their own; the rest goes the common way.
#if defined(__x86_64__)
#define GLM5_CALL_INDEXER_KERNEL(fn, in) \
  do { \
    const bool pairs = (in).args.dtype == static_cast<int>(Dtype::bf16) || (in).args.dtype == kE4m3; \
    if (pairs && current_isa() == Isa::amx) cpu::amx::fn((in).args); \
    else GLM5_CALL_KERNEL((in).is_float64, fn, (in).args); \
  } while (0)
#else
#define GLM5_CALL_INDEXER_KERNEL(fn, in) GLM5_CALL_KERNEL((in).is_float64, fn, (in).args)
#endif

namespace glm5 {
namespace {

// Contiguous inputs, checked; `args` points into them.
struct Inputs {
  Tensor q, k, weights;
  std::vector<Tensor> rest;
  LightningIndexerArgs args{};
  bool is_float64 = false;

  Inputs(const char* op, const Tensor& q_in, const Tensor& k_in, const Tensor& weights_in, bool allow_e4m3)
      : q(as_contiguous(q_in)), k(as_contiguous(k_in)), weights(as_contiguous(weights_in)) {
    check_cpu(op, "q", q);
    check_cpu(op, "k", k);
    check_cpu(op, "weights", weights);
    check_dim(op, "q", q, 3, "[queries, heads, dim]");
    check_dim(op, "k", k, 2, "[keys, dim]");
    check_dim(op, "weights", weights, 2, "[queries, heads]");
    if (allow_e4m3 && q.scalar_type() == ScalarType::Float8_e4m3fn) {
      args.dtype = kE4m3;
    } else if (allow_e4m3) {
      check_dtype(op, "q", q, {ScalarType::BFloat16, ScalarType::Float, ScalarType::Double, ScalarType::Float8_e4m3fn});
      args.dtype = static_cast<int>(float_dtype(op, "q", q));
    } else {
      args.dtype = static_cast<int>(float_dtype(op, "q", q));
    }
    is_float64 = args.dtype == static_cast<int>(Dtype::float64);
    check_same_dtype(op, "k", k, "q", q);
    check_dtype(op, "weights", weights, {real()});
    check_size(op, "k", k, 1, q.size(2), "the last dimension of q");
    check_size(op, "weights", weights, 0, q.size(0), "the queries of q");
    check_size(op, "weights", weights, 1, q.size(1), "the heads of q");
    if (k.size(0) > std::numeric_limits<int32_t>::max())
      fail(op, ": k has shape ", shape_of(k), ", want at most 2^31 - 1 keys");
    args.num_queries = q.size(0);
    args.num_heads = q.size(1);
    args.dim = q.size(2);
    args.num_keys = k.size(0);
    args.q = q.const_data_ptr();
    args.k = k.const_data_ptr();
    args.weights = weights.const_data_ptr();
  }

  ScalarType real() const { return is_float64 ? ScalarType::Double : ScalarType::Float; }

  const Tensor& keep(const Tensor& t) {
    rest.push_back(as_contiguous(t));
    return rest.back();
  }

  const int32_t* int_row(const char* op, const char* name, const Tensor& t_in) {
    const Tensor& t = keep(t_in);
    check_cpu(op, name, t);
    check_dtype(op, name, t, {ScalarType::Int});
    check_dim(op, name, t, 1, "[queries]");
    check_size(op, name, t, 0, args.num_queries, "the queries of q");
    return t.const_data_ptr<int32_t>();
  }

  void set_ranges(const char* op, const Tensor& ks, const Tensor& ke) {
    args.ks = int_row(op, "ks", ks);
    args.ke = int_row(op, "ke", ke);
    for (int64_t t = 0; t < args.num_queries; ++t) {
      if (args.ks[t] < 0) fail(op, ": ks is ", args.ks[t], " for query ", t, ", want a number >= 0");
      if (args.ke[t] > args.num_keys)
        fail(op, ": ke is ", args.ke[t], " for query ", t, ", want at most the ", args.num_keys, " keys of k");
    }
  }

  void set_k_scale(const char* op, const std::optional<Tensor>& k_scale_in) {
    if (!k_scale_in) return;
    const Tensor& k_scale = keep(*k_scale_in);
    check_cpu(op, "k_scale", k_scale);
    if (args.dtype != kE4m3)
      fail(op, ": k_scale is given with k of dtype ", torch::headeronly::toString(k.scalar_type()),
           ", want None unless k is Float8_e4m3fn");
    check_dtype(op, "k_scale", k_scale, {ScalarType::Float});
    check_dim(op, "k_scale", k_scale, 1, "[keys]");
    check_size(op, "k_scale", k_scale, 0, args.num_keys, "the keys of k");
    args.k_scale = k_scale.const_data_ptr<float>();
  }

  void set_indices(const char* op, const Tensor& indices_in) {
    const Tensor& indices = keep(indices_in);
    check_cpu(op, "indices", indices);
    check_dtype(op, "indices", indices, {ScalarType::Int});
    check_dim(op, "indices", indices, 2, "[queries, topk]");
    check_size(op, "indices", indices, 0, args.num_queries, "the queries of q");
    args.topk = indices.size(1);
    args.indices = indices.const_data_ptr<int32_t>();
    for (int64_t t = 0; t < args.num_queries; ++t) {
      const int32_t* row = args.indices + t * args.topk;
      for (int64_t i = 0; i < args.topk; ++i) {
        if (row[i] < -1 || row[i] >= args.num_keys)
          fail(op, ": indices holds ", row[i], " for query ", t, ", want -1 or a key in [0, ", args.num_keys, ")");
        if (i > 0 && row[i] >= 0 && row[i] <= row[i - 1])
          fail(op, ": indices holds ", row[i], " after ", row[i - 1], " for query ", t, ", want ascending keys");
        if (i > 0 && row[i] >= 0 && row[i - 1] < 0)
          fail(op, ": indices holds ", row[i], " after -1 for query ", t, ", want -1 at the end alone");
      }
    }
  }
};

Tensor lightning_indexer_logits(const Tensor& q, const Tensor& k, std::optional<Tensor> k_scale, const Tensor& weights,
                                const Tensor& ks, const Tensor& ke) {
  const char* op = "lightning_indexer_logits";
  Inputs in(op, q, k, weights, true);
  in.set_k_scale(op, k_scale);
  in.set_ranges(op, ks, ke);
  Tensor scores = empty_cpu({in.args.num_queries, in.args.num_keys}, in.real());
  in.args.scores = scores.mutable_data_ptr();
  GLM5_CALL_INDEXER_KERNEL(lightning_indexer_logits, in);
  return scores;
}

Tensor lightning_indexer_selected_logits(const Tensor& q, const Tensor& k, const Tensor& weights, const Tensor& indices) {
  const char* op = "lightning_indexer_selected_logits";
  Inputs in(op, q, k, weights, false);
  in.set_indices(op, indices);
  Tensor scores = empty_cpu({in.args.num_queries, in.args.topk}, in.real());
  in.args.scores = scores.mutable_data_ptr();
  GLM5_CALL_INDEXER_KERNEL(lightning_indexer_selected_logits, in);
  return scores;
}

std::tuple<Tensor, Tensor> lightning_indexer_topk(const Tensor& q, const Tensor& k, std::optional<Tensor> k_scale,
                                                  const Tensor& weights, const Tensor& ks, const Tensor& ke, int64_t topk) {
  const char* op = "lightning_indexer_topk";
  if (topk < 0) fail(op, ": topk is ", topk, ", want a number >= 0");
  Inputs in(op, q, k, weights, true);
  in.set_k_scale(op, k_scale);
  in.set_ranges(op, ks, ke);
  Tensor indices = empty_cpu({in.args.num_queries, topk}, ScalarType::Int);
  Tensor lse = empty_cpu({in.args.num_queries}, in.real());
  in.args.topk = topk;
  in.args.chosen = indices.mutable_data_ptr<int32_t>();
  in.args.lse = lse.mutable_data_ptr();
  GLM5_CALL_INDEXER_KERNEL(lightning_indexer_topk, in);
  return {indices, lse};
}

std::tuple<Tensor, Tensor, Tensor> lightning_indexer_logits_backward(const Tensor& grad_in, const Tensor& q, const Tensor& k,
                                                                     const Tensor& weights, const Tensor& ks,
                                                                     const Tensor& ke, std::optional<Tensor> indices) {
  const char* op = "lightning_indexer_logits_backward";
  Inputs in(op, q, k, weights, false);
  in.set_ranges(op, ks, ke);
  if (indices) in.set_indices(op, *indices);
  const Tensor grad = as_contiguous(grad_in);
  check_cpu(op, "grad", grad);
  check_dtype(op, "grad", grad, {in.real()});
  check_dim(op, "grad", grad, 2, indices ? "[queries, topk]" : "[queries, keys]");
  check_size(op, "grad", grad, 0, in.args.num_queries, "the queries of q");
  check_size(op, "grad", grad, 1, indices ? in.args.topk : in.args.num_keys,
             indices ? "the columns of indices" : "the keys of k");
  Tensor dq = empty_like_contiguous(in.q), dk = empty_like_contiguous(in.k), dweights = empty_like_contiguous(in.weights);
  in.args.grad = grad.const_data_ptr();
  in.args.dq = dq.mutable_data_ptr();
  in.args.dk = dk.mutable_data_ptr();
  in.args.dweights = dweights.mutable_data_ptr();
  GLM5_CALL_KERNEL(in.is_float64, lightning_indexer_logits_backward, in.args);
  return {dq, dk, dweights};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glm5, m) {
  m.def("lightning_indexer_logits(Tensor q, Tensor k, Tensor? k_scale, Tensor weights, Tensor ks, Tensor ke) -> Tensor");
  m.def("lightning_indexer_selected_logits(Tensor q, Tensor k, Tensor weights, Tensor indices) -> Tensor");
  m.def(
      "lightning_indexer_topk(Tensor q, Tensor k, Tensor? k_scale, Tensor weights, Tensor ks, Tensor ke, int topk) -> "
      "(Tensor indices, Tensor lse)");
  m.def(
      "lightning_indexer_logits_backward(Tensor grad, Tensor q, Tensor k, Tensor weights, Tensor ks, Tensor ke, "
      "Tensor? indices=None) -> (Tensor dq, Tensor dk, Tensor dweights)");
}

STABLE_TORCH_LIBRARY_IMPL(glm5, CPU, m) {
  GLM5_IMPL(m, lightning_indexer_logits);
  GLM5_IMPL(m, lightning_indexer_selected_logits);
  GLM5_IMPL(m, lightning_indexer_topk);
  GLM5_IMPL(m, lightning_indexer_logits_backward);
}

}  // namespace glm5
