// The loss from given logits and target on the CPU.
#include "indexer_kl/row.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int64_t kRowBlock = 8;

// The row's visible keys, gathered in order, so that its sums do not know where in the row they stood. Returns how many.
template <class S>
int64_t gather_row(const IndexerKlLossArgs& a, int64_t row, S* logits, S* target, int64_t* columns) {
  const S* given = static_cast<const S*>(a.logits) + row * a.columns;
  const S* weights = static_cast<const S*>(a.target) + row * a.topk;
  int64_t count = 0;
  for (int64_t i = 0; i < a.topk; ++i) {
    const int64_t column = a.indices ? a.indices[row * a.topk + i] : i;
    // A key that the indexer cannot see but the target holds stays in: the loss is infinite.
    if (column < 0 || (given[column] == -__builtin_inff() && weights[i] == 0)) continue;
    logits[count] = given[column];
    target[count] = weights[i];
    columns[count++] = column;
  }
  return count;
}

template <class S, class Fn>
void over_rows(const IndexerKlLossArgs& a, const Fn& fn) {
  constexpr int L = Vector<S>::kLanes;
  parallel_tasks((a.rows + kRowBlock - 1) / kRowBlock, [&](int64_t task) {
    S* logits = static_cast<S*>(thread_scratch(0, sizeof(S) * (a.topk + L)));
    S* target = static_cast<S*>(thread_scratch(1, sizeof(S) * (a.topk + L)));
    int64_t* columns = static_cast<int64_t*>(thread_scratch(2, sizeof(int64_t) * (a.topk + 1)));
    for (int64_t row = task * kRowBlock; row < smaller(a.rows, (task + 1) * kRowBlock); ++row) {
      const int64_t n = gather_row(a, row, logits, target, columns);
      pad_row(logits, target, n);
      RowStats stats;
      for (int64_t i = 0; i < n; i += kKeyBlock) add_block(logits + i, target + i, smaller(kKeyBlock, n - i), stats);
      fn(row, n, stats, logits, target, columns);
    }
  });
}

template <class S>
void forward(const IndexerKlLossArgs& a) {
  over_rows<S>(a, [&](int64_t row, int64_t, const RowStats& stats, const S*, const S*, const int64_t*) {
    // The target is taken as it is given: its mass is not divided out.
    static_cast<S*>(a.kl)[row] = static_cast<S>(stats.mass == 0 ? 0 : stats.product + stats.mass * stats.lse());
  });
}

template <class S>
void backward(const IndexerKlLossArgs& a) {
  using V = Vector<S>;
  constexpr int L = V::kLanes;
  over_rows<S>(a, [&](int64_t row, int64_t n, const RowStats& stats, const S* logits, const S* target,
                      const int64_t* columns) {
    S* out = static_cast<S*>(a.dlogits) + row * a.columns;
    if (a.columns > 0) std::memset(out, 0, sizeof(S) * a.columns);
    const RowGradient<S> gradient(static_cast<double>(static_cast<const S*>(a.dkl)[row]), stats.lse(), stats.mass, false);
    S lanes[L];
    for (int64_t i = 0; i < n; i += L) {
      store(lanes, gradient(load(logits + i), load(target + i)));
      for (int64_t j = i; j < smaller(n, i + L); ++j) out[columns[j]] += lanes[j - i];
    }
  });
}

}  // namespace

void indexer_kl_loss_forward(const IndexerKlLossArgs& args) {
  if (!args.is_float64) forward<float>(args);
#if GLM5_ISA_LEVEL == 0
  else forward<double>(args);
#endif
}

void indexer_kl_loss_backward(const IndexerKlLossArgs& args) {
  if (!args.is_float64) backward<float>(args);
#if GLM5_ISA_LEVEL == 0
  else backward<double>(args);
#endif
}

}  // namespace glm5::cpu::GLM5_ISA
