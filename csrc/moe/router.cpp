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
typedef int64_t Integers __attribute__((vector_size(8 * kDoubles)));

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

constexpr double kNever = -__builtin_inf();  // the key of what cannot be chosen

// Places are doubles too: every set compares those.
GLM5_INLINE Doubles lanes_from(int64_t first) {
  Doubles x;
#pragma GCC unroll 8
  for (int l = 0; l < kDoubles; ++l) x[l] = l;
  return x + static_cast<double>(first);
}
GLM5_INLINE Doubles load_doubles(const double* p) {
  Doubles x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

// scores[i] = sigmoid(logits[i]); scores may be written up to the next whole vector.
template <class S>
void sigmoids(const S* logits, int64_t n, double* scores) {
  typedef S Given __attribute__((vector_size(sizeof(S) * kDoubles)));
  for (int64_t i = 0; i < n; i += kDoubles) {
    Given x{};
    if (n - i >= kDoubles) std::memcpy(&x, logits + i, sizeof(x));
    else std::memcpy(&x, logits + i, sizeof(S) * static_cast<size_t>(n - i));
    const Doubles y = sigmoid(__builtin_convertvector(x, Doubles));
    std::memcpy(scores + i, &y, sizeof(y));
  }
}

// keys[e] = scores[e] + bias[e], kNever for NaN, and up to the next whole vector.
template <class S>
void bias_keys(const double* scores, const S* bias, int64_t n, double* keys) {
  typedef S Given __attribute__((vector_size(sizeof(S) * kDoubles)));
  for (int64_t e = 0; e < n; e += kDoubles) {
    Given shift = Given{} + static_cast<S>(kNever);
    if (n - e >= kDoubles) std::memcpy(&shift, bias + e, sizeof(shift));
    else std::memcpy(&shift, bias + e, sizeof(S) * static_cast<size_t>(n - e));
    const Doubles key = load_doubles(scores + e) + __builtin_convertvector(shift, Doubles);
    const Doubles kept = key > kNever ? key : Doubles{} + kNever;
    std::memcpy(keys + e, &kept, sizeof(kept));
  }
}

// The `k` largest of the keys, ties to the lower index, NaN and -inf never; returns how many there are. Keeps a sorted
// list; a candidate is compared with its last entry only. Leaves indices in ids, largest key first.
int64_t largest(const double* keys, int64_t n, int64_t k, double* best, int32_t* ids) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double key = keys[i];
    if (!(key > kNever)) continue;
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

// The same for keys that bias_keys() wrote, indices ascending. A random key makes a branch on it a guess, so there are none.
// Of few keys each one's rank is counted; of many, the largest is found and struck out k times.
constexpr int64_t kFew = 16;
int64_t largest_of_few(const double* keys, int64_t n, int64_t k, int32_t* ids) {
  int32_t chosen[kFew + kDoubles];
  int64_t count = 0;
  for (int64_t e = 0; e < n; e += kDoubles) {
    const Doubles place = lanes_from(e);
    const Doubles mine = load_doubles(keys + e);
    Integers ahead{};
    for (int64_t i = 0; i < n; ++i) {
      const Doubles other = Doubles{} + keys[i];
      ahead -= (other > mine) | ((other == mine) & (place > static_cast<double>(i)));
    }
    ahead = mine > kNever ? ahead : Integers{} + kFew;
    for (int l = 0; l < kDoubles; ++l) {
      chosen[count] = static_cast<int32_t>(e + l);
      count += ahead[l] < k;
    }
  }
  for (int64_t j = 0; j < count; ++j) ids[j] = chosen[j];
  return count;
}

// The larger in each lane, and its place; the lower place of equals.
GLM5_INLINE void merge(Doubles& best, Doubles& place, Doubles other, Doubles other_place) {
  const Integers wins = (other > best) | ((other == best) & (other_place < place));
  best = wins ? other : best;
  place = wins ? other_place : place;
}

int64_t largest_of_many(double* keys, int64_t n, int64_t k, uint64_t* words, int32_t* ids) {
  constexpr int kChains = 4;
  std::memset(words, 0, sizeof(uint64_t) * static_cast<size_t>((n + 63) / 64));
  for (int64_t round = 0; round < k; ++round) {
    Doubles best[kChains];
    Doubles place[kChains];
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) best[c] = Doubles{} + kNever, place[c] = Doubles{};
    int64_t e = 0;
    for (; e + kChains * kDoubles <= n; e += kChains * kDoubles) {
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        const Doubles key = load_doubles(keys + e + c * kDoubles);
        const Integers wins = key > best[c];
        best[c] = wins ? key : best[c];
        place[c] = wins ? lanes_from(e + c * kDoubles) : place[c];
      }
    }
    for (; e < n; e += kDoubles) {
      const Doubles key = load_doubles(keys + e);
      const Integers wins = key > best[0];
      best[0] = wins ? key : best[0];
      place[0] = wins ? lanes_from(e) : place[0];
    }
    merge(best[0], place[0], best[1], place[1]);
    merge(best[2], place[2], best[3], place[3]);
    merge(best[0], place[0], best[2], place[2]);
#pragma GCC unroll 4
    for (int step = kDoubles / 2; step > 0; step /= 2) {
      Integers partner;
#pragma GCC unroll 8
      for (int l = 0; l < kDoubles; ++l) partner[l] = l ^ step;
      merge(best[0], place[0], __builtin_shuffle(best[0], partner), __builtin_shuffle(place[0], partner));
    }
    if (!(best[0][0] > kNever)) break;
    const int64_t found = static_cast<int64_t>(place[0][0]);
    keys[found] = kNever;
    words[found / 64] |= uint64_t{1} << found % 64;
  }
  int64_t count = 0;
  for (int64_t w = 0; w < (n + 63) / 64; ++w)
    for (uint64_t rest = words[w]; rest; rest &= rest - 1)
      ids[count++] = static_cast<int32_t>(64 * w + __builtin_ctzll(rest));
  return count;
}

struct Scratch {
  double *scores, *keys, *group_scores, *best;
  uint64_t* words;
  int32_t* group_ids;
  uint8_t* group_kept;
};

// Strikes out the keys of groups that do not compete.
void keep_groups(const MoeRouterArgs& a, const Scratch& s) {
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
  const int64_t kept = largest(s.group_scores, a.groups, a.topk_groups, s.best, s.group_ids);
  for (int64_t i = 0; i < kept; ++i) s.group_kept[s.group_ids[i]] = 1;
  for (int64_t g = 0; g < a.groups; ++g)
    if (!s.group_kept[g])
      for (int64_t e = g * size; e < (g + 1) * size; ++e) s.keys[e] = kNever;
}

int64_t choose(const MoeRouterArgs& a, const Scratch& s, int32_t* ids) {
  if (a.groups > 1) keep_groups(a, s);
  if (a.experts <= kFew) return largest_of_few(s.keys, a.experts, a.topk, ids);
  return largest_of_many(s.keys, a.experts, a.topk, s.words, ids);
}

template <class S>
void forward(const MoeRouterArgs& a) {
  const S* bias = static_cast<const S*>(a.bias);
  // Tokens whose sigmoids are computed together: one token's few would wait for each other's long chains.
  const int64_t together = a.experts >= 128 ? 1 : 128 / a.experts < kTokenBlock ? 128 / a.experts : kTokenBlock;
  parallel_tasks((a.tokens + kTokenBlock - 1) / kTokenBlock, [&](int64_t task) {
    Scratch s;
    s.scores = static_cast<double*>(thread_scratch(
        0, ((together + 2) * a.experts + 3 * kDoubles + a.groups + a.topk_groups) * sizeof(double) + a.groups * 5 + 64));
    s.keys = s.scores + together * a.experts + kDoubles;
    s.group_scores = s.keys + a.experts + kDoubles;
    s.best = s.group_scores + a.groups;
    s.words = reinterpret_cast<uint64_t*>(s.best + a.topk_groups);
    s.group_ids = reinterpret_cast<int32_t*>(s.words + a.experts / 64 + 1);
    s.group_kept = reinterpret_cast<uint8_t*>(s.group_ids + a.groups);
    const int64_t first = task * kTokenBlock, end = first + kTokenBlock < a.tokens ? first + kTokenBlock : a.tokens;
    for (int64_t t = first; t < end; ++t) {
      const int64_t within = (t - first) % together;
      if (within == 0)
        sigmoids(static_cast<const S*>(a.logits) + t * a.experts, (end - t < together ? end - t : together) * a.experts,
                 s.scores);
      const double* scores = s.scores + within * a.experts;
      S* weights = static_cast<S*>(a.weights) + t * a.topk;
      int32_t* ids = a.ids + t * a.topk;
      if (a.replay) {
        for (int64_t j = 0; j < a.topk; ++j) ids[j] = a.replay[t * a.topk + j];
      } else {
        bias_keys(scores, bias, a.experts, s.keys);
        const int64_t chosen = choose(a, s, ids);
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
