// Packs documents into fixed token budgets. Knows lengths only: no tokens, no torch, no Python.
#pragma once

#include <cstdint>
#include <vector>

namespace glm5::runtime {

// The documents that share one token budget, laid out one after the other.
struct Pack {
  std::vector<int64_t> documents;   // [documents], ascending ids
  std::vector<int32_t> cu_seqlens;  // [documents + 1], where each document starts; the last entry is the token count

  int64_t num_tokens() const { return cu_seqlens.back(); }

  // Each [num_tokens]. position: place inside the document. ks, ke: the keys that causal attention inside the document
  // allows, [ks, ke), counted from the start of the pack.
  std::vector<int32_t> positions() const;
  std::vector<int32_t> ks() const;
  std::vector<int32_t> ke() const;
};

// Best-fit decreasing: documents in order of falling length (ties: lower id) go to the fullest pack that has room (ties:
// the older pack), so that at most 11/9 of the fewest possible packs + 6/9 are used (Dosa 2007). O(n log n), no state.
class SequencePacker {
 public:
  explicit SequencePacker(int64_t budget);

  int64_t budget() const { return budget_; }

  // Packs in the order of their lowest document id. Throws std::invalid_argument when a length is not in [1, budget].
  std::vector<Pack> pack(const int64_t* lengths, int64_t count) const;

 private:
  int64_t budget_;
};

}  // namespace glm5::runtime
