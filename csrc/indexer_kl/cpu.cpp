// The streamed loss on the CPU. A task takes a tile of queries through their keys, block by block: every attention head's
// scores become masses, every indexer head's become logits, and only the row statistics stay. The backward goes the same
// way once more (with indices the masses were kept), turns a block's logit gradients into P[t,h,s] = dI[t,s] w[t,h] where
// q_h . k_s > 0, and multiplies: dq = P k, dk = P^T q, dw[t,h] = sum_s dI[t,s] relu(q_h . k_s). Products are common/gemm's,
// whose elements know nothing of their tile, so a row's bits depend on its own keys alone.
#include "common/gemm/gemm.h"
#include "common/parts.h"
#include "indexer_kl/row.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int64_t kChunkLines = 256;  // (query, indexer head) pairs whose scores of a block are held at once

// A strided matrix.
template <class T>
struct Matrix {
  T* data;
  int64_t row, col = 1;
};

// c [m, n] (+)= a [m, k] b [k, n].
template <class T>
GLM5_INLINE void multiply(int64_t m, int64_t n, int64_t k, Matrix<const T> a, Matrix<const T> b, Matrix<Acc<T>> c,
                          bool accumulate) {
  constexpr int kReal = sizeof(Acc<T>) == 8 ? 2 : 1, kStored = sizeof(T) == 2 ? 0 : kReal;
  gemm_serial(
      GemmArgs{kStored, kReal, m, n, k, a.data, a.row, a.col, b.data, b.row, b.col, c.data, c.row, nullptr, accumulate});
}

// Everything that a task holds for one block of keys.
template <class T>
struct Block {
  using S = Acc<T>;
  S *masses, *logits;  // [rows][kKeyBlock]
  S* scores;           // [chunk rows * heads][kKeyBlock], or [attention heads or rows][kKeyBlock]
  T* signals;          // P: [chunk rows * heads][kKeyBlock]                           backward
  S *dq, *dweights;    // [rows, heads, dim], [rows, heads]                            backward
  S* gradients;        // dI: [chunk rows][kKeyBlock]                                  backward
  T *keys, *attn_keys; // gathered rows, with indices; without: keys that a row sees, backward
  T* queries;          // [chunk rows * heads, dim] that a key is seen by              backward
  S* dkeys;            // [kKeyBlock, dim], with indices                               backward
  int64_t chunk;       // rows of a chunk
  int64_t n;           // keys of the block at hand

  Block(const LightningIndexerKlArgs& a, int64_t rows, bool is_backward) {
    chunk = smaller(rows, larger(1, kChunkLines / a.heads));
    const int64_t lines = chunk * a.heads, block = kKeyBlock;
    const int64_t scores_lines = larger(lines, a.indices ? a.attn_heads : rows);
    S* reals = static_cast<S*>(
        thread_scratch(0, sizeof(S) * ((2 * rows + scores_lines) * block +
                                       (is_backward ? rows * a.heads * (a.dim + 1) + chunk * block + block * a.dim : 0))));
    masses = reals;
    logits = masses + rows * block;
    scores = logits + rows * block;
    dq = scores + scores_lines * block;
    dweights = dq + rows * a.heads * a.dim;
    gradients = dweights + rows * a.heads;
    dkeys = gradients + chunk * block;
    const int64_t gathered = a.indices ? block : 0, copied = a.indices || is_backward ? block : 0;
    signals = static_cast<T*>(thread_scratch(
        1, sizeof(T) * ((is_backward ? lines * (block + a.dim) : 0) + copied * a.dim + gathered * a.attn_dim + 1)));
    keys = signals + (is_backward ? lines * block : 0);
    attn_keys = keys + copied * a.dim;
    queries = attn_keys + gathered * a.attn_dim;
  }
};

// masses[r] = sum over attention heads, ascending, of exp(scale * score - lse).
template <class S>
void add_masses(const S* scores, double scale, S lse, int64_t n, bool first, S* masses) {
  using V = Vector<S>;
  const V factor = splat<V>(static_cast<S>(scale)), shift = splat<V>(-lse);
  if (first)
    for (int64_t i = 0; i < n; i += V::kLanes) store(masses + i, exp(fma(load(scores + i), factor, shift)));
  else
    for (int64_t i = 0; i < n; i += V::kLanes)
      store(masses + i, load(masses + i) + exp(fma(load(scores + i), factor, shift)));
}

// logits = sum over indexer heads, ascending, of weight * relu(score).
template <class S>
void weigh_scores(const S* scores, const S* weights, int64_t heads, int64_t n, S* logits) {
  using V = Vector<S>;
  const V zero = splat<V>(0);
  for (int64_t i = 0; i < n; i += V::kLanes) {
    V total = zero;
    for (int64_t h = 0; h < heads; ++h)
      total = fma(splat<V>(weights[h]), max(zero, load(scores + h * kKeyBlock + i)), total);
    store(logits + i, total);
  }
}

// P of one row, in storage type, and the row's part of dweights.
template <class T>
void signal_row(const Acc<T>* scores, const Acc<T>* gradients, const Acc<T>* weights, int64_t heads, int64_t n, T* signals,
                Acc<T>* dweights) {
  using V = Vector<T>;
  const V zero = splat<V>(0);
  for (int64_t h = 0; h < heads; ++h) {
    const V weight = splat<V>(weights[h]);
    V total = zero;
    const auto step = [&](int64_t i, V score) {
      const V g = load(gradients + i);
      total = fma(g, max(zero, score), total);
      store(signals + h * kKeyBlock + i, where_lt(zero, score, g * weight, zero));
    };
    int64_t i = 0;
    for (; i + V::kLanes <= n; i += V::kLanes) step(i, load(scores + h * kKeyBlock + i));
    if (i < n) GLM5_COUNT_PATH("indexer_kl signal tail");
    if (i < n) step(i, load_n(scores + h * kKeyBlock + i, n - i));  // what lies past the row's keys must not count
    dweights[h] += sum(total);
  }
}

template <class T>
struct Inputs {
  using S = Acc<T>;
  const T *q, *k, *attn_q, *attn_k;
  const S *weights, *lse;
  explicit Inputs(const LightningIndexerKlArgs& a)
      : q(static_cast<const T*>(a.q)),
        k(static_cast<const T*>(a.k)),
        attn_q(static_cast<const T*>(a.attn_q)),
        attn_k(static_cast<const T*>(a.attn_k)),
        weights(static_cast<const S*>(a.weights)),
        lse(static_cast<const S*>(a.attn_lse)) {}
};

// ---- Every key in range ----------------------------------------------------------------------------------------------

// Keys of row t among the block's n keys from `first` on.
GLM5_INLINE int64_t keys_in_block(const LightningIndexerKlArgs& a, int64_t t, int64_t first, int64_t n) {
  return a.ks[t] < a.ke[t] ? larger(0, smaller(n, a.ke[t] - first)) : 0;
}

template <class T>
void dense_masses(const LightningIndexerKlArgs& a, const KlTile& tile, int64_t first, Block<T>& block) {
  const Inputs<T> in(a);
  const int64_t rows = tile.end - tile.begin, stride = a.attn_heads * a.attn_dim;
  for (int64_t h = 0; h < a.attn_heads; ++h) {
    multiply<T>(rows, block.n, a.attn_dim, {in.attn_q + tile.begin * stride + h * a.attn_dim, stride},
                {in.attn_k + first * stride + h * a.attn_dim, 1, stride}, {block.scores, kKeyBlock}, false);
    for (int64_t r = 0; r < rows; ++r)
      add_masses(block.scores + r * kKeyBlock, a.scale, in.lse[(tile.begin + r) * a.attn_heads + h],
                 keys_in_block(a, tile.begin + r, first, block.n), h == 0, block.masses + r * kKeyBlock);
  }
}

// Scores and logits of rows [r, r + count) of the tile.
template <class T>
void dense_logits(const LightningIndexerKlArgs& a, const KlTile& tile, int64_t r, int64_t count, int64_t first,
                  Block<T>& block) {
  const Inputs<T> in(a);
  const int64_t t = tile.begin + r;
  multiply<T>(count * a.heads, block.n, a.dim, {in.q + t * a.heads * a.dim, a.dim}, {in.k + first * a.dim, 1, a.dim},
              {block.scores, kKeyBlock}, false);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = keys_in_block(a, t + i, first, block.n);
    weigh_scores(block.scores + i * a.heads * kKeyBlock, in.weights + (t + i) * a.heads, a.heads, n,
                 block.logits + (r + i) * kKeyBlock);
    pad_row(block.logits + (r + i) * kKeyBlock, block.masses + (r + i) * kKeyBlock, n);
  }
}

template <class T>
void dense_forward(const LightningIndexerKlArgs& a, const KlTile& tile) {
  using S = Acc<T>;
  const int64_t rows = tile.end - tile.begin;
  Block<T> block(a, rows, false);
  RowStats stats[kKlTileRows];
  for (int64_t first = tile.ks; first < tile.ke; first += kKeyBlock) {
    block.n = smaller(kKeyBlock, tile.ke - first);
    GLM5_COUNT_PATH(block.n == kKeyBlock ? "indexer_kl dense block" : "indexer_kl dense tail");
    dense_masses(a, tile, first, block);
    for (int64_t r = 0; r < rows; r += block.chunk) {
      const int64_t count = smaller(block.chunk, rows - r);
      dense_logits(a, tile, r, count, first, block);
      for (int64_t i = r; i < r + count; ++i)
        if (const int64_t n = keys_in_block(a, tile.begin + i, first, block.n))
          add_block(block.logits + i * kKeyBlock, block.masses + i * kKeyBlock, n, stats[i]);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    static_cast<S*>(a.kl)[tile.begin + r] = static_cast<S>(stats[r].kl());
    a.stats[2 * (tile.begin + r)] = stats[r].mass;
    a.stats[2 * (tile.begin + r) + 1] = stats[r].lse();
  }
}

template <class T>
RowGradient<Acc<T>> row_gradient(const LightningIndexerKlArgs& a, int64_t t) {
  const double upstream = static_cast<double>(static_cast<const Acc<T>*>(a.dkl)[t]);
  return RowGradient<Acc<T>>(upstream, a.stats[2 * t + 1], a.stats[2 * t], true);
}

template <class T>
void store_query_gradients(const LightningIndexerKlArgs& a, const KlTile& tile, const Block<T>& block) {
  using V = Vector<T>;
  const int64_t rows = tile.end - tile.begin, size = rows * a.heads * a.dim;
  T* dq = static_cast<T*>(a.dq) + tile.begin * a.heads * a.dim;
  for (int64_t i = 0; i < size; i += V::kLanes) store_n(dq + i, load_n(block.dq + i, size - i), size - i);
  std::memcpy(static_cast<Acc<T>*>(a.dweights) + tile.begin * a.heads, block.dweights, sizeof(Acc<T>) * rows * a.heads);
}

template <class T>
bool all_finite(const T* values, int64_t n) {
  using V = Vector<T>;
  V total = splat<V>(0);
  for (int64_t i = 0; i < n; i += V::kLanes) total = fma(load_n(values + i, n - i), splat<V>(0), total);
  return sum(total) == 0;
}

// dq and dk of the rows [r, r + count) of the tile from their signals. A signal is zero where a row does not see a key,
// and so is the product as long as q and k are finite.
template <class T>
void dense_products(const LightningIndexerKlArgs& a, const KlTile& tile, int64_t r, int64_t count, int64_t first,
                    Block<T>& block, Acc<T>* dk) {
  const Inputs<T> in(a);
  const int64_t line = a.heads * a.dim, t = tile.begin + r;
  const T *q = in.q + t * line, *k = in.k + first * a.dim;
  Acc<T>* dq = block.dq + r * line;
  dk += first * a.dim;
  bool everything_seen = true;
  for (int64_t i = 0; i < count; ++i) everything_seen &= keys_in_block(a, t + i, first, block.n) == block.n;
  if (everything_seen || (all_finite(q, count * line) && all_finite(k, block.n * a.dim))) {
    multiply<T>(count * a.heads, a.dim, block.n, {block.signals, kKeyBlock}, {k, a.dim}, {dq, a.dim}, true);
    multiply<T>(block.n, a.dim, count * a.heads, {block.signals, 1, kKeyBlock}, {q, a.dim}, {dk, a.dim}, true);
    return;
  }
  // The same products, of the same shape along the sum, with zeros for the keys and the queries that are not seen.
  GLM5_COUNT_PATH("indexer_kl dense not finite");
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = keys_in_block(a, t + i, first, block.n);
    std::memcpy(block.keys, k, sizeof(T) * n * a.dim);
    std::memset(block.keys + n * a.dim, 0, sizeof(T) * (block.n - n) * a.dim);
    multiply<T>(a.heads, a.dim, block.n, {block.signals + i * a.heads * kKeyBlock, kKeyBlock}, {block.keys, a.dim},
                {dq + i * line, a.dim}, true);
  }
  for (int64_t begin = 0, end; begin < block.n; begin = end) {  // keys [begin, end), which the same rows see
    end = block.n;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t n = keys_in_block(a, t + i, first, block.n);
      if (n > begin) {
        std::memcpy(block.queries + i * line, q + i * line, sizeof(T) * line);
        end = smaller(end, n);
      } else {
        std::memset(block.queries + i * line, 0, sizeof(T) * line);
      }
    }
    multiply<T>(end - begin, a.dim, count * a.heads, {block.signals + begin, 1, kKeyBlock}, {block.queries, a.dim},
                {dk + begin * a.dim, a.dim}, true);
  }
}

template <class T>
void dense_backward(const LightningIndexerKlArgs& a, const KlTile& tile, Acc<T>* dk) {
  using S = Acc<T>;
  using V = Vector<T>;
  const Inputs<T> in(a);
  const int64_t rows = tile.end - tile.begin;
  Block<T> block(a, rows, true);
  std::memset(block.dq, 0, sizeof(S) * rows * a.heads * (a.dim + 1));
  for (int64_t first = tile.ks; first < tile.ke; first += kKeyBlock) {
    block.n = smaller(kKeyBlock, tile.ke - first);
    GLM5_COUNT_PATH(block.n == kKeyBlock ? "indexer_kl dense block" : "indexer_kl dense tail");
    dense_masses(a, tile, first, block);
    for (int64_t r = 0; r < rows; r += block.chunk) {
      const int64_t count = smaller(block.chunk, rows - r);
      dense_logits(a, tile, r, count, first, block);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t t = tile.begin + r + i, n = keys_in_block(a, t, first, block.n);
        const RowGradient<S> gradient = row_gradient<T>(a, t);
        S* out = block.gradients + i * kKeyBlock;
        for (int64_t j = 0; j < n; j += V::kLanes)
          store(out + j,
                gradient(load(block.logits + (r + i) * kKeyBlock + j), load(block.masses + (r + i) * kKeyBlock + j)));
        T* signals = block.signals + i * a.heads * kKeyBlock;
        for (int64_t h = 0; h < a.heads; ++h)
          for (int64_t j = (n + V::kLanes - 1) / V::kLanes * V::kLanes; j < block.n; ++j) signals[h * kKeyBlock + j] = T{};
        signal_row<T>(block.scores + i * a.heads * kKeyBlock, out, in.weights + t * a.heads, a.heads, n, signals,
                      block.dweights + (r + i) * a.heads);
      }
      dense_products(a, tile, r, count, first, block, dk);
    }
  }
  store_query_gradients(a, tile, block);
}

// ---- Selected keys ----------------------------------------------------------------------------------------------------

template <class T>
void gather(const T* rows, int64_t dim, const int32_t* indices, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) std::memcpy(out + i * dim, rows + indices[i] * dim, sizeof(T) * dim);
}

GLM5_INLINE int64_t count_selected(const int32_t* indices, int64_t topk) {
  int64_t n = 0;
  while (n < topk && indices[n] >= 0) ++n;
  return n;
}

// Scores and logits of query t for the block's gathered keys; logits and masses are padded.
template <class T>
void selected_logits(const LightningIndexerKlArgs& a, int64_t t, Block<T>& block) {
  const Inputs<T> in(a);
  multiply<T>(a.heads, block.n, a.dim, {in.q + t * a.heads * a.dim, a.dim}, {block.keys, 1, a.dim},
              {block.scores, kKeyBlock}, false);
  weigh_scores(block.scores, in.weights + t * a.heads, a.heads, block.n, block.logits);
  pad_row(block.logits, block.masses, block.n);
}

template <class T>
void selected_forward(const LightningIndexerKlArgs& a, int64_t t) {
  using S = Acc<T>;
  const Inputs<T> in(a);
  Block<T> block(a, 1, false);
  const int32_t* indices = a.indices + t * a.topk;
  const int64_t selected = count_selected(indices, a.topk);
  S* mass = static_cast<S*>(a.mass) + t * a.topk;
  if (a.topk > 0) std::memset(mass, 0, sizeof(S) * a.topk);
  RowStats stats;
  for (int64_t begin = 0; begin < selected; begin += kKeyBlock) {
    block.n = smaller(kKeyBlock, selected - begin);
    GLM5_COUNT_PATH(block.n == kKeyBlock ? "indexer_kl selected block" : "indexer_kl selected tail");
    gather(in.k, a.dim, indices + begin, block.n, block.keys);
    gather(in.attn_k, a.attn_dim, indices + begin, block.n, block.attn_keys);
    multiply<T>(a.attn_heads, block.n, a.attn_dim, {in.attn_q + t * a.attn_heads * a.attn_dim, a.attn_dim},
                {block.attn_keys, 1, a.attn_dim}, {block.scores, kKeyBlock}, false);
    for (int64_t h = 0; h < a.attn_heads; ++h)
      add_masses(block.scores + h * kKeyBlock, a.scale, in.lse[t * a.attn_heads + h], block.n, h == 0, block.masses);
    std::memcpy(mass + begin, block.masses, sizeof(S) * block.n);
    selected_logits(a, t, block);
    add_block(block.logits, block.masses, block.n, stats);
  }
  static_cast<S*>(a.kl)[t] = static_cast<S>(stats.kl());
  a.stats[2 * t] = stats.mass;
  a.stats[2 * t + 1] = stats.lse();
}

template <class T>
void selected_backward(const LightningIndexerKlArgs& a, int64_t t, Acc<T>* dk) {
  using S = Acc<T>;
  using V = Vector<T>;
  const Inputs<T> in(a);
  Block<T> block(a, 1, true);
  std::memset(block.dq, 0, sizeof(S) * a.heads * (a.dim + 1));
  const int32_t* indices = a.indices + t * a.topk;
  const int64_t selected = count_selected(indices, a.topk);
  const RowGradient<S> gradient = row_gradient<T>(a, t);
  for (int64_t begin = 0; begin < selected; begin += kKeyBlock) {
    block.n = smaller(kKeyBlock, selected - begin);
    GLM5_COUNT_PATH(block.n == kKeyBlock ? "indexer_kl selected block" : "indexer_kl selected tail");
    gather(in.k, a.dim, indices + begin, block.n, block.keys);
    std::memcpy(block.masses, static_cast<const S*>(a.mass) + t * a.topk + begin, sizeof(S) * block.n);
    selected_logits(a, t, block);
    for (int64_t j = 0; j < block.n; j += V::kLanes)
      store(block.gradients + j, gradient(load(block.logits + j), load(block.masses + j)));
    signal_row<T>(block.scores, block.gradients, in.weights + t * a.heads, a.heads, block.n, block.signals, block.dweights);
    multiply<T>(a.heads, a.dim, block.n, {block.signals, kKeyBlock}, {block.keys, a.dim}, {block.dq, a.dim}, true);
    multiply<T>(block.n, a.dim, a.heads, {block.signals, 1, kKeyBlock}, {in.q + t * a.heads * a.dim, a.dim},
                {block.dkeys, a.dim}, false);
    for (int64_t i = 0; i < block.n; ++i) {
      S* out = dk + indices[begin + i] * a.dim;
      for (int64_t d = 0; d < a.dim; d += V::kLanes) {
        const int64_t left = a.dim - d;
        store_n(out + d, load_n(out + d, left) + load_n(block.dkeys + i * a.dim + d, left), left);
      }
    }
  }
  store_query_gradients(a, KlTile{t, t + 1, 0, 0}, block);
}

// ---- Tasks --------------------------------------------------------------------------------------------------------------

template <class T>
void forward(const LightningIndexerKlArgs& a) {
  parallel_tasks(a.num_tiles, [&](int64_t task) {
    const KlTile& tile = a.tiles[a.order[task]];
    if (!a.indices) return dense_forward<T>(a, tile);
    for (int64_t t = tile.begin; t < tile.end; ++t) selected_forward<T>(a, t);
  });
}

template <class T>
void backward(const LightningIndexerKlArgs& a) {
  using S = Acc<T>;
  const int64_t size = a.num_keys * a.dim;
  S* parts = static_cast<S*>(a.dk_parts);
  parallel_tasks(a.num_parts, [&](int64_t part) {
    S* dk = parts + part * size;
    if (size > 0) std::memset(dk, 0, sizeof(S) * size);
    for (int64_t i = part; i < a.num_tiles; i += a.num_parts) {
      const KlTile& tile = a.tiles[i];
      if (!a.indices) dense_backward<T>(a, tile, dk);
      else
        for (int64_t t = tile.begin; t < tile.end; ++t) selected_backward<T>(a, t, dk);
    }
  });
  constexpr int64_t kPiece = 1 << 14;
  parallel_tasks((size + kPiece - 1) / kPiece, [&](int64_t task) {
    add_parts(parts, a.num_parts, size, task * kPiece, smaller(size, (task + 1) * kPiece), static_cast<T*>(a.dk));
  });
}

}  // namespace

void lightning_indexer_kl_forward(const LightningIndexerKlArgs& args) {
  if (args.dtype == 0) forward<bf16>(args);
  else if (args.dtype == 1) forward<float>(args);
#if GLM5_ISA_LEVEL == 0
  else forward<double>(args);
#endif
}

void lightning_indexer_kl_backward(const LightningIndexerKlArgs& args) {
  if (args.dtype == 0) backward<bf16>(args);
  else if (args.dtype == 1) backward<float>(args);
#if GLM5_ISA_LEVEL == 0
  else backward<double>(args);
#endif
}

}  // namespace glm5::cpu::GLM5_ISA
