// Rows sorted by group, as the grouped products take them. Only binding.cpp files include this.
#pragma once

#include <vector>

#include "common/checks.h"

namespace glm5 {

// group_ends [E] int32 as [E + 1] row numbers from 0, checked: never falling, none past `rows`.
inline std::vector<int64_t> group_bounds(const char* op, const Tensor& ends_in, int64_t rows) {
  check_cpu(op, "group_ends", ends_in);
  check_dtype(op, "group_ends", ends_in, {ScalarType::Int});
  check_dim(op, "group_ends", ends_in, 1, "[E]");
  const Tensor ends = as_contiguous(ends_in);
  const int32_t* values = static_cast<const int32_t*>(ends.const_data_ptr());
  std::vector<int64_t> bounds(1, 0);
  for (int64_t e = 0; e < ends.size(0); ++e) {
    if (values[e] < bounds.back() || values[e] > rows)
      fail(op, ": group_ends[", e, "] is ", values[e], ", want a number in [", bounds.back(), ", ", rows,
           "]: row numbers that never fall");
    bounds.push_back(values[e]);
  }
  return bounds;
}

}  // namespace glm5
