// Memory of large outputs, kept from one tensor to the next. malloc gives every tensor of 32 MiB and more new pages, and takes
// them back with it: putting 200 MB in place costs 12 ms on large pages and 40 ms on small ones, against 6 ms to fill them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <optional>

namespace glm5 {

// From this many bytes on an output is large: malloc always maps such a block.
constexpr size_t kLargeOutput = size_t{32} << 20;

// A contiguous CPU tensor of `bytes` bytes, its pages in place; nothing where there is no memory.
//
// Freed blocks wait for the next output of about their size, 512 MiB of them at most; the system may take their pages when it
// is short of memory (MADV_FREE). A block of a new size takes the place of waiting ones, so that what is held grows with
// what is in use alone. GLM5_KEEP_MEMORY=0 gives everything back at once, and so does torch before 2.11, which has no way to
// say what becomes of a tensor's memory: that is said once (a Python warning), and `glm5 doctor` shows it.
std::optional<torch::stable::Tensor> large_output(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                                  torch::headeronly::ScalarType dtype, size_t bytes);

}  // namespace glm5
