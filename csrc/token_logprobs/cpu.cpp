// token_logprobs on the CPU (definition and order of summation: token_logprobs.h). Logits live in tiles of
// kTokenBlock x kVocabBlock in the scratch memory of one thread; backward computes them again.
#include "token_logprobs/token_logprobs.h"

#include <math.h>

#include "common/gemm/gemm.h"
#include "common/parallel.h"
#include "common/simd.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int kScratchLogits = 0;
template <class S>
constexpr S kLowest = static_cast<S>(-__builtin_inf());

int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }
int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// Logits of tokens [t0, t0 + rows) and columns [v0, v0 + cols), divided by the temperature: [rows, kVocabBlock].
template <class T>
Acc<T>* scaled_logits(const TokenLogprobsArgs& a, int64_t t0, int64_t rows, int64_t v0, int64_t cols) {
  using V = Vector<T>;
  using S = Acc<T>;
  S* z = static_cast<S*>(thread_scratch(kScratchLogits, kTokenBlock * kVocabBlock * sizeof(S)));
  GemmArgs g{};
  g.dtype = a.dtype;
  g.out_dtype = sizeof(S) == 8 ? 2 : 1;
  g.m = rows, g.n = cols, g.k = a.dim;
  g.a = static_cast<const T*>(a.hidden) + t0 * a.dim, g.a_row = a.dim, g.a_col = 1;
  g.b = static_cast<const T*>(a.lm_head) + v0 * a.dim, g.b_row = 1, g.b_col = a.dim;
  g.c = z, g.c_row = kVocabBlock;
  gemm_serial(g);
  for (int64_t r = 0; r < rows; ++r) {
    const V temperature = splat<V>(a.temperature[t0 + r]);
    S* row = z + r * kVocabBlock;
    for (int64_t v = 0; v < cols; v += V::kLanes) store_n(row + v, load_n(row + v, cols - v) / temperature, cols - v);
  }
  return z;
}

// max, sum of e^(z-max), sum of (z-max) e^(z-max) of one block.
template <class V, class S>
void reduce_block(const S* z, int64_t cols, S* out) {
  constexpr int L = V::kLanes;
  const V lowest = splat<V>(kLowest<S>);
  V top = lowest;
  int64_t v = 0;
  for (; v + L <= cols; v += L) top = max(top, load(z + v));
  S highest = max_lane(top);
  for (; v < cols; ++v) highest = highest > z[v] ? highest : z[v];
  out[0] = highest, out[1] = 0, out[2] = 0;
  if (highest == kLowest<S>) return;

  const V zero = splat<V>(0), shift = splat<V>(highest);
  V total = zero, moment = zero;
  S tail[L];
  for (v = 0; v < cols; v += L) {
    V x;
    if (v + L <= cols) {
      x = load(z + v);
    } else {
      for (int i = 0; i < L; ++i) tail[i] = v + i < cols ? z[v + i] : kLowest<S>;
      x = load(tail);
    }
    const V d = x - shift, e = exp(d);
    total = total + e;
    moment = moment + where_lt(zero, e, d * e, zero);
  }
  out[1] = sum(total);
  out[2] = sum(moment);
}

// Tokens [first, first + tokens), at most kForwardChunk.
template <class T>
void forward_chunk(const TokenLogprobsArgs& a, int64_t first, int64_t tokens) {
  using V = Vector<T>;
  using S = Acc<T>;
  const int64_t token_blocks = blocks_of(tokens, kTokenBlock), vocab_blocks = blocks_of(a.vocab, kVocabBlock);
  S* partial = static_cast<S*>(a.partial);
  S* logp = static_cast<S*>(a.logp) + first;
  // Token blocks run fastest, so that a block of lm_head is read from memory once.
  parallel_tasks(token_blocks * vocab_blocks, [&](int64_t task) {
    const int64_t vocab_block = task / token_blocks, t0 = task % token_blocks * kTokenBlock;
    const int64_t v0 = vocab_block * kVocabBlock;
    const int64_t rows = at_most(kTokenBlock, tokens - t0), cols = at_most(kVocabBlock, a.vocab - v0);
    const S* z = scaled_logits<T>(a, first + t0, rows, v0, cols);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t t = t0 + r, target = a.targets[first + t];
      reduce_block<V>(z + r * kVocabBlock, cols, partial + (t * vocab_blocks + vocab_block) * 3);
      if (target >= v0 && target < v0 + cols) logp[t] = z[r * kVocabBlock + target - v0];  // less lse, below
    }
  });

  parallel_tasks(token_blocks, [&](int64_t task) {
    for (int64_t t = task * kTokenBlock; t < at_most(tokens, (task + 1) * kTokenBlock); ++t) {
      const S* blocks = partial + t * vocab_blocks * 3;
      double top = kLowest<double>, total = 0, moment = 0;
      for (int64_t b = 0; b < vocab_blocks; ++b) top = top > blocks[3 * b] ? top : blocks[3 * b];
      for (int64_t b = 0; b < vocab_blocks; ++b) {
        const S* block = blocks + 3 * b;
        if (block[0] == kLowest<S>) continue;
        const double shift = block[0] - top, scale = ::exp(shift);
        total += scale * block[1];
        if (scale > 0) moment += scale * (block[2] + shift * block[1]);
      }
      const double log_total = ::log(total);
      static_cast<S*>(a.lse)[first + t] = static_cast<S>(top + log_total);
      logp[t] = static_cast<S>(logp[t] - top - log_total);
      static_cast<S*>(a.entropy)[first + t] = static_cast<S>(log_total - moment / total);
    }
  });
}

template <class T>
void forward(const TokenLogprobsArgs& a) {
  for (int64_t t = 0; t < a.tokens; t += kForwardChunk) forward_chunk<T>(a, t, at_most(kForwardChunk, a.tokens - t));
}

// dz = dlogp (1[target] - p) - dentropy p (log p + entropy), and dlogits = dz / temperature.
template <class V, class T, class S>
void logit_gradient(const S* z, int64_t cols, int64_t target, S dlogp, S dentropy, S lse, S entropy, S temperature, T* out) {
  constexpr int L = V::kLanes;
  const V zero = splat<V>(0), shift = splat<V>(lse), h = splat<V>(entropy), t = splat<V>(temperature);
  const V gp = splat<V>(dlogp), gh = splat<V>(dentropy);
  for (int64_t v = 0; v < cols; v += L) {
    const V log_p = load_n(z + v, cols - v) - shift, p = exp(log_p);
    V d = zero - p * (gp + gh * where_lt(zero, p, log_p + h, zero));
    if (target >= v && target < v + L) {
      S lanes[L];
      store(lanes, d);
      lanes[target - v] += dlogp;
      d = load(lanes);
    }
    store_n(out + v, d / t, cols - v);
  }
}

template <class T>
void narrow_rows(const void* from, T* to, int64_t count) {
  constexpr int64_t kPiece = 1 << 16;
  const float* source = static_cast<const float*>(from);
  parallel_tasks(blocks_of(count, kPiece), [&](int64_t task) {
    for (int64_t i = task * kPiece; i < at_most(count, (task + 1) * kPiece); i += F::kLanes)
      store_n(to + i, load_n(source + i, count - i), count - i);
  });
}

template <class T>
void backward(const TokenLogprobsArgs& a) {
  using V = Vector<T>;
  using S = Acc<T>;
  constexpr bool kNarrow = sizeof(T) < sizeof(S);
  const int accumulator = sizeof(S) == 8 ? 2 : 1;
  T* dlogits = static_cast<T*>(a.dlogits);
  for (int64_t vc = 0; vc < a.vocab; vc += kVocabChunk) {
    const int64_t vocab = at_most(kVocabChunk, a.vocab - vc);
    S* dlm_head_sum = kNarrow      ? static_cast<S*>(a.dlm_head_sum)
                      : a.dlm_head ? static_cast<S*>(a.dlm_head) + vc * a.dim
                                   : nullptr;
    for (int64_t tc = 0; tc < a.tokens; tc += kTokenChunk) {
      const int64_t tokens = at_most(kTokenChunk, a.tokens - tc);
      const int64_t token_blocks = blocks_of(tokens, kTokenBlock);
      parallel_tasks(token_blocks * blocks_of(vocab, kVocabBlock), [&](int64_t task) {
        const int64_t t0 = tc + task % token_blocks * kTokenBlock, v0 = vc + task / token_blocks * kVocabBlock;
        const int64_t rows = at_most(kTokenBlock, tc + tokens - t0), cols = at_most(kVocabBlock, vc + vocab - v0);
        const S* z = scaled_logits<T>(a, t0, rows, v0, cols);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t t = t0 + r;
          logit_gradient<V, T, S>(z + r * kVocabBlock, cols, a.targets[t] - v0, static_cast<const S*>(a.dlogp)[t],
                                  static_cast<const S*>(a.dentropy)[t], static_cast<const S*>(a.lse)[t],
                                  static_cast<const S*>(a.entropy)[t], a.temperature[t],
                                  dlogits + (t - tc) * vocab + (v0 - vc));
        }
      });
      GemmArgs g{};
      g.dtype = a.dtype;
      g.out_dtype = accumulator;
      g.a = dlogits;
      g.n = a.dim;
      g.b_row = a.dim, g.b_col = 1;
      g.c_row = a.dim;
      if (a.dhidden) {
        g.m = tokens, g.k = vocab;
        g.a_row = vocab, g.a_col = 1;
        g.b = static_cast<const T*>(a.lm_head) + vc * a.dim;
        g.c = static_cast<S*>(a.dhidden_sum) + tc * a.dim;
        g.accumulate = vc > 0;
        gemm(&g, 1);
      }
      if (a.dlm_head) {
        g.m = vocab, g.k = tokens;
        g.a_row = 1, g.a_col = vocab;
        g.b = static_cast<const T*>(a.hidden) + tc * a.dim;
        g.c = dlm_head_sum;
        g.accumulate = tc > 0;
        gemm(&g, 1);
      }
    }
    if constexpr (kNarrow)
      if (a.dlm_head) narrow_rows(dlm_head_sum, static_cast<T*>(a.dlm_head) + vc * a.dim, vocab * a.dim);
  }
  if constexpr (kNarrow)
    if (a.dhidden) narrow_rows(a.dhidden_sum, static_cast<T*>(a.dhidden), a.tokens * a.dim);
}

}  // namespace

void token_logprobs_forward(const TokenLogprobsArgs& args) {
  if (args.dtype == 0) forward<bf16>(args);
  else if (args.dtype == 1) forward<float>(args);
#if GLM5_ISA_LEVEL == 0
  else forward<double>(args);
#endif
}

void token_logprobs_backward(const TokenLogprobsArgs& args) {
  if (args.dtype == 0) backward<bf16>(args);
  else if (args.dtype == 1) backward<float>(args);
#if GLM5_ISA_LEVEL == 0
  else backward<double>(args);
#endif
}

}  // namespace glm5::cpu::GLM5_ISA
