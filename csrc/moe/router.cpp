// The sigmoid router on the CPU. Scores are computed in float64 with plain IEEE operations and no fma, so that the choice
// is the same on every instruction set and, but for exact ties that float64 itself does not see, that of the reference.
#include "common/parallel.h"
#include "common/simd.h"
#include "moe/moe.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int64_t kTokenBlock = 16;

// As many doubles as a register of this set holds, in the compiler's own vector type: the same expressions, so the same bits,
// on every set.
constexpr int kDoubles = GLM5_ISA_LEVEL == 2 ? 8 : GLM5_ISA_LEVEL == 1 ? 4 : 2;
typedef double Doubles __attribute__((vector_size(8 * kDoubles)));
typedef uint64_t Bits __attribute__((vector_size(8 * kDoubles)));

// 1 / (1 + e^-x), within 2 ulp.
GLM5_INLINE Doubles sigmoid(Doubles x) {
  const Doubles limit = Doubles{} + 700;
  Doubles y = x > limit ? limit : x;  // NaN stays
  y = y < -limit ? limit : -y;
  const double magic = 6755399441055744.0;  // 1.5 * 2^52: the sum's low mantissa bits are the rounded integer
  const Doubles shifted = y * 1.4426950408889634 + magic;
  const Doubles n = shifted - magic;
  const Doubles r = (y - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  Doubles p = r * (1.0 / 6227020800) + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  Bits bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 1023) << 52;
  Doubles power;
  std::memcpy(&power, &bits, sizeof(bits));
  return 1 / (1 + p * power);
}

GLM5_INLINE double sigmoid(double x) { return sigmoid(Doubles{} + x)[0]; }

// scores[e] = sigmoid(logits[e]); scores may be written up to the next whole vector.
template <class S>
void sigmoids(const S* logits, int64_t n, double* scores) {
  typedef S Given __attribute__((vector_size(sizeof(S) * kDoubles)));
  for (int64_t e = 0; e < n; e += kDoubles) {
    Given x{};
    if (n - e >= kDoubles) std::memcpy(&x, logits + e, sizeof(x));
    else std::memcpy(&x, logits + e, sizeof(S) * static_cast<size_t>(n - e));
    const Doubles y = sigmoid(__builtin_convertvector(x, Doubles));
    std::memcpy(scores + e, &y, sizeof(y));
  }
}

// The `k` largest of the keys for which allowed(i), ties to the lower i, NaN and -inf never; returns how many there are.
// Keeps a sorted list; a candidate is compared with its last entry only. Leaves indices in ids, largest key first.
template <class Allowed>
GLM5_INLINE int64_t largest(const double* keys, int64_t n, int64_t k, const Allowed& allowed, double* best, int32_t* ids) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double key = keys[i];
    if (!(key > -__builtin_inf()) || !allowed(i)) continue;
    int64_t at = count;
    if (count == k) {
      if (!(key > best[k - 1])) continue;
      at = k - 1;
    } else {
      ++count;
    }
    for (; at > 0 && key > best[at - 1]; --at) {
      best[at] = best[at - 1];
      ids[at] = ids[at - 1];
    }
    best[at] = key;
    ids[at] = static_cast<int32_t>(i);
  }
  return count;
}

void sort_ascending(int32_t* ids, int64_t n) {
  for (int64_t i = 1; i < n; ++i) {
    const int32_t id = ids[i];
    int64_t at = i;
    for (; at > 0 && ids[at - 1] > id; --at) ids[at] = ids[at - 1];
    ids[at] = id;
  }
}

struct Scratch {
  double *scores, *keys, *group_scores, *best;
  int32_t* group_ids;
  uint8_t* group_kept;
};

int64_t choose(const MoeRouterArgs& a, const Scratch& s, int32_t* ids) {
  if (a.groups == 1) return largest(s.keys, a.experts, a.topk, [](int64_t) { return true; }, s.best, ids);
  const int64_t size = a.experts / a.groups;
  for (int64_t g = 0; g < a.groups; ++g) {  // a group's score is the sum of its two best keys
    double first = -__builtin_inf(), second = -__builtin_inf();
    for (int64_t e = g * size; e < (g + 1) * size; ++e) {
      if (s.keys[e] > first) {
        second = first;
        first = s.keys[e];
      } else if (s.keys[e] > second) {
        second = s.keys[e];
      }
    }
    s.group_scores[g] = size == 1 ? first : first + second;
    s.group_kept[g] = 0;
  }
  const int64_t kept = largest(s.group_scores, a.groups, a.topk_groups, [](int64_t) { return true; }, s.best, s.group_ids);
  for (int64_t i = 0; i < kept; ++i) s.group_kept[s.group_ids[i]] = 1;
  return largest(s.keys, a.experts, a.topk, [&](int64_t e) { return s.group_kept[e / size] != 0; }, s.best, ids);
}

template <class S>
void forward(const MoeRouterArgs& a) {
  const S* bias = static_cast<const S*>(a.bias);
  parallel_tasks((a.tokens + kTokenBlock - 1) / kTokenBlock, [&](int64_t task) {
    const int64_t best_size = a.topk > a.topk_groups ? a.topk : a.topk_groups;
    Scratch s;
    s.scores = static_cast<double*>(
        thread_scratch(0, (2 * a.experts + kDoubles + a.groups + best_size) * sizeof(double) + a.groups * 5 + 64));
    s.keys = s.scores + a.experts + kDoubles;
    s.group_scores = s.keys + a.experts;
    s.best = s.group_scores + a.groups;
    s.group_ids = reinterpret_cast<int32_t*>(s.best + best_size);
    s.group_kept = reinterpret_cast<uint8_t*>(s.group_ids + a.groups);
    const int64_t end = (task + 1) * kTokenBlock < a.tokens ? (task + 1) * kTokenBlock : a.tokens;
    for (int64_t t = task * kTokenBlock; t < end; ++t) {
      const S* logits = static_cast<const S*>(a.logits) + t * a.experts;
      S* weights = static_cast<S*>(a.weights) + t * a.topk;
      int32_t* ids = a.ids + t * a.topk;
      double* scores = s.scores;
      double* keys = s.keys;
      sigmoids(logits, a.experts, scores);
      for (int64_t e = 0; e < a.experts; ++e) keys[e] = scores[e] + static_cast<double>(bias[e]);
      if (a.replay) {
        for (int64_t j = 0; j < a.topk; ++j) ids[j] = a.replay[t * a.topk + j];
      } else {
        const int64_t chosen = choose(a, s, ids);
        sort_ascending(ids, chosen);
        for (int64_t j = chosen; j < a.topk; ++j) ids[j] = -1;
      }
      double total = 0;
      for (int64_t j = 0; j < a.topk; ++j) total += ids[j] < 0 ? 0 : scores[ids[j]];
      const double factor = a.renormalize ? a.scaling / (total + 1e-20) : a.scaling;
      for (int64_t j = 0; j < a.topk; ++j) weights[j] = static_cast<S>(ids[j] < 0 ? 0 : scores[ids[j]] * factor);
    }
  });
}

// w_i = c s_i / (sum + 1e-20):  ds_i = c (dw_i - sum_j dw_j s_j / (sum + 1e-20)) / (sum + 1e-20);  dlogit = ds s (1 - s).
template <class S>
void backward(const MoeRouterArgs& a) {
  parallel_tasks((a.tokens + kTokenBlock - 1) / kTokenBlock, [&](int64_t task) {
    const int64_t end = (task + 1) * kTokenBlock < a.tokens ? (task + 1) * kTokenBlock : a.tokens;
    double* scores = static_cast<double*>(thread_scratch(0, (a.topk + 1) * sizeof(double)));
    for (int64_t t = task * kTokenBlock; t < end; ++t) {
      const S* logits = static_cast<const S*>(a.logits) + t * a.experts;
      const S* dweights = static_cast<const S*>(a.dweights) + t * a.topk;
      const int32_t* ids = a.ids + t * a.topk;
      S* dlogits = static_cast<S*>(a.dlogits) + t * a.experts;
      std::memset(dlogits, 0, sizeof(S) * a.experts);
      double total = 0, dot = 0;
      for (int64_t j = 0; j < a.topk; ++j) {
        scores[j] = ids[j] < 0 ? 0 : sigmoid(static_cast<double>(logits[ids[j]]));
        total += scores[j];
        dot += scores[j] * static_cast<double>(dweights[j]);
      }
      total += 1e-20;
      for (int64_t j = 0; j < a.topk; ++j) {
        if (ids[j] < 0) continue;
        const double dw = static_cast<double>(dweights[j]);
        const double ds = a.renormalize ? a.scaling * (dw - dot / total) / total : a.scaling * dw;
        dlogits[ids[j]] = static_cast<S>(ds * scores[j] * sigmoid(-static_cast<double>(logits[ids[j]])));
      }
    }
  });
}

}  // namespace

void moe_router_forward(const MoeRouterArgs& args) {
  if (!args.is_float64) forward<float>(args);
#if GLM5_ISA_LEVEL == 0
  else forward<double>(args);
#endif
}

void moe_router_backward(const MoeRouterArgs& args) {
  if (!args.is_float64) backward<float>(args);
#if GLM5_ISA_LEVEL == 0
  else backward<double>(args);
#endif
}

}  // namespace glm5::cpu::GLM5_ISA
