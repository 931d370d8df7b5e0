// Caches of pages: the contract between the bindings and the kernels. Raw pointers, sizes in elements, no torch.
//
// A pool is num_pages pages of page_size rows; row `slot` is row slot % page_size of page slot / page_size. Its forms:
//   float         a row is dim numbers of one dtype
//   FP8 latent    a row is dim - rope e4m3 codes, a float32 scale for each 128 of them, and rope bf16 numbers: the 656 bytes
//                 of GLM-5's 512 + 64. The number of bytes alone says which: rope is less than 66 (kLatentBlockBytes / 2).
//   FP8 indexer   a page is page_size rows of dim e4m3 codes, then page_size float32 scales, one a row
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace glm5 {

inline constexpr int64_t kLatentBlock = 128, kLatentBlockBytes = kLatentBlock + 4;

struct CacheArgs {
  bool fp8;  // form of the pool
  int dtype;  // Dtype of rows
  int pages_dtype;  // Dtype of the pool where it is not fp8
  int64_t num_rows, dim;
  int64_t page_size;
  const int32_t* slots;  // [num_rows], -1 = no row
  void* pages;  // the pool, contiguous
  void* rows;  // [num_rows, dim]: written by read, zeros where there is no slot; else read
};

}  // namespace glm5

// A slot that comes twice keeps the later row.
GLM5_DECLARE_KERNEL(void latent_cache_write(const CacheArgs& args); void latent_cache_read(const CacheArgs& args);
                    void indexer_cache_write(const CacheArgs& args))
