// Products of few rows without AMX: what cpu.cpp leaves to few_rows.cpp.
#pragma once

#include "common/gemm/gemm.h"

namespace glm5 {

// A task reads about so much of B.
inline constexpr int64_t kFewRowsTaskBytes = 1 << 20;

}  // namespace glm5

// gemm_has_few_rows: this product is one of them. gemm_few_rows: its columns [n0, n1), on the calling thread.
GLM5_DECLARE_KERNEL(bool gemm_has_few_rows(const GemmArgs& product);
                    void gemm_few_rows(const GemmArgs& product, int64_t n0, int64_t n1))
