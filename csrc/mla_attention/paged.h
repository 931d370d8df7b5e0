// mla_attention_paged: argument checks, and what makes it a call of mla_attention. The latent rows of all heads are the same:
// a query's heads are queries of one head, which share the keys that a task packs; a row's bits depend on its own query and
// keys alone. What the sequences hold is read from the pages into one tensor, some sequences at a time. Included by
// binding.cpp, which has `Tiles`.
#pragma once

#include <cmath>

#include "common/pages.h"
#include "common/parallel.h"
#include "mla_attention/mla_attention.h"

namespace glm5 {

inline constexpr int64_t kGatheredRows = 65536;  // that a call reads at a time, if no sequence has more

// `call` runs the forward kernel of the set in force on an MlaAttentionArgs without tiles.
template <class Call>
std::tuple<Tensor, Tensor> attend_to_paged_ranges(const Tensor& q_in, const Tensor& cache_in, const Tensor& block_table,
                                                  const Tensor& sequence, const Tensor& ks_in, const Tensor& ke_in,
                                                  double scale, int64_t d_v, const Call& call) {
  const char* op = "mla_attention_paged";
  const Tensor q = as_contiguous(q_in), ks_t = as_contiguous(ks_in), ke_t = as_contiguous(ke_in);
  check_cpu(op, "q", q);
  const Tensor cache = as_contiguous(cache_in);
  const Pool pool(op, cache);
  const Dtype dtype = float_dtype(op, "q", q);
  if (pool.fp8) check_dtype(op, "q", q, {ScalarType::BFloat16});
  else check_same_dtype(op, "cache", cache, "q", q);
  check_dim(op, "q", q, 3, "[queries, heads, dim]");
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"ks", ks_t}, {"ke", ke_t}}) {
    check_cpu(op, name, t);
    check_dtype(op, name, t, {ScalarType::Int});
    check_dim(op, name, t, 1, "[queries]");
    check_size(op, name, t, 0, q.size(0), "the queries of q");
  }
  if (q.size(1) < 1 || q.size(2) < 1) fail(op, ": q has shape ", shape_of(q), ", want at least one head and one dimension");
  if (const int64_t dim = pool.latent_dim(op, cache); dim != q.size(2))
    fail(op, ": cache has shape ", shape_of(cache), ", rows of ", dim, " dims, want ", q.size(2), " (the dim of q)");
  if (d_v < 1 || d_v > q.size(2)) fail(op, ": d_v is ", d_v, ", want 1 to ", q.size(2), " (the dim of q and cache)");
  if (!std::isfinite(scale)) fail(op, ": scale is ", scale, ", want a finite number");
  const BlockTable table(op, block_table, sequence, q.size(0), pool);
  const int32_t *ks = ks_t.const_data_ptr<int32_t>(), *ke = ke_t.const_data_ptr<int32_t>();
  const std::vector<SequenceRun> runs = table.runs(op, ks, ke);

  const int64_t heads = q.size(1), dim = q.size(2), element = dtype == Dtype::bf16 ? 2 : dtype == Dtype::float32 ? 4 : 8;
  const bool float64 = dtype == Dtype::float64;
  Tensor out = empty_cpu({q.size(0), heads, d_v}, q.scalar_type());
  Tensor lse = empty_cpu({q.size(0), heads}, float64 ? ScalarType::Double : ScalarType::Float);
  std::vector<int32_t> slots, from, to;  // of the gathered rows; the ranges of the heads of the queries
  for (size_t begin = 0, end; begin < runs.size(); begin = end) {
    slots.clear(), from.clear(), to.clear();
    for (end = begin; end < runs.size(); ++end) {
      const SequenceRun& run = runs[end];
      const int64_t base = static_cast<int64_t>(slots.size()), count = run.ke - run.ks;
      if (end > begin && base + count > kGatheredRows) break;
      for (int64_t s = run.ks; s < run.ke; ++s) slots.push_back(table.slot(run.table, s));
      for (int64_t t = run.begin; t < run.end; ++t) {
        const bool any = ks[t] < ke[t];
        from.insert(from.end(), heads, any ? static_cast<int32_t>(ks[t] - run.ks + base) : 0);
        to.insert(to.end(), heads, any ? static_cast<int32_t>(ke[t] - run.ks + base) : 0);
      }
    }
    const int64_t first = runs[begin].begin, rows = static_cast<int64_t>(from.size());
    Tensor kv = empty_cpu({static_cast<int64_t>(slots.size()), dim}, q.scalar_type());
    CacheArgs read{};
    read.fp8 = pool.fp8;
    read.dtype = static_cast<int>(dtype);
    read.pages_dtype = pool.dtype;
    read.num_rows = kv.size(0);
    read.dim = dim;
    read.page_size = pool.page_size;
    read.slots = slots.data();
    read.pages = const_cast<void*>(cache.const_data_ptr());
    read.rows = kv.mutable_data_ptr();
    GLM5_CALL_KERNEL(float64, latent_cache_read, read);
    MlaAttentionArgs args{};
    args.dtype = static_cast<int>(dtype);
    args.num_queries = rows;
    args.num_keys = kv.size(0);
    args.heads = 1;
    args.dk = dim, args.dv = d_v, args.v_stride = dim;
    args.scale = scale;
    args.q = static_cast<const char*>(q.const_data_ptr()) + first * heads * dim * element;
    args.k = args.v = read.rows;
    args.ks = from.data(), args.ke = to.data();
    args.out = static_cast<char*>(out.mutable_data_ptr()) + first * heads * d_v * element;
    args.lse = static_cast<char*>(lse.mutable_data_ptr()) + first * heads * (float64 ? 8 : 4);
    call(args);
  }
  return {out, lse};
}

}  // namespace glm5
