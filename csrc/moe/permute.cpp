// Moving token rows to their experts and back on the CPU.
#include "common/parallel.h"
#include "common/simd.h"
#include "moe/moe.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

constexpr int64_t kTokenBlock = 8;

// The choices of one token in ascending slot (expert) order, -1 left out. Returns how many.
GLM5_INLINE int64_t in_slot_order(const int32_t* slots, int64_t k, int32_t* order) {
  int64_t count = 0;
  for (int64_t j = 0; j < k; ++j) {
    if (slots[j] < 0) continue;
    int64_t at = count++;
    for (; at > 0 && slots[order[at - 1]] > slots[j]; --at) order[at] = order[at - 1];
    order[at] = static_cast<int32_t>(j);
  }
  return count;
}

// From this many bytes on what is written cannot stay in a cache of common size until it is read: it is written past them.
constexpr int64_t kStreamed = int64_t{32} << 20;

// Copies `bytes` bytes past the caches, where the set can. The caller ends with stream_fence().
GLM5_INLINE void stream_copy(char* to, const char* from, int64_t bytes) {
#if GLM5_ISA_LEVEL > 0
#if GLM5_ISA_LEVEL == 2
  constexpr int64_t kVector = 64;
#else
  constexpr int64_t kVector = 32;
#endif
  const int64_t unaligned = -reinterpret_cast<intptr_t>(to) & (kVector - 1);
  const int64_t head = unaligned < bytes ? unaligned : bytes;
  std::memcpy(to, from, head);
  int64_t i = head;
  for (; i + kVector <= bytes; i += kVector) {
#if GLM5_ISA_LEVEL == 2
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#else
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
#endif
  }
  std::memcpy(to + i, from + i, bytes - i);
#else
  std::memcpy(to, from, bytes);
#endif
}

GLM5_INLINE void stream_fence() {
#if GLM5_ISA_LEVEL > 0
  _mm_sfence();
#endif
}

template <class T>
void combine(const MoeCombineArgs& a) {
  using V = Vector<T>;
  using S = Acc<T>;
  constexpr int kWide = 4;
  constexpr int64_t kAheadBytes = 512;
  parallel_tasks((a.tokens + kTokenBlock - 1) / kTokenBlock, [&](int64_t task) {
    int32_t* order = static_cast<int32_t*>(thread_scratch(0, sizeof(int32_t) * (a.topk + 1)));
    const int64_t end = (task + 1) * kTokenBlock < a.tokens ? (task + 1) * kTokenBlock : a.tokens;
    for (int64_t t = task * kTokenBlock; t < end; ++t) {
      const int32_t* slots = a.slot_of_row + t * a.topk;
      const S* weights = a.weights ? static_cast<const S*>(a.weights) + t * a.topk : nullptr;
      T* out = static_cast<T*>(a.out) + t * a.dim;
      const int64_t count = in_slot_order(slots, a.topk, order);
      const auto add = [&](V total, V row, int64_t j) {
        return weights ? fma(row, splat<V>(weights[j]), total) : total + row;
      };
      int64_t i = 0;
      // Two lines of each row at a time, the next on their way: left to the processor's own prefetch it took 1.2x as long.
      for (; i + kWide * V::kLanes <= a.dim; i += kWide * V::kLanes) {
        V totals[kWide];
#pragma GCC unroll 8
        for (int l = 0; l < kWide; ++l) totals[l] = splat<V>(0);
        for (int64_t o = 0; o < count; ++o) {
          const int64_t j = order[o];
          const T* row = static_cast<const T*>(a.y) + slots[j] * a.dim + i;
#pragma GCC unroll 8
          for (int l = 0; l < kWide; ++l) totals[l] = add(totals[l], load(row + l * V::kLanes), j);
          const char* ahead = reinterpret_cast<const char*>(row) + kAheadBytes;  // past the end nothing is read: a hint
#pragma GCC unroll 4
          for (size_t l = 0; l < kWide * V::kLanes * sizeof(T); l += 64) __builtin_prefetch(ahead + l);
        }
#pragma GCC unroll 8
        for (int l = 0; l < kWide; ++l) store(out + i + l * V::kLanes, totals[l]);
      }
      for (; i < a.dim; i += V::kLanes) {
        const int64_t n = a.dim - i;
        V total = splat<V>(0);
        for (int64_t o = 0; o < count; ++o) {
          const int64_t j = order[o];
          total = add(total, load_n(static_cast<const T*>(a.y) + slots[j] * a.dim + i, n), j);
        }
        store_n(out + i, total, n);
      }
    }
  });
}

template <class T>
void combine_backward(const MoeCombineArgs& a) {
  using V = Vector<T>;
  using S = Acc<T>;
  constexpr int64_t kBlock = 128 * V::kLanes;
  int64_t used = 0;
  for (int64_t i = 0; i < a.tokens * a.topk; ++i) used += a.slot_of_row[i] >= 0;
  if (used < a.slots && a.dim > 0) std::memset(a.dy, 0, sizeof(T) * a.slots * a.dim);
  parallel_tasks((a.tokens + kTokenBlock - 1) / kTokenBlock, [&](int64_t task) {
    const int64_t end = (task + 1) * kTokenBlock < a.tokens ? (task + 1) * kTokenBlock : a.tokens;
    for (int64_t t = task * kTokenBlock; t < end; ++t) {
      const T* dout = static_cast<const T*>(a.dout) + t * a.dim;
      for (int64_t j = 0; j < a.topk; ++j) {
        const int64_t slot = a.slot_of_row[t * a.topk + j];
        if (slot < 0) {
          static_cast<S*>(a.dweights)[t * a.topk + j] = 0;
          continue;
        }
        const T* y = static_cast<const T*>(a.y) + slot * a.dim;
        T* dy = static_cast<T*>(a.dy) + slot * a.dim;
        const V weight = splat<V>(static_cast<const S*>(a.weights)[t * a.topk + j]);
        S total = 0;
        for (int64_t begin = 0; begin < a.dim; begin += kBlock) {
          const int64_t stop = begin + kBlock < a.dim ? begin + kBlock : a.dim;
          V part = splat<V>(0);
          for (int64_t i = begin; i < stop; i += V::kLanes) {
            const int64_t n = a.dim - i;
            const V d = load_n(dout + i, n);
            part = fma(d, load_n(y + i, n), part);
            store_n(dy + i, d * weight, n);
          }
          total += sum(part);
        }
        static_cast<S*>(a.dweights)[t * a.topk + j] = total;
      }
    }
  });
}

}  // namespace

// A counting sort by (expert, token, choice), then one pass that reads each token's row once and writes its copies.
void moe_permute(const MoePermuteArgs& a) {
  const int64_t slots = a.tokens * a.topk;
  std::memset(a.group_ends, 0, sizeof(int32_t) * a.experts);
  for (int64_t i = 0; i < slots; ++i)
    if (a.ids[i] >= 0) ++a.group_ends[a.ids[i]];
  int32_t start = 0;
  for (int64_t e = 0; e < a.experts; ++e) {
    const int32_t count = a.group_ends[e];
    a.group_ends[e] = start;
    start += count;
  }
  for (int64_t i = start; i < slots; ++i) a.row_of_slot[i] = -1;
  if (start < slots && a.row_bytes > 0)
    std::memset(static_cast<char*>(a.xp) + start * a.row_bytes, 0, (slots - start) * a.row_bytes);
  for (int64_t i = 0; i < slots; ++i) {
    if (a.ids[i] < 0) {
      a.slot_of_row[i] = -1;
      continue;
    }
    const int32_t slot = a.group_ends[a.ids[i]]++;
    a.slot_of_row[i] = slot;
    a.row_of_slot[slot] = static_cast<int32_t>(i / a.topk);
  }
  if (a.row_bytes == 0) return;
  const bool streamed = slots * a.row_bytes >= kStreamed;
  parallel_tasks((a.tokens + kTokenBlock - 1) / kTokenBlock, [&](int64_t task) {
    const int64_t end = (task + 1) * kTokenBlock < a.tokens ? (task + 1) * kTokenBlock : a.tokens;
    for (int64_t t = task * kTokenBlock; t < end; ++t)
      for (int64_t j = 0; j < a.topk; ++j) {
        const int64_t slot = a.slot_of_row[t * a.topk + j];
        if (slot < 0) continue;
        char* to = static_cast<char*>(a.xp) + slot * a.row_bytes;
        const char* from = static_cast<const char*>(a.x) + t * a.row_bytes;
        if (streamed) {
          GLM5_COUNT_PATH("moe_permute.streamed");
          stream_copy(to, from, a.row_bytes);
        } else {
          GLM5_COUNT_PATH("moe_permute.copied");
          std::memcpy(to, from, a.row_bytes);
        }
      }
    if (streamed) stream_fence();
  });
}

void moe_combine_forward(const MoeCombineArgs& args) {
  if (args.dtype == 0) combine<bf16>(args);
  else if (args.dtype == 1) combine<float>(args);
#if GLM5_ISA_LEVEL == 0
  else combine<double>(args);
#endif
}

void moe_combine_backward(const MoeCombineArgs& args) {
  if (args.dtype == 0) combine_backward<bf16>(args);
  else if (args.dtype == 1) combine_backward<float>(args);
#if GLM5_ISA_LEVEL == 0
  else combine_backward<double>(args);
#endif
}

}  // namespace glm5::cpu::GLM5_ISA
