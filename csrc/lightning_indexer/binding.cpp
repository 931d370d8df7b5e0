// Schemas, argument checks and dispatch of the lightning indexer.
#include "lightning_indexer/inputs.h"
#include "lightning_indexer/paged.h"

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

using Inputs = LightningIndexerInputs;
constexpr auto kFloats = {ScalarType::BFloat16, ScalarType::Float, ScalarType::Double};
constexpr auto kFloatsOrE4m3 = {ScalarType::BFloat16, ScalarType::Float, ScalarType::Double, ScalarType::Float8_e4m3fn};

Tensor lightning_indexer_logits(const Tensor& q, const Tensor& k, std::optional<Tensor> k_scale, const Tensor& weights,
                                const Tensor& ks, const Tensor& ke) {
  const char* op = "lightning_indexer_logits";
  Inputs in(op, q, k, weights, kFloatsOrE4m3);
  in.set_k_scale(op, k_scale);
  in.set_ranges(op, ks, ke);
  Tensor scores = empty_cpu({in.args.num_queries, in.args.num_keys}, in.real());
  in.args.scores = scores.mutable_data_ptr();
  GLM5_CALL_INDEXER_KERNEL(lightning_indexer_logits, in);
  return scores;
}

Tensor lightning_indexer_selected_logits(const Tensor& q, const Tensor& k, const Tensor& weights, const Tensor& indices) {
  const char* op = "lightning_indexer_selected_logits";
  Inputs in(op, q, k, weights, kFloats);
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
  Inputs in(op, q, k, weights, kFloatsOrE4m3);
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
  Inputs in(op, q, k, weights, kFloats);
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

std::tuple<Tensor, Tensor> lightning_indexer_topk_paged(const Tensor& q, const Tensor& weights, const Tensor& cache,
                                                        const Tensor& block_table, const Tensor& sequence, const Tensor& ks,
                                                        const Tensor& ke, int64_t topk) {
  struct Call {
    LightningIndexerArgs args;
    bool is_float64;
  };
  return topk_of_pages(q, weights, cache, block_table, sequence, ks, ke, topk, [](const LightningIndexerArgs& args) {
    const Call one{args, args.dtype == static_cast<int>(Dtype::float64)};
    GLM5_CALL_INDEXER_KERNEL(lightning_indexer_topk, one);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glm5, m) {
  m.def("lightning_indexer_logits(Tensor q, Tensor k, Tensor? k_scale, Tensor weights, Tensor ks, Tensor ke) -> Tensor");
  m.def("lightning_indexer_selected_logits(Tensor q, Tensor k, Tensor weights, Tensor indices) -> Tensor");
  m.def(
      "lightning_indexer_topk(Tensor q, Tensor k, Tensor? k_scale, Tensor weights, Tensor ks, Tensor ke, int topk) -> "
      "(Tensor indices, Tensor lse)");
  m.def(
      "lightning_indexer_topk_paged(Tensor q, Tensor weights, Tensor cache, Tensor block_table, Tensor sequence, Tensor ks, "
      "Tensor ke, int topk) -> (Tensor indices, Tensor lse)");
  m.def(
      "lightning_indexer_logits_backward(Tensor grad, Tensor q, Tensor k, Tensor weights, Tensor ks, Tensor ke, "
      "Tensor? indices=None) -> (Tensor dq, Tensor dk, Tensor dweights)");
}

STABLE_TORCH_LIBRARY_IMPL(glm5, CPU, m) {
  GLM5_IMPL(m, lightning_indexer_logits);
  GLM5_IMPL(m, lightning_indexer_selected_logits);
  GLM5_IMPL(m, lightning_indexer_topk);
  GLM5_IMPL(m, lightning_indexer_topk_paged);
  GLM5_IMPL(m, lightning_indexer_logits_backward);
}

}  // namespace glm5
