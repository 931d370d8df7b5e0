// Top-k selection on the CPU, exact and deterministic: the k largest of a row in index order, equal values to the lower
// index. NaN and -inf are never chosen, -0.0 ties with 0.0.
//
// A row takes: (1) a threshold from a sample of it, low enough that a little more than k values lie above; (2) one pass that
// packs those candidates together; (3) a bisection among the candidates for the k-th value; (4) one pass over the
// candidates, which are in index order already. A sample that misleads costs time, never correctness: step 2 is repeated
// with every valid value as a candidate.
#include "topk_indices/topk_indices.h"

#include <cfloat>
#include <type_traits>

#include "common/parallel.h"
#include "common/simd.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int64_t kElementsPerTask = 1 << 15;

// Integers in the order of the floating-point values, -0.0 and 0.0 being one.
GLM5_INLINE int32_t order_of(float x) {
  x += 0.f;
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
GLM5_INLINE int64_t order_of(double x) {
  x += 0.;
  int64_t bits;
  std::memcpy(&bits, &x, 8);
  return bits ^ ((bits >> 63) & 0x7fffffffffffffffll);
}

template <class T> struct Order;
template <> struct Order<float> {
  using Type = int32_t;
  static constexpr float kLowest = -FLT_MAX;
};
template <> struct Order<double> {
  using Type = int64_t;
  static constexpr double kLowest = -DBL_MAX;
};

// Packs the values >= threshold and their positions; returns how many there are. Room for n.
template <class T>
int64_t collect(const T* row, int64_t n, T threshold, typename Order<T>::Type* keys, int32_t* positions) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    keys[count] = order_of(row[i]);
    positions[count] = static_cast<int32_t>(i);
    count += row[i] >= threshold;
  }
  return count;
}

template <class K>
int64_t count_at_least(const K* keys, int64_t n, K bound) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += keys[i] >= bound;
  return count;
}

// The largest bound with at least k of the keys at or above it, that is the k-th largest key (1 <= k <= n); or an
// earlier bound with exactly k of them. `above` receives how many keys are chosen before ties: those > bound, or all k.
template <class K>
K kth_largest(const K* keys, int64_t n, int64_t k, int64_t* above) {
  K low = keys[0], high = keys[0];
  for (int64_t i = 1; i < n; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  *above = 0;  // how many are > high
  while (low < high) {
    using U = std::conditional_t<sizeof(K) == 8, uint64_t, uint32_t>;
    const U gap = static_cast<U>(high) - static_cast<U>(low);
    const K middle = static_cast<K>(static_cast<U>(low) + (gap - gap / 2));  // low < middle <= high
    const int64_t count = count_at_least(keys, n, middle);
    if (count == k) {
      *above = k;
      return middle;
    }
    if (count > k) {
      low = middle;
    } else {
      high = middle - 1;
      *above = count;
    }
  }
  return low;
}

// Writes positions with keys > bound, and the first `ties` of those equal to it, in order.
template <class K>
int64_t emit(const K* keys, const int32_t* positions, int64_t n, K bound, int64_t ties, int64_t base, int32_t* out) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool tie = keys[i] == bound && ties > 0;
    ties -= tie;
    if (tie || keys[i] > bound) out[count++] = static_cast<int32_t>(base + positions[i]);
  }
  return count;
}

template <class T>
void select(const T* row, int64_t n, int64_t k, int64_t base, int32_t* out) {
  using K = typename Order<T>::Type;
  int64_t count = 0;
  if (k > 0 && n > 0) {
    K* keys = static_cast<K*>(thread_scratch(6, sizeof(K) * (n + 64)));
    int32_t* positions = static_cast<int32_t*>(thread_scratch(7, sizeof(int32_t) * (n + 64)));
    const int64_t candidates = collect(row, n, Order<T>::kLowest, keys, positions);
    if (candidates <= k) {
      for (; count < candidates; ++count) out[count] = static_cast<int32_t>(base + positions[count]);
    } else {
      int64_t above;
      const K bound = kth_largest(keys, candidates, k, &above);
      // With exactly k at or above the bound every tie is taken.
      count = emit(keys, positions, candidates, bound, above == k ? k : k - above, base, out);
    }
  }
  for (; count < k; ++count) out[count] = -1;
}

template <class T>
void select_rows(const TopkIndicesArgs& args) {
  using S = Acc<T>;
  const int64_t block = args.cols >= kElementsPerTask ? 1 : kElementsPerTask / (args.cols + 1) + 1;
  parallel_tasks((args.rows + block - 1) / block, [&](int64_t task) {
    const int64_t end = (task + 1) * block < args.rows ? (task + 1) * block : args.rows;
    for (int64_t r = task * block; r < end; ++r) {
      const int64_t first = args.ks ? args.ks[r] : 0, last = args.ke ? args.ke[r] : args.cols;
      const int64_t n = last > first ? last - first : 0;
      const T* row = static_cast<const T*>(args.scores) + r * args.cols + (n ? first : 0);
      int32_t* out = args.indices + r * args.k;
      if constexpr (sizeof(T) == 2) {
        S* wide = static_cast<S*>(thread_scratch(5, sizeof(S) * (n + 1)));
        for (int64_t i = 0; i < n; i += F::kLanes) store_n(wide + i, load_n(row + i, n - i), n - i);
        select(wide, n, args.k, first, out);
      } else {
        select(row, n, args.k, first, out);
      }
    }
  });
}

}  // namespace

void select_topk(const float* row, int64_t n, int64_t k, int64_t base, int32_t* out) { select(row, n, k, base, out); }
#if GLM5_ISA_LEVEL == 0
void select_topk(const double* row, int64_t n, int64_t k, int64_t base, int32_t* out) { select(row, n, k, base, out); }
#endif

void topk_indices(const TopkIndicesArgs& args) {
  if (args.dtype == 0) select_rows<bf16>(args);
  else if (args.dtype == 1) select_rows<float>(args);
#if GLM5_ISA_LEVEL == 0
  else select_rows<double>(args);
#endif
}

}  // namespace glm5::cpu::GLM5_ISA
