#include "common/parallel.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <string>

#include "common/out_of_memory.h"

namespace glm5 {

OutOfMemory::OutOfMemory(size_t bytes, const char* op) noexcept : bytes_(bytes) {
  std::snprintf(text_, sizeof text_, "%s%sno memory for %zu bytes", op ? op : "", op ? ": " : "", bytes);
}

const char* OutOfMemory::what() const noexcept { return text_; }

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

void run_tasks(int64_t num_tasks, TaskFn task, void* context) {
  if (num_tasks <= 0) return;
  const int64_t workers = num_tasks < num_threads() ? num_tasks : num_threads();
  if (workers <= 1) {
    for (int64_t i = 0; i < num_tasks; ++i) task(context, i);
    return;
  }
  std::atomic<int64_t> next{0};
  // An exception that left the callback would reach the caller as torch's "parallel_for failed", without its cause. No
  // std::exception_ptr: the linker would bind it to the C++ runtime that libtorch happens to export.
  std::atomic<size_t> missing{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    try {
      for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < num_tasks;
           i = next.fetch_add(1, std::memory_order_relaxed))
        task(context, i);
    } catch (const OutOfMemory& error) {
      next.store(num_tasks, std::memory_order_relaxed);
      missing.store(error.bytes(), std::memory_order_relaxed);
    }
  });
  if (const size_t bytes = missing.load()) throw OutOfMemory(bytes);
}

namespace {

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(data); }
};

std::mutex g_paths_mutex;
std::map<std::string, int64_t>& paths() {
  static std::map<std::string, int64_t> counts;
  return counts;
}

}  // namespace

void* thread_scratch(int slot, size_t bytes) {
  static thread_local Buffer buffers[8];
  Buffer& buffer = buffers[slot];
  if (buffer.bytes < bytes) {
    std::free(buffer.data);
    // Large buffers on large pages, where the system has them: fewer page walks.
    const size_t page = bytes >= (size_t{1} << 20) ? size_t{2} << 20 : 4096;
    const size_t rounded = (bytes + page - 1) / page * page;
    buffer.data = std::aligned_alloc(page, rounded);
#ifdef MADV_HUGEPAGE
    if (page > 4096 && buffer.data) madvise(buffer.data, rounded, MADV_HUGEPAGE);
#endif
    buffer.bytes = buffer.data ? rounded : 0;
    if (!buffer.data) throw OutOfMemory(rounded);
  }
  return buffer.data;
}

bool g_count_paths = false;

void count_path(const char* name) {
  std::lock_guard<std::mutex> lock(g_paths_mutex);
  ++paths()[name];
}

}  // namespace glm5

extern "C" {

// Turns counting on (and forgets old counts) or off.
__attribute__((visibility("default"))) void glm5_count_paths(int on) {
  std::lock_guard<std::mutex> lock(glm5::g_paths_mutex);
  if (on) glm5::paths().clear();
  glm5::g_count_paths = on != 0;
}

// "name count\n" per path seen since counting was turned on; valid until this thread's next call.
__attribute__((visibility("default"))) const char* glm5_path_counts() {
  static thread_local std::string text;
  std::lock_guard<std::mutex> lock(glm5::g_paths_mutex);
  text.clear();
  for (const auto& [name, count] : glm5::paths()) text += name + " " + std::to_string(count) + "\n";
  return text.c_str();
}
}
