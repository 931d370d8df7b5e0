// What bindings of paged ops check: the pool of pages, the block table that says where a sequence's positions lie in it, and
// the positions that each query sees. Values are looked at where a query needs them: entries of pages that no query sees may
// hold anything.
#pragma once

#include <algorithm>
#include <vector>

#include "cache/cache.h"
#include "common/checks.h"

namespace glm5 {

// A cache tensor [num_pages, page_size, width], contiguous.
struct Pool {
  bool fp8 = false;
  int dtype = -1;  // Dtype where it is not fp8
  int64_t num_pages = 0, page_size = 0, width = 0;

  Pool(const char* op, const Tensor& cache) {
    check_cpu(op, "cache", cache);
    check_dtype(op, "cache", cache, {ScalarType::BFloat16, ScalarType::Float, ScalarType::Double, ScalarType::Byte});
    check_dim(op, "cache", cache, 3, "[pages, page size, row]");
    fp8 = cache.scalar_type() == ScalarType::Byte;
    if (!fp8) dtype = static_cast<int>(float_dtype(op, "cache", cache));
    num_pages = cache.size(0), page_size = cache.size(1), width = cache.size(2);
    if (page_size < 1) fail(op, ": cache has shape ", shape_of(cache), ", want pages of at least one row");
    if (num_pages > std::numeric_limits<int32_t>::max() / page_size)
      fail(op, ": cache has shape ", shape_of(cache), ", want at most 2^31 - 1 rows");
  }

  int64_t num_slots() const { return num_pages * page_size; }

  // The dims of a latent row. FP8: of the width alone, see cache.h.
  int64_t latent_dim(const char* op, const Tensor& cache) const {
    if (!fp8) return width;
    if (width % kLatentBlockBytes % 2)
      fail(op, ": cache has shape ", shape_of(cache), ", want rows of 132 bytes for each 128 FP8 dims and 2 for each other");
    return width / kLatentBlockBytes * kLatentBlock + width % kLatentBlockBytes / 2;
  }
};

// Refuses a slot outside [-1, num_slots).
inline const int32_t* checked_slots(const char* op, const Tensor& slots, int64_t num_slots) {
  const int32_t* values = slots.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < slots.size(0); ++i)
    if (values[i] < -1 || values[i] >= num_slots)
      fail(op, ": slots[", i, "] is ", values[i], ", want -1 (none) or 0 to ", num_slots - 1, " (a row of cache)");
  return values;
}

// Consecutive queries of one sequence.
struct SequenceRun {
  int64_t begin, end;  // queries [begin, end)
  int64_t ks, ke;  // the hull of their ranges, where they have any (ks < ke)
  const int32_t* table;  // the sequence's row of the block table
};

struct BlockTable {
  Tensor table, sequence;
  const int32_t *entries, *sequence_of;
  int64_t num_sequences, max_pages, page_size, num_pages, queries;

  BlockTable(const char* op, const Tensor& table_in, const Tensor& sequence_in, int64_t num_queries, const Pool& pool)
      : table(as_contiguous(table_in)), sequence(as_contiguous(sequence_in)) {
    check_cpu(op, "block_table", table);
    check_cpu(op, "sequence", sequence);
    check_dtype(op, "block_table", table, {ScalarType::Int});
    check_dtype(op, "sequence", sequence, {ScalarType::Int});
    check_dim(op, "block_table", table, 2, "[sequences, pages]");
    check_dim(op, "sequence", sequence, 1, "[queries]");
    check_size(op, "sequence", sequence, 0, num_queries, "the queries of q");
    entries = table.const_data_ptr<int32_t>(), sequence_of = sequence.const_data_ptr<int32_t>();
    num_sequences = table.size(0), max_pages = table.size(1);
    page_size = pool.page_size, num_pages = pool.num_pages, queries = num_queries;
    if (max_pages > std::numeric_limits<int32_t>::max() / page_size)
      fail(op, ": block_table has shape ", shape_of(table), ", want at most 2^31 - 1 positions of a sequence");
    for (int64_t t = 0; t < queries; ++t)
      if (sequence_of[t] < 0 || sequence_of[t] >= num_sequences)
        fail(op, ": sequence[", t, "] is ", sequence_of[t], ", want 0 to ", num_sequences - 1, " (a row of block_table)");
  }

  int64_t positions() const { return max_pages * page_size; }
  const int32_t* row(int64_t t) const { return entries + sequence_of[t] * max_pages; }

  [[noreturn]] void refuse_page(const char* op, int64_t t, int64_t entry) const {
    fail(op, ": block_table[", sequence_of[t], ", ", entry, "] is ", row(t)[entry], ", want 0 to ", num_pages - 1,
         " (a page of cache) where query ", t, " sees it");
  }

  // Runs of queries whose ranges lie within the sequence and in pages that are there.
  std::vector<SequenceRun> runs(const char* op, const int32_t* ks, const int32_t* ke) const {
    std::vector<SequenceRun> found;
    int64_t known_from = 0, known_to = 0;  // entries that earlier queries of the run have looked at
    for (int64_t t = 0; t < queries; ++t) {
      if (found.empty() || sequence_of[t] != sequence_of[t - 1]) {
        found.push_back({t, t, 0, 0, row(t)});
        known_from = known_to = 0;
      }
      SequenceRun& run = found.back();
      run.end = t + 1;
      if (ks[t] >= ke[t]) continue;
      if (ks[t] < 0) fail(op, ": ks is ", ks[t], " for query ", t, ", want a number >= 0");
      if (ke[t] > positions())
        fail(op, ": ke is ", ke[t], " for query ", t, ", want at most the ", positions(), " positions of block_table");
      const bool first = run.ks >= run.ke;
      run.ks = first ? ks[t] : std::min<int64_t>(run.ks, ks[t]);
      run.ke = first ? ke[t] : std::max<int64_t>(run.ke, ke[t]);
      const int64_t from = ks[t] / page_size, to = (ke[t] - 1) / page_size + 1;
      for (int64_t e = from; e < to; ++e) {
        if (e >= known_from && e < known_to) {
          e = known_to - 1;
          continue;
        }
        if (run.table[e] < 0 || run.table[e] >= num_pages) refuse_page(op, t, e);
      }
      if (from <= known_to && to >= known_from && known_from < known_to) {
        known_from = std::min(known_from, from), known_to = std::max(known_to, to);
      } else {
        known_from = from, known_to = to;
      }
    }
    return found;
  }

  // Slot of position s of the sequence whose row of the table is given, -1 where its page is not there.
  int32_t slot(const int32_t* table_row, int64_t s) const {
    const int64_t page = table_row[s / page_size];
    return page < 0 || page >= num_pages ? -1 : static_cast<int32_t>(page * page_size + s % page_size);
  }
};

}  // namespace glm5
