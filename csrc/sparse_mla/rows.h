// What the plain forward (cpu.cpp) and backward (backward.cpp) share: the latent rows of a block of keys, widened to float32
// where they are bf16, and how many queries one task takes through their lists in step.
#pragma once

#include "sparse_mla/product.h"
#include "sparse_mla/scratch.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int64_t kTogether = 8;  // most queries of a task

GLM5_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
GLM5_INLINE int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }

template <class T>
void widen(const T* from, Acc<T>* to, int64_t n) {
  using V = Vector<T>;
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) store(to + i, load(from + i));
  if (i < n) store_n(to + i, load_n(from + i, n - i), n - i);
}

// x in Acc<T>: itself, or a widened copy in `buffer`.
template <class T>
const Acc<T>* widened(const T* x, Acc<T>* buffer, int64_t n) {
  if constexpr (sizeof(T) == sizeof(Acc<T>)) {
    return x;
  } else {
    widen(x, buffer, n);
    return buffer;
  }
}

// The keys named in list[from, to), in list order. Returns how many.
int64_t compact(const int32_t* list, int64_t from, int64_t to, int32_t* keys) {
  int64_t n = 0;
  for (int64_t j = from; j < to; ++j)
    if (list[j] >= 0) keys[n++] = list[j];
  return n;
}

// A block's latent rows and, where rows are used in place, those of the block after it.
template <class T>
struct Rows {
  using S = Acc<T>;
  static constexpr bool kWiden = sizeof(T) != sizeof(S);
  S* buffer;  // [kBlock][dim] where rows are widened
  const S **rows, **next;

  void carve(Carver& c, int64_t dim) {
    buffer = c.take<S>(kWiden ? kBlock * dim : 0);
    rows = c.take<const S*>(kBlock + kSpareRows);
    next = c.take<const S*>(kBlock + kSpareRows);
  }

  // n of 1 to kBlock keys, m of 0 to kBlock next ones.
  void gather(const SparseMlaArgs& a, const int32_t* keys, int64_t n, const int32_t* next_keys, int64_t m) const {
    const T* kv = static_cast<const T*>(a.kv);
    for (int64_t i = 0; i < n; ++i) rows[i] = widened(kv + keys[i] * a.dim, buffer + i * a.dim, a.dim);
    for (int64_t i = n; i < n + kSpareRows; ++i) rows[i] = rows[0];
    if constexpr (!kWiden)
      for (int64_t i = 0; i < n + kSpareRows; ++i) next[i] = i < m ? kv + next_keys[i] * a.dim : rows[0];
  }

  const S* const* to_fetch(int64_t from = 0) const { return kWiden ? nullptr : next + from; }
};
// Queries that one task takes through their lists in step. Neighbours select much the same keys, and lists ascend, so
// that a row is fetched once for several of them. Their own rows and sums have to share the second-level cache with it.
int64_t queries_together(const SparseMlaArgs& a) {
  int64_t n = kTogether;
  while (n > 1 && n * a.heads * (a.dim + a.value_dim) > (96 << 10)) n /= 2;
  while (n > 1 && a.queries < 4 * n * num_threads()) n /= 2;
  return n;
}

}  // namespace
}  // namespace glm5::cpu::GLM5_ISA
