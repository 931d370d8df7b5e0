// The product on AMX tiles: the same bits as on vectors, since all of it that is not exact is the same float32 steps.
#pragma once

#include "w4a8_gemm/w4a8_gemm.h"

namespace glm5::cpu::amx {

// Products of so many rows are faster here than on vectors, which few rows leave waiting for memory anyway.
inline constexpr int64_t kW4A8TileRows = 9;

void w4a8_gemm_tiles(const W4A8Args& a);

}  // namespace glm5::cpu::amx
