// The gradient of a bias: the sum of dy over its rows. A task owns one stripe of columns and adds in a fixed order.
#include "linear/linear.h"

#include "common/parallel.h"
#include "common/simd.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int64_t kStripe = 64;

template <class T>
void run(const SumRowsArgs& a) {
  using V = Vector<T>;
  constexpr int L = V::kLanes;
  parallel_tasks((a.cols + kStripe - 1) / kStripe, [&](int64_t task) {
    const int64_t first = task * kStripe, last = first + kStripe < a.cols ? first + kStripe : a.cols;
    const T* x = static_cast<const T*>(a.x);
    for (int64_t n = first; n < last; n += L) {
      V total = splat<V>(0);
      for (int64_t block = 0; block < a.rows; block += kSumRowsBlock) {
        const int64_t end = block + kSumRowsBlock < a.rows ? block + kSumRowsBlock : a.rows;
        V sum = splat<V>(0);
        for (int64_t row = block; row < end; ++row) sum = sum + load_n(x + row * a.x_row + n, last - n);
        total = total + sum;
      }
      store_n(static_cast<T*>(a.out) + n, total, last - n);
    }
  });
}

}  // namespace

void sum_rows(const SumRowsArgs& args) {
  if (args.dtype == 0) run<bf16>(args);
  else if (args.dtype == 1) run<float>(args);
#if GLM5_ISA_LEVEL == 0
  else run<double>(args);
#endif
}

}  // namespace glm5::cpu::GLM5_ISA
