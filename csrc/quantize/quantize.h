// Quantisation to FP8, int8 and int4, and back: the contract between the binding and the kernels. No torch. Codes and scales
// are defined to the bit (python/glm5/reference/quantize.py), the same on every set.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace glm5 {

struct Fp8Args {
  int dtype;  // Dtype of x: bf16 or float32
  int64_t batch, rows, columns;  // of x and q
  int64_t block_rows;  // 1 or 128; a block has 128 columns
  int64_t row_blocks, column_blocks;
  bool power_of_two;
  const void* x;  // [batch, rows, columns]                  quantize: in
  uint8_t* q;  // [batch, rows, columns] e4m3             quantize: out
  float* scale;  // [batch, row_blocks, column_blocks]      quantize: out
  const uint8_t* codes;  // [batch, rows, columns] e4m3             dequantize: in
  const float* scales;  // [batch, row_blocks, column_blocks]      dequantize: in
  void* out;  // [batch, rows, columns] of dtype         dequantize: out
};

struct Int8Args {
  int dtype;  // Dtype of x: bf16 or float32
  int64_t rows, columns;
  const void* x;  // [rows, columns]
  int8_t* q;  // [rows, columns]
  float* scale;  // [rows]
};

struct Int4Args {
  int dtype;  // Dtype of x and out: bf16 or float32
  int64_t rows, columns;
  int64_t groups;  // of a row
  bool symmetric;  // else with zeros
  const void* x;  // [rows, columns]       quantize, fake: in
  uint8_t* q;  // [rows, columns / 2]   quantize: out, low nibble = even column
  float* scale;  // [rows, groups]        quantize: out
  uint8_t* zeros;  // [rows, groups]        quantize: out unless symmetric
  const uint8_t* codes;  // [rows, columns / 2]   dequantize: in
  const float* scales;  // [rows, groups]        dequantize: in
  const uint8_t* zero_points;  // [rows, groups]        dequantize: in unless symmetric
  void* out;  // [rows, columns]       dequantize, fake: out
};

}  // namespace glm5

GLM5_DECLARE_KERNEL(void quantize_fp8(const Fp8Args& args); void dequantize_fp8(const Fp8Args& args);
                    void quantize_int8(const Int8Args& args); void quantize_int4(const Int4Args& args);
                    void dequantize_int4(const Int4Args& args); void fake_quantize_int4(const Int4Args& args))
