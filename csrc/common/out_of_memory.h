// The error of a call that finds no memory. Kernels do not include this: nothing of it may be compiled for their sets.
#pragma once

#include <cstddef>
#include <new>

namespace glm5 {

// There is no memory for an output or for working space. Python sees a MemoryError with this text.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(size_t bytes, const char* op = nullptr) noexcept;
  const char* what() const noexcept override;
  size_t bytes() const noexcept { return bytes_; }

 private:
  size_t bytes_;
  char text_[128];
};

}  // namespace glm5
