// Threading and scratch memory for CPU kernels, on torch's own pool and without a torch header: kernels stay plain C++.
#pragma once

#include <cstddef>
#include <cstdint>

namespace glm5 {

int num_threads();

using TaskFn = void (*)(void* context, int64_t task);

// Runs task(context, 0 .. num_tasks-1), each exactly once, tasks being pulled from a shared counter so that a busy
// neighbour slows one thread and not the whole call. Which thread runs a task is not defined: a task may write only
// what no other task reads or writes, which makes every result independent of the thread count.
//
// Tasks throw nothing but the OutOfMemory of thread_scratch (common/out_of_memory.h). The first exception ends the call:
// tasks under way are finished, others not begun, and the caller gets it; GLM5_IMPL in checks.h adds the op's name.
void run_tasks(int64_t num_tasks, TaskFn task, void* context);

// The same for a callable: parallel_tasks(n, [&](int64_t task) { ... }).
template <class Fn>
inline void parallel_tasks(int64_t num_tasks, const Fn& fn) {
  run_tasks(
      num_tasks, [](void* context, int64_t task) { (*static_cast<const Fn*>(context))(task); },
      const_cast<void*>(static_cast<const void*>(&fn)));
}

// A 64-byte aligned buffer of this thread, kept and grown between calls; contents are undefined. `slot` (0..7) tells
// buffers that live at the same time apart: a task that needs two asks for slots 0 and 1. Throws OutOfMemory.
void* thread_scratch(int slot, size_t bytes);

// Counts how often a code path ran, when counting is on (tests use it to prove that each microkernel and tail was
// exercised). `name` must be a string literal.
void count_path(const char* name);
extern bool g_count_paths;

}  // namespace glm5

#define GLM5_COUNT_PATH(name) \
  do { \
    if (__builtin_expect(::glm5::g_count_paths, 0)) ::glm5::count_path(name); \
  } while (0)
