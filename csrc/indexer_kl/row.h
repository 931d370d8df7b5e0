// One row of the loss. With attention masses m_s >= 0 of sum Z and indexer logits I_s of log-sum-exp lse,
//   KL(m / Z || softmax(I)) = sum_s m_s (log m_s - I_s) / Z - log Z + lse
// and its gradient in I_s is exp(I_s - lse) - m_s / Z. Keys come in blocks of kKeyBlock counted from the row's first key;
// inside a block sums run in vector lanes, blocks join in float64.
#pragma once

#include "common/parallel.h"
#include "common/simd.h"
#include "indexer_kl/indexer_kl.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int64_t kKeyBlock = 256;

GLM5_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
GLM5_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

struct RowStats {
  double mass = 0, product = 0, sum = 0, max = -__builtin_inf();

  double lse() const { return max + __builtin_log(sum); }
  double kl() const { return mass == 0 ? 0 : product / mass - __builtin_log(mass) + lse(); }
};

// The lanes from n up to the next whole vector become keys that do not exist: logit -inf, mass 0.
template <class S>
GLM5_INLINE void pad_row(S* logits, S* masses, int64_t n) {
  constexpr int64_t L = Vector<S>::kLanes;
  for (int64_t i = n; i < (n + L - 1) / L * L; ++i) {
    logits[i] = -__builtin_inff();
    masses[i] = 0;
  }
}

// Takes in one block of n padded keys.
template <class S>
void add_block(const S* logits, const S* masses, int64_t n, RowStats& stats) {
  using V = Vector<S>;
  constexpr int L = V::kLanes;
  const V zero = splat<V>(0);
  V highest = splat<V>(-__builtin_inff()), mass = zero, product = zero;
  for (int64_t i = 0; i < n; i += L) {
    const V logit = load(logits + i), m = load(masses + i);
    highest = max(highest, logit);
    mass = mass + m;
    product = product + where_lt(zero, m, m * (log(m) - logit), zero);
  }
  stats.mass += sum(mass);
  stats.product += sum(product);
  const S top = max_lane(highest);
  if (top == -__builtin_inff()) {
    for (int64_t i = 0; i < n; ++i)
      if (logits[i] != logits[i]) stats.sum = logits[i];
    return;
  }
  const V shift = splat<V>(top);
  V exps = zero;
  for (int64_t i = 0; i < n; i += L) exps = exps + exp(load(logits + i) - shift);
  const double block_top = static_cast<double>(top), largest = block_top > stats.max ? block_top : stats.max;
  stats.sum = (stats.sum == 0 ? 0 : stats.sum * __builtin_exp(stats.max - largest)) +
              static_cast<double>(sum(exps)) * __builtin_exp(block_top - largest);
  stats.max = largest;
}

// What the gradient of one row needs: scale * (total * exp(I - lse) - m * inverse_mass).
template <class S>
struct RowGradient {
  Vector<S> lse_high, lse_low, softmax_scale, mass_scale;

  // The row's upstream gradient, its lse, the sum of its masses, and whether they are still to be normalised by it.
  RowGradient(double upstream, double lse, double mass, bool normalise) {
    const S high = static_cast<S>(lse);
    lse_high = splat<Vector<S>>(high);
    lse_low = splat<Vector<S>>(static_cast<S>(lse - static_cast<double>(high)));
    const bool none = mass == 0;
    softmax_scale = splat<Vector<S>>(static_cast<S>(none ? 0 : normalise ? upstream : upstream * mass));
    mass_scale = splat<Vector<S>>(static_cast<S>(none ? 0 : normalise ? upstream / mass : upstream));
  }
  GLM5_INLINE Vector<S> operator()(Vector<S> logit, Vector<S> mass) const {
    return softmax_scale * exp(logit - lse_high - lse_low) - mass * mass_scale;
  }
};

}  // namespace
}  // namespace glm5::cpu::GLM5_ISA
