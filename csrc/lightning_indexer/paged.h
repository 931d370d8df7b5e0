// lightning_indexer_topk_paged: argument checks, and the cutting of a batch into runs of one sequence, each of which is a
// call of lightning_indexer_topk whose keys lie in pages. Included by binding.cpp.
#pragma once

#include "common/pages.h"
#include "common/parallel.h"
#include "lightning_indexer/lightning_indexer.h"

namespace glm5 {

// `call` runs the kernel of the set in force on a LightningIndexerArgs.
template <class Call>
std::tuple<Tensor, Tensor> topk_of_pages(const Tensor& q_in, const Tensor& weights_in, const Tensor& cache_in,
                                         const Tensor& block_table, const Tensor& sequence, const Tensor& ks_in,
                                         const Tensor& ke_in, int64_t topk, const Call& call) {
  const char* op = "lightning_indexer_topk_paged";
  if (topk < 0) fail(op, ": topk is ", topk, ", want a number >= 0");
  const Tensor q = as_contiguous(q_in), weights = as_contiguous(weights_in);
  const Tensor ks = as_contiguous(ks_in), ke = as_contiguous(ke_in);
  check_cpu(op, "q", q);
  check_cpu(op, "weights", weights);
  const Tensor cache = as_contiguous(cache_in);
  const Pool pool(op, cache);
  check_dtype(op, "q", q, {ScalarType::BFloat16, ScalarType::Float, ScalarType::Double, ScalarType::Float8_e4m3fn});
  const bool fp8 = q.scalar_type() == ScalarType::Float8_e4m3fn, float64 = q.scalar_type() == ScalarType::Double;
  check_dtype(op, "cache", cache, {fp8 ? ScalarType::Byte : q.scalar_type()});
  check_dtype(op, "weights", weights, {float64 ? ScalarType::Double : ScalarType::Float});
  check_dim(op, "q", q, 3, "[queries, heads, dim]");
  check_dim(op, "weights", weights, 2, "[queries, heads]");
  check_size(op, "cache", cache, 2, q.size(2) + (fp8 ? 4 : 0), fp8 ? "the dims of q and 4 bytes" : "the dims of q");
  check_size(op, "weights", weights, 0, q.size(0), "the queries of q");
  check_size(op, "weights", weights, 1, q.size(1), "the heads of q");
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"ks", ks}, {"ke", ke}}) {
    check_cpu(op, name, t);
    check_dtype(op, name, t, {ScalarType::Int});
    check_dim(op, name, t, 1, "[queries]");
    check_size(op, name, t, 0, q.size(0), "the queries of q");
  }
  const BlockTable table(op, block_table, sequence, q.size(0), pool);
  const std::vector<SequenceRun> runs = table.runs(op, ks.const_data_ptr<int32_t>(), ke.const_data_ptr<int32_t>());

  LightningIndexerArgs args{};
  args.dtype = fp8 ? kE4m3 : static_cast<int>(float_dtype(op, "q", q));
  args.num_heads = q.size(1);
  args.dim = q.size(2);
  args.num_keys = table.positions();
  args.k = cache.const_data_ptr();
  const int64_t element = fp8 ? 1 : float64 ? 8 : args.dtype == 0 ? 2 : 4, real = float64 ? 8 : 4;
  args.pages = {nullptr, pool.page_size, pool.num_pages, pool.page_size * pool.width * element};
  args.topk = topk;
  Tensor indices = empty_cpu({q.size(0), topk}, ScalarType::Int);
  Tensor lse = empty_cpu({q.size(0)}, weights.scalar_type());
  const char *q_at = static_cast<const char*>(q.const_data_ptr()),
             *w_at = static_cast<const char*>(weights.const_data_ptr());
  char* lse_at = static_cast<char*>(lse.mutable_data_ptr());
  int32_t* chosen = indices.mutable_data_ptr<int32_t>();
  const auto run_one = [&](int64_t i) {
    const SequenceRun& run = runs[i];
    LightningIndexerArgs mine = args;
    mine.num_queries = run.end - run.begin;
    mine.pages.table = run.table;
    mine.q = q_at + run.begin * args.num_heads * args.dim * element;
    mine.weights = w_at + run.begin * args.num_heads * real;
    mine.ks = ks.const_data_ptr<int32_t>() + run.begin;
    mine.ke = ke.const_data_ptr<int32_t>() + run.begin;
    mine.chosen = chosen + run.begin * topk;
    mine.lse = lse_at + run.begin * real;
    call(mine);
  };
  // Many runs are tasks; few are cut inside, one after the other.
  const int64_t count = static_cast<int64_t>(runs.size());
  if (count >= 2 * num_threads()) parallel_tasks(count, run_one);
  else
    for (int64_t i = 0; i < count; ++i) run_one(i);
  return {indices, lse};
}

}  // namespace glm5
