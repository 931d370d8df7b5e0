// The bf16 matrix product on AMX tiles: what gemm and gemm_serial become when the instruction set in force is amx.
#pragma once

#include "common/gemm/gemm.h"

namespace glm5::cpu::amx {

void gemm_bf16(const GemmArgs* products, int64_t count);
void gemm_bf16_serial(const GemmArgs& product);

// For products of up to 16 rows with weights whose lines lie along k, as all of them are if has_few_rows: the same bits.
bool gemm_has_few_rows(const GemmArgs* products, int64_t count);
void gemm_bf16_few_rows(const GemmArgs* products, int64_t count);

}  // namespace glm5::cpu::amx
