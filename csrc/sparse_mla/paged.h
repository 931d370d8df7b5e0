// sparse_mla_paged: argument checks, and what makes it a call of sparse_mla. Float pages are used where they lie: positions
// become slots of the flat pool, and a row's bits depend on what the slots hold and on the order of the list alone. Of FP8
// pages the selected rows are read into scratch as bf16, some queries at a time. Included by binding.cpp.
#pragma once

#include <atomic>

#include "common/pages.h"
#include "common/parallel.h"
#include "sparse_mla/sparse_mla.h"

namespace glm5 {

inline constexpr int kPagedScratch = 5;                        // a slot that the kernels leave alone
inline constexpr int64_t kPagedScratchBytes = int64_t{16} << 20;  // of rows read at a time

// indices [queries, topk], positions of each query's sequence, as slots of the pool.
inline void indices_to_slots(const char* op, const BlockTable& table, const Tensor& indices, int32_t* slots) {
  const int32_t* from = indices.const_data_ptr<int32_t>();
  const int64_t topk = indices.size(1), positions = table.positions(), size = table.page_size;
  const bool shifted = (size & (size - 1)) == 0;
  const int shift = __builtin_ctzll(static_cast<uint64_t>(size));
  std::atomic<int64_t> bad{-1};
  parallel_tasks(table.queries, [&](int64_t t) {
    const int32_t* pages = table.row(t);
    for (int64_t i = t * topk; i < (t + 1) * topk; ++i) {
      const int64_t s = from[i];
      slots[i] = -1;
      if (s == -1) continue;
      const int64_t entry = s < 0 || s >= positions ? -1 : shifted ? s >> shift : s / size;
      if (entry < 0 || pages[entry] < 0 || pages[entry] >= table.num_pages) {
        bad.store(i);
        return;
      }
      slots[i] = static_cast<int32_t>(pages[entry] * size + (s - entry * size));
    }
  });
  if (const int64_t i = bad.load(); i >= 0) {
    const int64_t t = i / topk;
    if (from[i] < -1 || from[i] >= positions)
      fail(op, ": indices[", t, ", ", i % topk, "] is ", from[i], ", want -1 (none) or 0 to ", positions - 1,
           " (a position of block_table)");
    table.refuse_page(op, t, from[i] / size);
  }
}

// `call` runs the forward kernel of the set in force on a SparseMlaArgs.
template <class Call>
std::tuple<Tensor, Tensor> attend_to_pages(const Tensor& q_in, const Tensor& cache_in, const Tensor& block_table,
                                           const Tensor& sequence, const Tensor& indices_in, double scale, int64_t d_v,
                                           const Call& call) {
  const char* op = "sparse_mla_paged";
  const Tensor q = as_contiguous(q_in), indices = as_contiguous(indices_in);
  check_cpu(op, "q", q);
  check_cpu(op, "indices", indices);
  const Tensor cache = as_contiguous(cache_in);
  const Pool pool(op, cache);
  const Dtype dtype = float_dtype(op, "q", q);
  if (pool.fp8) check_dtype(op, "q", q, {ScalarType::BFloat16});
  else check_same_dtype(op, "cache", cache, "q", q);
  check_dtype(op, "indices", indices, {ScalarType::Int});
  check_dim(op, "q", q, 3, "[queries, heads, dim]");
  check_dim(op, "indices", indices, 2, "[queries, topk]");
  check_size(op, "indices", indices, 0, q.size(0), "queries of q");
  if (q.size(1) < 1 || q.size(2) < 1) fail(op, ": q has shape ", shape_of(q), ", want at least one head and one dimension");
  if (const int64_t dim = pool.latent_dim(op, cache); dim != q.size(2))
    fail(op, ": cache has shape ", shape_of(cache), ", rows of ", dim, " dims, want ", q.size(2), " (the dim of q)");
  if (d_v < 1 || d_v > q.size(2)) fail(op, ": d_v is ", d_v, ", want 1 to ", q.size(2), " (the dim of q and cache)");
  if (!(scale - scale == 0)) fail(op, ": scale is ", scale, ", want a finite number");
  const BlockTable table(op, block_table, sequence, q.size(0), pool);

  SparseMlaArgs args{};
  args.dtype = static_cast<int>(dtype);
  args.queries = q.size(0);
  args.heads = q.size(1);
  args.dim = q.size(2);
  args.keys = pool.num_slots();
  args.value_dim = d_v;
  args.topk = indices.size(1);
  args.scale = scale;
  args.q = q.const_data_ptr();
  args.kv = cache.const_data_ptr();
  Tensor slots = empty_cpu({args.queries, args.topk}, ScalarType::Int);
  int32_t* slot = slots.mutable_data_ptr<int32_t>();
  indices_to_slots(op, table, indices, slot);
  args.indices = slot;
  const ScalarType acc = dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
  Tensor out = empty_cpu({args.queries, args.heads, d_v}, q.scalar_type());
  Tensor lse = empty_cpu({args.queries, args.heads}, acc);
  args.out = out.mutable_data_ptr();
  args.lse = lse.mutable_data_ptr();
  if (!pool.fp8) {
    call(args);
    return {out, lse};
  }

  const int64_t row_bytes = args.dim * 2, list_bytes = std::max<int64_t>(args.topk * row_bytes, 1);
  const int64_t chunk = std::min(args.queries, std::max<int64_t>(kPagedScratchBytes / list_bytes, 4 * num_threads()));
  CacheArgs read{};
  read.fp8 = true;
  read.dtype = static_cast<int>(Dtype::bf16);
  read.dim = args.dim;
  read.page_size = pool.page_size;
  read.pages = const_cast<void*>(args.kv);
  read.rows = thread_scratch(kPagedScratch, static_cast<size_t>(chunk * list_bytes + 64));
  SparseMlaArgs part = args;
  part.kv = read.rows;
  for (int64_t t = 0; t < args.queries; t += chunk) {
    part.queries = std::min(chunk, args.queries - t);
    part.keys = read.num_rows = part.queries * args.topk;
    read.slots = slot + t * args.topk;
    GLM5_CALL_KERNEL(false, latent_cache_read, read);
    for (int64_t i = 0; i < part.keys; ++i) slot[t * args.topk + i] = read.slots[i] < 0 ? -1 : static_cast<int32_t>(i);
    part.indices = read.slots;
    part.q = static_cast<const char*>(args.q) + t * args.heads * row_bytes;
    part.out = static_cast<char*>(args.out) + t * args.heads * d_v * 2;
    part.lse = static_cast<char*>(args.lse) + t * args.heads * 4;
    call(part);
  }
  return {out, lse};
}

}  // namespace glm5
