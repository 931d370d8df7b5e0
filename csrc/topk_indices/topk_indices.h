// Top-k selection: the contract between the binding and the kernels. Raw pointers, sizes in elements, no torch.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace glm5 {

struct TopkIndicesArgs {
  int dtype;            // Dtype of scores
  int64_t rows, cols;
  int64_t k;
  const void* scores;   // [rows, cols]
  const int32_t* ks;    // [rows] or null (0)
  const int32_t* ke;    // [rows] or null (cols)
  int32_t* indices;     // [rows, k]
};

}  // namespace glm5

// select_topk writes to out[0..k) the positions, plus `base`, of the k largest of row[0..n), ascending and padded with
// -1; equal values go to the lower position, NaN and -inf are never chosen. It uses thread_scratch slots 6 and 7.
GLM5_DECLARE_KERNEL(void topk_indices(const TopkIndicesArgs& args);
                    void select_topk(const float* row, int64_t n, int64_t k, int64_t base, int32_t* out);
                    void select_topk(const double* row, int64_t n, int64_t k, int64_t base, int32_t* out))
