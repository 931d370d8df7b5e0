// Schemas, argument checks and dispatch of the caches.
#include "cache/cache.h"

#include <optional>

#include "common/pages.h"

namespace glm5 {
namespace {

// What both writes check. `k` is the argument's name of the rows, dim what the pool's rows hold.
CacheArgs write_args(const char* op, const char* name, const Tensor& rows, const Tensor& slots, const Tensor& cache,
                     const Pool& pool, int64_t dim) {
  check_cpu(op, name, rows);
  check_cpu(op, "slots", slots);
  if (pool.fp8) check_dtype(op, name, rows, {ScalarType::BFloat16, ScalarType::Float});
  else check_same_dtype(op, name, rows, "cache", cache);
  check_dtype(op, "slots", slots, {ScalarType::Int});
  check_dim(op, name, rows, 2, "[rows, dim]");
  check_dim(op, "slots", slots, 1, "[rows]");
  check_size(op, name, rows, 1, dim, "the dims of a row of cache");
  check_size(op, "slots", slots, 0, rows.size(0), "one a row");
  if (!cache.is_contiguous())
    fail(op, ": cache has shape ", shape_of(cache), " and is not contiguous, want a contiguous pool to write into");
  CacheArgs args{};
  args.fp8 = pool.fp8;
  args.dtype = static_cast<int>(float_dtype(op, name, rows));
  args.pages_dtype = pool.dtype;
  args.num_rows = rows.size(0);
  args.dim = dim;
  args.page_size = pool.page_size;
  args.slots = checked_slots(op, slots, pool.num_slots());
  args.pages = const_cast<void*>(cache.const_data_ptr());
  args.rows = const_cast<void*>(rows.const_data_ptr());
  return args;
}

void latent_cache_write(const Tensor& rows_in, const Tensor& slots_in, const Tensor& cache) {
  const char* op = "latent_cache_write";
  const Pool pool(op, cache);
  const Tensor rows = as_contiguous(rows_in), slots = as_contiguous(slots_in);
  const CacheArgs args = write_args(op, "rows", rows, slots, cache, pool, pool.latent_dim(op, cache));
  GLM5_CALL_KERNEL(args.dtype == 2, latent_cache_write, args);
}

void indexer_cache_write(const Tensor& k_in, const Tensor& slots_in, const Tensor& cache) {
  const char* op = "indexer_cache_write";
  const Pool pool(op, cache);
  if (pool.fp8 && pool.width < 4) fail(op, ": cache has shape ", shape_of(cache), ", want rows of dim + 4 bytes");
  const Tensor k = as_contiguous(k_in), slots = as_contiguous(slots_in);
  const CacheArgs args = write_args(op, "k", k, slots, cache, pool, pool.fp8 ? pool.width - 4 : pool.width);
  GLM5_CALL_KERNEL(args.dtype == 2, indexer_cache_write, args);
}

Tensor latent_cache_read(const Tensor& cache_in, const Tensor& slots_in, std::optional<ScalarType> out_dtype) {
  const char* op = "latent_cache_read";
  const Tensor cache = as_contiguous(cache_in);
  const Pool pool(op, cache);
  const Tensor slots = as_contiguous(slots_in);
  check_cpu(op, "slots", slots);
  check_dtype(op, "slots", slots, {ScalarType::Int});
  check_dim(op, "slots", slots, 1, "[rows]");
  const ScalarType type = out_dtype.value_or(pool.fp8 ? ScalarType::BFloat16 : cache.scalar_type());
  const bool float64 = pool.dtype == static_cast<int>(Dtype::float64);
  if (float64 ? type != ScalarType::Double : type != ScalarType::BFloat16 && type != ScalarType::Float)
    fail(op, ": out_dtype is ", torch::headeronly::toString(type), ", want ", float64 ? "Double" : "BFloat16 or Float");
  CacheArgs args{};
  args.fp8 = pool.fp8;
  args.dtype = static_cast<int>(type == ScalarType::BFloat16 ? Dtype::bf16 : float64 ? Dtype::float64 : Dtype::float32);
  args.pages_dtype = pool.dtype;
  args.num_rows = slots.size(0);
  args.dim = pool.latent_dim(op, cache);
  args.page_size = pool.page_size;
  args.slots = checked_slots(op, slots, pool.num_slots());
  args.pages = const_cast<void*>(cache.const_data_ptr());
  Tensor rows = empty_cpu({args.num_rows, args.dim}, type);
  args.rows = rows.mutable_data_ptr();
  GLM5_CALL_KERNEL(float64, latent_cache_read, args);
  return rows;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glm5, m) {
  m.def("latent_cache_write(Tensor rows, Tensor slots, Tensor(a!) cache) -> ()");
  m.def("latent_cache_read(Tensor cache, Tensor slots, ScalarType? out_dtype=None) -> Tensor");
  m.def("indexer_cache_write(Tensor k, Tensor slots, Tensor(a!) cache) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(glm5, CPU, m) {
  GLM5_IMPL(m, latent_cache_write);
  GLM5_IMPL(m, latent_cache_read);
  GLM5_IMPL(m, indexer_cache_write);
}

}  // namespace glm5
