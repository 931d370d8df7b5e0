// The indexer's backward on the CPU, over every visible key or over selected keys alone. With z = q_h . k_s recomputed as
// the forward does, and P[t,h,s] = grad[t,s] * weights[t,h] where z > 0 (0 elsewhere):
//   dweights[t,h] = sum_s grad[t,s] * relu(z)      dq[t,h] = sum_s P[t,h,s] k[s]      dk[s] = sum_t sum_h P[t,h,s] q[t,h]
// Two passes, each in a fixed order: one over queries for dweights and dq (keys ascending), one over ranges of keys for dk
// (queries ascending). Nothing is atomic. Sums are float32, blocked by tile and by kBlockRows queries.
#include "lightning_indexer/tile.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int64_t kBlockQueries = 8;    // queries that share a packed key tile in the pass over queries
constexpr int64_t kBlockRows = 256;     // queries summed before dk's block joins its total
constexpr int64_t kSelectedRange = 256;  // keys of one task of the pass over keys, for selected keys

// grad of the keys of a tile that the query sees, and 1 for these; both are zero for every other key.
template <class R>
struct TileGrad {
  alignas(64) R grad[kTileKeys];
  alignas(64) R seen[kTileKeys];

  // The query sees the keys [begin, end) of the tile that starts at key `tile`.
  void load_range(const R* row, int64_t begin, int64_t end, int64_t tile) {
    for (int64_t i = 0; i < kTileKeys; ++i) {
      const bool in_range = tile + i >= begin && tile + i < end;
      grad[i] = in_range ? row[tile + i] : 0;
      seen[i] = in_range;
    }
  }
};

// For one tile: probabilities-like P [num_heads][kTileKeys], and where wanted the lanes of dweights [num_heads] vectors.
// A key that the query does not see adds an exact zero to dweights, whatever it holds: 0 * NaN would not.
template <int NH, class E, class R>
GLM5_INLINE void weigh_heads(const E* heads, const R* weights, int64_t steps, const E* keys, const TileGrad<R>& from, R* p,
                             R* dw) {
  using V = Vector<R>;
  constexpr int L = V::kLanes;
  for (int64_t i = 0; i < kTileKeys; i += kVectors * L) {
    V dots[NH][kVectors];
    dot_products<NH, kVectors>(heads, steps, keys + i, dots);
#pragma GCC unroll 8
    for (int h = 0; h < NH; ++h) {
      V lanes = load(dw + h * L);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const V g = load(from.grad + i + v * L), zero = splat<V>(0);
        store(p + h * kTileKeys + i + v * L, where_lt(zero, dots[h][v], g * splat<V>(weights[h]), zero));
        lanes = fma(g, where_lt(zero, load(from.seen + i + v * L), max(zero, dots[h][v]), zero), lanes);
      }
      store(dw + h * L, lanes);
    }
  }
}

template <class E, class R>
void weigh_tile(const E* heads, const R* weights, int64_t num_heads, int64_t steps, const E* keys, const TileGrad<R>& grad,
                R* p, R* dw) {
  constexpr int L = Vector<R>::kLanes;
  int64_t h = 0;
  for (; h + kHeads <= num_heads; h += kHeads)
    weigh_heads<kHeads>(heads + h * steps, weights + h, steps, keys, grad, p + h * kTileKeys, dw + h * L);
  for (; h < num_heads; ++h)
    weigh_heads<1>(heads + h * steps, weights + h, steps, keys, grad, p + h * kTileKeys, dw + h * L);
}

// out[r][0..dim) += sum over i < n of p[r * row_stride + i * step_stride] * rows[i * dim ...], for NR rows r.
template <int NR, class R>
GLM5_INLINE void accumulate(const R* p, int64_t row_stride, int64_t step_stride, const R* rows, int64_t n, int64_t dim,
                            R* out) {
  using V = Vector<R>;
  constexpr int L = V::kLanes;
  int64_t d = 0;
  for (; d + kVectors * L <= dim; d += kVectors * L) {
    V total[NR][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) total[r][v] = splat<V>(0);
    for (int64_t i = 0; i < n; ++i) {
      V row[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) row[v] = load(rows + i * dim + d + v * L);
#pragma GCC unroll 8
      for (int r = 0; r < NR; ++r) {
        const V scale = splat<V>(p[r * row_stride + i * step_stride]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) total[r][v] = fma(scale, row[v], total[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) store(out + r * dim + d + v * L, load(out + r * dim + d + v * L) + total[r][v]);
  }
  for (; d < dim; d += L) {
    for (int r = 0; r < NR; ++r) {
      V total = splat<V>(0);
      for (int64_t i = 0; i < n; ++i)
        total = fma(splat<V>(p[r * row_stride + i * step_stride]), load_n(rows + i * dim + d, dim - d), total);
      store_n(out + r * dim + d, load_n(out + r * dim + d, dim - d) + total, dim - d);
    }
  }
}

template <class R>
void accumulate_rows(const R* p, int64_t row_stride, int64_t step_stride, const R* rows, int64_t n, int64_t dim,
                     int64_t num_rows, R* out) {
  int64_t r = 0;
  for (; r + kHeads <= num_rows; r += kHeads)
    accumulate<kHeads>(p + r * row_stride, row_stride, step_stride, rows, n, dim, out + r * dim);
  for (; r < num_rows; ++r) accumulate<1>(p + r * row_stride, row_stride, step_stride, rows, n, dim, out + r * dim);
}

template <class T>
void widen_row(const T* row, int64_t dim, Real<T>* out) {
  constexpr int L = Vector<T>::kLanes;
  for (int64_t d = 0; d < dim; d += L) store_n(out + d, load_n(row + d, dim - d), dim - d);
}

template <class T, class R>
void store_rounded(const R* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = round_to<T>(from[i]);
}

int64_t count_selected(const int32_t* indices, int64_t topk) {
  int64_t low = 0, high = topk;  // -1s stand last
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (indices[middle] >= 0) low = middle + 1;
    else high = middle;
  }
  return low;
}

// The first of the ascending indices[0..n) that is >= key.
int64_t first_at_least(const int32_t* indices, int64_t n, int64_t key) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (indices[middle] < key) low = middle + 1;
    else high = middle;
  }
  return low;
}

template <class T>
struct Sizes {
  int64_t steps, heads, dims;
  explicit Sizes(const LightningIndexerArgs& a)
      : steps(Packing<T>::steps(a.dim)), heads(a.num_heads), dims(a.num_heads * a.dim) {}
};

template <class T>
void backward_queries(const LightningIndexerArgs& a) {
  using R = Real<T>;
  constexpr int L = Vector<R>::kLanes;
  const Sizes<T> size(a);
  const T *q = static_cast<const T*>(a.q), *k = static_cast<const T*>(a.k);
  const R *weights = static_cast<const R*>(a.weights), *grads = static_cast<const R*>(a.grad);
  const int64_t block = a.indices ? 1 : kBlockQueries;
  parallel_tasks((a.num_queries + block - 1) / block, [&](int64_t task) {
    const int64_t q0 = task * block, q1 = min_of(q0 + block, a.num_queries);
    auto* keys = static_cast<Element<T>*>(
        thread_scratch(0, sizeof(Element<T>) * size.steps * (kTileKeys + block * size.heads) + 64));
    Element<T>* buffer = keys + size.steps * kTileKeys;
    R* rows = static_cast<R*>(thread_scratch(1, sizeof(R) * (kTileKeys * (a.dim + size.heads) + 64)));
    R* p = rows + kTileKeys * a.dim;
    R* dq = static_cast<R*>(thread_scratch(2, sizeof(R) * (block * (size.dims + size.heads * L) + 64)));
    R* dw = dq + block * size.dims;
    std::memset(dq, 0, sizeof(R) * block * (size.dims + size.heads * L));
    TileGrad<R> grad;
    const Element<T>* heads[kBlockQueries];
    int64_t low = a.num_keys, high = 0;
    for (int64_t t = q0; t < q1; ++t) {
      heads[t - q0] = pack_heads(q + t * size.dims, size.heads, a.dim, buffer + (t - q0) * size.heads * size.steps);
      if (!a.indices && a.ke[t] > a.ks[t]) low = min_of(low, a.ks[t]), high = max_of(high, a.ke[t]);
    }
    const auto add = [&](int64_t t, int64_t first, int64_t last) {  // keys [first, last) of the tile
      R* dq_row = dq + (t - q0) * size.dims;
      weigh_tile(heads[t - q0], weights + t * size.heads, size.heads, size.steps, keys, grad, p,
                 dw + (t - q0) * size.heads * L);
      accumulate_rows(p + first, kTileKeys, 1, rows + first * a.dim, last - first, a.dim, size.heads, dq_row);
    };
    if (a.indices) {
      const int32_t* indices = a.indices + q0 * a.topk;
      const int64_t count = count_selected(indices, a.topk);
      for (int64_t i = 0; i < count; i += kTileKeys) {
        const int64_t n = min_of(kTileKeys, count - i);
        pack_keys(KeyRows<T>{k, a.dim, indices + i}, n, keys);
        for (int64_t j = 0; j < n; ++j) widen_row(k + indices[i + j] * a.dim, a.dim, rows + j * a.dim);
        grad.load_range(grads + q0 * a.topk, i, i + n, i);
        add(q0, 0, n);
      }
    } else {
      for (int64_t tile = low / kTileKeys * kTileKeys; tile < high; tile += kTileKeys) {
        const int64_t n = min_of(kTileKeys, a.num_keys - tile);
        pack_keys(KeyRows<T>{k + tile * a.dim, a.dim}, n, keys);
        for (int64_t j = 0; j < n; ++j) widen_row(k + (tile + j) * a.dim, a.dim, rows + j * a.dim);
        for (int64_t t = q0; t < q1; ++t) {
          const int64_t begin = max_of(a.ks[t], tile), end = min_of(a.ke[t], tile + n);
          if (begin >= end) continue;
          grad.load_range(grads + t * a.num_keys, begin, end, tile);
          add(t, begin - tile, end - tile);
        }
      }
    }
    for (int64_t t = q0; t < q1; ++t) {
      store_rounded(dq + (t - q0) * size.dims, size.dims, static_cast<T*>(a.dq) + t * size.dims);
      for (int64_t h = 0; h < size.heads; ++h)
        static_cast<R*>(a.dweights)[t * size.heads + h] = sum(load(dw + ((t - q0) * size.heads + h) * L));
    }
  });
}

template <class T>
void backward_keys(const LightningIndexerArgs& a) {
  using R = Real<T>;
  constexpr int L = Vector<R>::kLanes;
  const Sizes<T> size(a);
  const T *q = static_cast<const T*>(a.q), *k = static_cast<const T*>(a.k);
  const R *weights = static_cast<const R*>(a.weights), *grads = static_cast<const R*>(a.grad);
  const int64_t range = a.indices ? kSelectedRange : kTileKeys;
  parallel_tasks((a.num_keys + range - 1) / range, [&](int64_t task) {
    const int64_t k0 = task * range, k1 = min_of(k0 + range, a.num_keys);
    auto* keys = static_cast<Element<T>*>(
        thread_scratch(0, sizeof(Element<T>) * size.steps * (kTileKeys + size.heads) + 64));
    Element<T>* buffer = keys + size.steps * kTileKeys;
    R* rows = static_cast<R*>(thread_scratch(1, sizeof(R) * (size.dims + size.heads * (kTileKeys + L) + 64)));
    R *p = rows + size.dims, *dw = p + size.heads * kTileKeys;
    R* total = static_cast<R*>(thread_scratch(2, sizeof(R) * (2 * range + kTileKeys) * a.dim + 64));
    R *part = total + range * a.dim, *gathered = part + range * a.dim;
    std::memset(total, 0, sizeof(R) * 2 * range * a.dim);
    std::memset(dw, 0, sizeof(R) * size.heads * L);
    TileGrad<R> grad;
    if (!a.indices) pack_keys(KeyRows<T>{k + k0 * a.dim, a.dim}, k1 - k0, keys);
    int64_t pending = 0;
    const auto flush = [&] {
      for (int64_t i = 0; i < range * a.dim; ++i) total[i] = total[i] + part[i], part[i] = 0;
      pending = 0;
    };
    for (int64_t t = 0; t < a.num_queries; ++t) {
      const int32_t* indices = a.indices ? a.indices + t * a.topk : nullptr;
      int64_t begin, end;
      if (indices) {
        const int64_t count = count_selected(indices, a.topk);
        begin = first_at_least(indices, count, k0), end = first_at_least(indices, count, k1);
      } else {
        begin = max_of(a.ks[t], k0), end = min_of(a.ke[t], k1);
      }
      if (begin >= end) continue;
      const Element<T>* heads = pack_heads(q + t * size.dims, size.heads, a.dim, buffer);
      for (int64_t h = 0; h < size.heads; ++h) widen_row(q + t * size.dims + h * a.dim, a.dim, rows + h * a.dim);
      if (indices) {
        for (int64_t i = begin; i < end; i += kTileKeys) {
          const int64_t n = min_of(kTileKeys, end - i);
          pack_keys(KeyRows<T>{k, a.dim, indices + i}, n, keys);
          grad.load_range(grads + t * a.topk, i, i + n, i);
          weigh_tile(heads, weights + t * size.heads, size.heads, size.steps, keys, grad, p, dw);
          std::memset(gathered, 0, sizeof(R) * n * a.dim);
          accumulate_rows(p, 1, kTileKeys, rows, size.heads, a.dim, n, gathered);
          for (int64_t j = 0; j < n; ++j) {
            R* out = part + (indices[i + j] - k0) * a.dim;
            for (int64_t d = 0; d < a.dim; ++d) out[d] += gathered[j * a.dim + d];
          }
        }
      } else {
        grad.load_range(grads + t * a.num_keys, begin, end, k0);
        weigh_tile(heads, weights + t * size.heads, size.heads, size.steps, keys, grad, p, dw);
        accumulate_rows(p + begin - k0, 1, kTileKeys, rows, size.heads, a.dim, end - begin, part + (begin - k0) * a.dim);
      }
      if (++pending == kBlockRows) flush();
    }
    flush();
    store_rounded(total, (k1 - k0) * a.dim, static_cast<T*>(a.dk) + k0 * a.dim);
  });
}

template <class T>
void backward(const LightningIndexerArgs& args) {
  backward_queries<T>(args);
  backward_keys<T>(args);
}

}  // namespace

void lightning_indexer_logits_backward(const LightningIndexerArgs& args) {
  if (args.dtype == 0) backward<bf16>(args);
  else if (args.dtype == 1) backward<float>(args);
  GLM5_INDEXER_DOUBLE(backward)
}

}  // namespace glm5::cpu::GLM5_ISA
