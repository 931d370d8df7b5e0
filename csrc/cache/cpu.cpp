// Rows into and out of pages. Every row is its own business: quantised by the arithmetic of quantize_fp8, or copied.
#include "cache/cache.h"

#include "common/parallel.h"
#include "common/quantize.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int64_t kTaskRows = 16;

GLM5_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// write(row, slot) for every row that has a slot. A task owns slots, not rows, and takes its rows in order: where two have
// the same slot the later one stays, at any thread count.
template <class Write>
void for_each_written(const CacheArgs& a, const Write& write) {
  const int64_t most = 4 * num_threads(), wanted = (a.num_rows + kTaskRows - 1) / kTaskRows;
  const int64_t tasks = num_threads() == 1 ? 1 : least(wanted, most);
  parallel_tasks(tasks, [&](int64_t task) {
    for (int64_t i = 0; i < a.num_rows; ++i) {
      const int64_t slot = a.slots[i];
      if (slot >= 0 && slot / kTaskRows % tasks == task) write(i, slot);
    }
  });
}

int64_t bytes_of(int dtype) { return dtype == 0 ? 2 : dtype == 1 ? 4 : 8; }

void copy_in(const CacheArgs& a) {
  const int64_t bytes = a.dim * bytes_of(a.dtype);
  for_each_written(a, [&](int64_t i, int64_t slot) {
    std::memcpy(static_cast<char*>(a.pages) + slot * bytes, static_cast<const char*>(a.rows) + i * bytes, bytes);
  });
}

// to[i] = from[i], rounded to nearest even where that is to be.
template <class From, class To>
GLM5_INLINE void convert(const From* from, int64_t n, To* to) {
  if constexpr (sizeof(From) == sizeof(To)) {
    std::memcpy(to, from, sizeof(From) * n);
  } else {
    int64_t i = 0;
    for (; i + F::kLanes <= n; i += F::kLanes) store(to + i, load(from + i));
    if (i < n) store_n(to + i, load_n(from + i, n - i), n - i);
  }
}

struct LatentRow {
  int64_t blocks, rope;
  explicit LatentRow(int64_t bytes) : blocks(bytes / kLatentBlockBytes), rope(bytes % kLatentBlockBytes / 2) {}
  int64_t bytes() const { return blocks * kLatentBlockBytes + 2 * rope; }
  static LatentRow of_dim(int64_t dim) {
    LatentRow row(0);
    row.blocks = dim / kLatentBlock, row.rope = dim % kLatentBlock;
    return row;
  }
};

template <class T>
void quantize_latent_rows(const CacheArgs& a) {
  const LatentRow row = LatentRow::of_dim(a.dim);
  for_each_written(a, [&](int64_t i, int64_t slot) {
    const T* from = static_cast<const T*>(a.rows) + i * a.dim;
    char* to = static_cast<char*>(a.pages) + slot * row.bytes();
    char* scales = to + row.blocks * kLatentBlock;
    for (int64_t b = 0; b < row.blocks; ++b, from += kLatentBlock, to += kLatentBlock) {
      const float scale = fp8_scale(largest_magnitude(from, kLatentBlock), false);
      encode_fp8(from, kLatentBlock, scale, reinterpret_cast<e4m3*>(to));
      std::memcpy(scales + 4 * b, &scale, 4);
    }
    convert(from, row.rope, reinterpret_cast<bf16*>(scales + 4 * row.blocks));
  });
}

// to[i] = codes[i] * scale in float32, rounded once; any NaN becomes the one that quantised tensors have.
template <class T>
GLM5_INLINE void dequantize(const e4m3* codes, float scale, int64_t n, T* to) {
  const F s = splat<F>(scale), inf = splat<F>(__builtin_inff()), nan = splat<F>(__builtin_nanf(""));
  for (int64_t i = 0; i < n; i += F::kLanes) {
    F x = load(codes + i) * s;
    if constexpr (sizeof(T) == 4) x = where_lt(x, inf, x, where_lt(splat<F>(0) - inf, x, x, nan));
    store(to + i, x);
  }
}

template <class T>
void dequantize_latent_row(const LatentRow& row, const char* from, T* to) {
  const char* scales = from + row.blocks * kLatentBlock;
  for (int64_t b = 0; b < row.blocks; ++b, from += kLatentBlock, to += kLatentBlock) {
    float scale;
    std::memcpy(&scale, scales + 4 * b, 4);
    dequantize(reinterpret_cast<const e4m3*>(from), scale, kLatentBlock, to);
  }
  convert(reinterpret_cast<const bf16*>(scales + 4 * row.blocks), row.rope, to);
}

// read(row in the pool, to) for every row; the next ones are fetched meanwhile.
template <class T, class Read>
void for_each_read(const CacheArgs& a, int64_t row_bytes, const Read& read) {
  constexpr int64_t kAhead = 4;
  parallel_tasks((a.num_rows + kTaskRows - 1) / kTaskRows, [&](int64_t task) {
    const int64_t end = least((task + 1) * kTaskRows, a.num_rows);
    const char* pages = static_cast<const char*>(a.pages);
    const auto fetch = [&](int64_t i) {
      if (i >= end || a.slots[i] < 0) return;
      for (int64_t b = 0; b < row_bytes; b += 64) __builtin_prefetch(pages + a.slots[i] * row_bytes + b);
    };
    for (int64_t i = 0; i < kAhead; ++i) fetch(task * kTaskRows + i);
    for (int64_t i = task * kTaskRows; i < end; ++i) {
      fetch(i + kAhead);
      T* to = static_cast<T*>(a.rows) + i * a.dim;
      if (a.slots[i] < 0) std::memset(static_cast<void*>(to), 0, sizeof(T) * a.dim);
      else read(pages + a.slots[i] * row_bytes, to);
    }
  });
}

template <class From, class To>
void copy_out(const CacheArgs& a) {
  for_each_read<To>(a, a.dim * static_cast<int64_t>(sizeof(From)),
                    [&](const char* from, To* to) { convert(reinterpret_cast<const From*>(from), a.dim, to); });
}

template <class T>
void dequantize_latent_rows(const CacheArgs& a) {
  const LatentRow row = LatentRow::of_dim(a.dim);
  for_each_read<T>(a, row.bytes(), [&](const char* from, T* to) { dequantize_latent_row(row, from, to); });
}

template <class T>
void quantize_indexer_rows(const CacheArgs& a) {
  for_each_written(a, [&](int64_t i, int64_t slot) {
    const T* from = static_cast<const T*>(a.rows) + i * a.dim;
    char* page = static_cast<char*>(a.pages) + slot / a.page_size * (a.page_size * (a.dim + 4));
    const float scale = fp8_scale(largest_magnitude(from, a.dim), false);
    encode_fp8(from, a.dim, scale, reinterpret_cast<e4m3*>(page) + slot % a.page_size * a.dim);
    std::memcpy(page + a.page_size * a.dim + slot % a.page_size * 4, &scale, 4);
  });
}

bool is_bf16(int dtype) { return dtype == 0; }

}  // namespace

void latent_cache_write(const CacheArgs& args) {
  if (!args.fp8) copy_in(args);
  else if (is_bf16(args.dtype)) quantize_latent_rows<bf16>(args);
  else quantize_latent_rows<float>(args);
}

void indexer_cache_write(const CacheArgs& args) {
  if (!args.fp8) copy_in(args);
  else if (is_bf16(args.dtype)) quantize_indexer_rows<bf16>(args);
  else quantize_indexer_rows<float>(args);
}

void latent_cache_read(const CacheArgs& args) {
  const bool to_bf16 = is_bf16(args.dtype);
  if (args.fp8) return to_bf16 ? dequantize_latent_rows<bf16>(args) : dequantize_latent_rows<float>(args);
  if (args.dtype == 2) return copy_out<double, double>(args);
  if (is_bf16(args.pages_dtype)) return to_bf16 ? copy_out<bf16, bf16>(args) : copy_out<bf16, float>(args);
  return to_bf16 ? copy_out<float, bf16>(args) : copy_out<float, float>(args);
}

}  // namespace glm5::cpu::GLM5_ISA
