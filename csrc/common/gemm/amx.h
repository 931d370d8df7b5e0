// The bf16 matrix product on AMX tiles: what gemm and gemm_serial become when the instruction set in force is amx.
#pragma once

#include "common/gemm/gemm.h"

namespace glm5::cpu::amx {

void gemm_bf16(const GemmArgs* products, int64_t count);
void gemm_bf16_serial(const GemmArgs& product);

}  // namespace glm5::cpu::amx
