// Schemas, argument checks and dispatch of the int8 lightning indexer.
#include "lightning_indexer_int8/lightning_indexer_int8.h"

#include "lightning_indexer/inputs.h"

#if defined(__x86_64__)
#define GLM5_CALL_INT8_KERNEL(fn, args) \
  do { \
    if (current_isa() == Isa::amx) cpu::amx::fn(args); \
    else GLM5_CALL_KERNEL(false, fn, args); \
  } while (0)
#else
#define GLM5_CALL_INT8_KERNEL(fn, args) GLM5_CALL_KERNEL(false, fn, args)
#endif

namespace glm5 {
namespace {

struct Int8Inputs : LightningIndexerInputs {
  Int8Inputs(const char* op, const Tensor& q_in, const Tensor& k_in, const Tensor& k_scale, const Tensor& weights_in,
             const Tensor& ks, const Tensor& ke)
      : LightningIndexerInputs(op, q_in, k_in, weights_in, {ScalarType::Char}) {
    if (args.dim > kInt8MaxDim)
      fail(op, ": q has shape ", shape_of(q), ", want at most ", kInt8MaxDim, " in dimension 2, so that sums fit int32");
    set_k_scale(op, k_scale);
    set_ranges(op, ks, ke);
  }
};

Tensor lightning_indexer_logits_int8(const Tensor& q, const Tensor& k, const Tensor& k_scale, const Tensor& weights,
                                     const Tensor& ks, const Tensor& ke) {
  Int8Inputs in("lightning_indexer_logits_int8", q, k, k_scale, weights, ks, ke);
  Tensor scores = empty_cpu({in.args.num_queries, in.args.num_keys}, ScalarType::Float);
  in.args.scores = scores.mutable_data_ptr();
  GLM5_CALL_INT8_KERNEL(lightning_indexer_logits_int8, in.args);
  return scores;
}

std::tuple<Tensor, Tensor> lightning_indexer_topk_int8(const Tensor& q, const Tensor& k, const Tensor& k_scale,
                                                       const Tensor& weights, const Tensor& ks, const Tensor& ke,
                                                       int64_t topk) {
  const char* op = "lightning_indexer_topk_int8";
  if (topk < 0) fail(op, ": topk is ", topk, ", want a number >= 0");
  Int8Inputs in(op, q, k, k_scale, weights, ks, ke);
  Tensor indices = empty_cpu({in.args.num_queries, topk}, ScalarType::Int);
  Tensor lse = empty_cpu({in.args.num_queries}, ScalarType::Float);
  in.args.topk = topk;
  in.args.chosen = indices.mutable_data_ptr<int32_t>();
  in.args.lse = lse.mutable_data_ptr();
  GLM5_CALL_INT8_KERNEL(lightning_indexer_topk_int8, in.args);
  return {indices, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glm5, m) {
  m.def("lightning_indexer_logits_int8(Tensor q, Tensor k, Tensor k_scale, Tensor weights, Tensor ks, Tensor ke) -> Tensor");
  m.def(
      "lightning_indexer_topk_int8(Tensor q, Tensor k, Tensor k_scale, Tensor weights, Tensor ks, Tensor ke, int topk) -> "
      "(Tensor indices, Tensor lse)");
}

STABLE_TORCH_LIBRARY_IMPL(glm5, CPU, m) {
  GLM5_IMPL(m, lightning_indexer_logits_int8);
  GLM5_IMPL(m, lightning_indexer_topk_int8);
}

}  // namespace glm5
