#include "common/large_outputs.h"

#include <dlfcn.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "common/parallel.h"

namespace glm5 {
namespace {

constexpr size_t kPage = size_t{2} << 20;
constexpr size_t kMostKept = size_t{512} << 20;

struct Block {
  void* data;
  size_t bytes;
};

// Never destroyed: tensors may outlive every static object.
struct Waiting {
  std::mutex mutex;
  std::vector<Block> blocks;  // oldest first
  size_t bytes = 0;

  void remove(size_t i) {
    bytes -= blocks[i].bytes;
    blocks.erase(blocks.begin() + static_cast<std::ptrdiff_t>(i));
  }
  void free_oldest() {
    std::free(blocks[0].data);
    remove(0);
  }
};
Waiting& waiting() {
  static Waiting* const all = new Waiting;
  return *all;
}

// Has the system put all pages in place, large ones where it has them, on all threads. A first write into a page that arrives
// among stores past the caches would break their 64 bytes up: they took twice as long.
void put_in_place(void* data, size_t bytes) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(data), end = start + bytes, first = (start + kPage - 1) / kPage;
#ifdef MADV_HUGEPAGE
  madvise(reinterpret_cast<void*>(first * kPage), end / kPage * kPage - first * kPage, MADV_HUGEPAGE);
#endif
  parallel_tasks(static_cast<int64_t>((end + kPage - 1) / kPage - start / kPage), [&](int64_t task) {
    const uintptr_t piece = (start / kPage + static_cast<uintptr_t>(task)) * kPage;
    const uintptr_t stop = piece + kPage < end ? piece + kPage : end;
    for (uintptr_t at = piece > start ? piece : start; at < stop; at = (at / 4096 + 1) * 4096)
      *reinterpret_cast<volatile char*>(at) = 0;
  });
}

// A waiting block of `bytes` bytes or up to an eighth more. Where there is none, as many bytes of others are freed.
Block take(size_t bytes) {
  Waiting& all = waiting();
  const std::lock_guard<std::mutex> lock(all.mutex);
  size_t best = all.blocks.size();
  for (size_t i = 0; i < all.blocks.size(); ++i) {
    const size_t size = all.blocks[i].bytes;
    if (size >= bytes && size <= bytes + bytes / 8 && (best == all.blocks.size() || size < all.blocks[best].bytes)) best = i;
  }
  if (best < all.blocks.size()) {
    const Block block = all.blocks[best];
    all.remove(best);
    return block;
  }
  for (const size_t before = all.bytes; !all.blocks.empty() && before - all.bytes < bytes;) all.free_oldest();
  return {};
}

void* new_block(size_t bytes) {
  void* data = std::aligned_alloc(kPage, bytes);
  if (data) return data;
  {
    Waiting& all = waiting();
    const std::lock_guard<std::mutex> lock(all.mutex);
    while (!all.blocks.empty()) all.free_oldest();
  }
  return std::aligned_alloc(kPage, bytes);
}

void give_back(void* data, void* bytes) {
  const Block block{data, reinterpret_cast<size_t>(bytes)};
  if (block.bytes > kMostKept) return std::free(data);
#ifdef MADV_FREE
  madvise(block.data, block.bytes, MADV_FREE);
#endif
  Waiting& all = waiting();
  const std::lock_guard<std::mutex> lock(all.mutex);
  while (all.bytes + block.bytes > kMostKept) all.free_oldest();
  all.blocks.push_back(block);
  all.bytes += block.bytes;
}

// torch_from_blob of torch 2.11 and later; null before.
using FromBlob = AOTITorchError (*)(void*, int64_t, const int64_t*, const int64_t*, int64_t, int32_t, int32_t, int32_t,
                                    AtenTensorHandle*, int32_t, const uint8_t*, int64_t, void (*)(void*, void*), void*);
FromBlob from_blob() {
  static const FromBlob found = reinterpret_cast<FromBlob>(dlsym(RTLD_DEFAULT, "torch_from_blob"));
  return found;
}

enum class Memory { kept, unwanted, unkept_by_torch };

Memory memory() {
#if defined(__SANITIZE_ADDRESS__)
  return Memory::unwanted;  // it must see what is freed
#else
  static const Memory found = [] {
    const char* wanted = std::getenv("GLM5_KEEP_MEMORY");
    if (wanted && std::strcmp(wanted, "0") == 0) return Memory::unwanted;
    return from_blob() ? Memory::kept : Memory::unkept_by_torch;
  }();
  return found;
#endif
}

std::atomic<void (*)()> g_say_torch_keeps_none{nullptr};

}  // namespace

std::optional<torch::stable::Tensor> large_output(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                                  torch::headeronly::ScalarType dtype, size_t bytes) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  if (memory() != Memory::kept) {
    if (memory() == Memory::unkept_by_torch)
      if (const auto say = g_say_torch_keeps_none.exchange(nullptr)) say();
    torch::stable::Tensor t;
    try {
      t = torch::stable::empty(sizes, dtype, std::nullopt, cpu);
    } catch (const std::runtime_error&) {  // says only that torch's allocator failed
      return std::nullopt;
    }
    put_in_place(t.mutable_data_ptr(), bytes);
    return t;
  }
  const size_t rounded = (bytes + kPage - 1) / kPage * kPage;
  if (rounded < bytes) return std::nullopt;
  Block block = take(rounded);
  if (!block.data) {
    block = {new_block(rounded), rounded};
    if (!block.data) return std::nullopt;
    put_in_place(block.data, rounded);
  }

  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  AtenTensorHandle handle = nullptr;
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  if (from_blob()(block.data, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0, code,
                  aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0, give_back,
                  reinterpret_cast<void*>(block.bytes)) != 0) {
    std::free(block.data);
    return std::nullopt;
  }
  return torch::stable::Tensor(handle);
}

}  // namespace glm5

// Plain C entry points for glm5._native (ctypes).
extern "C" {

// What becomes of a large output's memory: "kept", "unwanted" (GLM5_KEEP_MEMORY=0, AddressSanitizer) or "unkept by torch".
__attribute__((visibility("default"))) const char* glm5_large_output_memory() {
  constexpr const char* kNames[] = {"kept", "unwanted", "unkept by torch"};
  return kNames[static_cast<int>(glm5::memory())];
}

// `say` is called before the first large output whose memory torch has no way to keep, and never again.
__attribute__((visibility("default"))) void glm5_tell_of_unkept_memory(void (*say)()) { glm5::g_say_torch_keeps_none = say; }
}
