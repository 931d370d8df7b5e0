#include "runtime/packer.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

namespace glm5::runtime {
namespace {

// Calls fill(token, start of its document) for every token of a pack.
template <class Fill>
std::vector<int32_t> per_token(const Pack& pack, const Fill& fill) {
  std::vector<int32_t> values(pack.num_tokens());
  for (size_t i = 0; i + 1 < pack.cu_seqlens.size(); ++i)
    for (int32_t token = pack.cu_seqlens[i]; token < pack.cu_seqlens[i + 1]; ++token)
      values[token] = fill(token, pack.cu_seqlens[i]);
  return values;
}

}  // namespace

std::vector<int32_t> Pack::positions() const {
  return per_token(*this, [](int32_t token, int32_t start) { return token - start; });
}
std::vector<int32_t> Pack::ks() const {
  return per_token(*this, [](int32_t, int32_t start) { return start; });
}
std::vector<int32_t> Pack::ke() const {
  return per_token(*this, [](int32_t token, int32_t) { return token + 1; });
}

SequencePacker::SequencePacker(int64_t budget) : budget_(budget) {
  if (budget < 1 || budget > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("SequencePacker: budget is " + std::to_string(budget) + ", want 1 to 2147483647 tokens");
}

std::vector<Pack> SequencePacker::pack(const int64_t* lengths, int64_t count) const {
  for (int64_t id = 0; id < count; ++id)
    if (lengths[id] < 1 || lengths[id] > budget_)
      throw std::invalid_argument("SequencePacker.pack: lengths[" + std::to_string(id) + "] is " +
                                  std::to_string(lengths[id]) + ", want 1 to the budget, " + std::to_string(budget_) +
                                  " (cut longer documents first)");

  std::vector<int64_t> longest_first(count);
  std::iota(longest_first.begin(), longest_first.end(), 0);
  std::stable_sort(longest_first.begin(), longest_first.end(),
                   [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });

  std::vector<Pack> packs;
  std::set<std::pair<int64_t, size_t>> room;  // (free tokens, pack): the first entry not below a length is its best fit
  for (int64_t id : longest_first) {
    const auto fit = room.lower_bound({lengths[id], 0});
    const bool found = fit != room.end();
    const size_t chosen = found ? fit->second : packs.size();
    const int64_t free_tokens = (found ? fit->first : budget_) - lengths[id];
    if (found) room.erase(fit);
    else packs.emplace_back();
    packs[chosen].documents.push_back(id);
    if (free_tokens > 0) room.insert({free_tokens, chosen});
  }

  for (Pack& pack : packs) {
    std::sort(pack.documents.begin(), pack.documents.end());
    pack.cu_seqlens.push_back(0);
    for (int64_t id : pack.documents) pack.cu_seqlens.push_back(pack.cu_seqlens.back() + static_cast<int32_t>(lengths[id]));
  }
  std::sort(packs.begin(), packs.end(),
            [](const Pack& a, const Pack& b) { return a.documents.front() < b.documents.front(); });
  return packs;
}

}  // namespace glm5::runtime
