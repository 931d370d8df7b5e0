// bfloat16 as storage: the upper half of a float. Conversion rounds to nearest even, keeps NaN and subnormals: the
// same bits as torch's.
#pragma once

#include <cstdint>
#include <cstring>

namespace glm5 {

struct bf16 {
  uint16_t bits;
};

}  // namespace glm5
