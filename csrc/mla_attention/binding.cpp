// Schemas, argument checks, the cutting of a batch into tasks, and dispatch of dense attention.
#include <algorithm>
#include <cmath>
#include <vector>

#include "common/checks.h"
#include "mla_attention/mla_attention.h"
#include "mla_attention/paged.h"

// bf16 on AMX has kernels of its own; the rest goes the common way.
#if defined(__x86_64__)
#define GLM5_CALL_MLA_KERNEL(fn, args) \
  do { \
    if ((args).dtype == 0 && ::glm5::current_isa() == ::glm5::Isa::amx) ::glm5::cpu::amx::fn(args); \
    else GLM5_CALL_KERNEL((args).dtype == 2, fn, args); \
  } while (0)
#else
#define GLM5_CALL_MLA_KERNEL(fn, args) GLM5_CALL_KERNEL((args).dtype == 2, fn, args)
#endif

namespace glm5 {
namespace {

MlaAttentionArgs common_args(const char* op, const Tensor& q, const Tensor& k, const Tensor& ks, const Tensor& ke,
                             double scale) {
  check_cpu(op, "q", q);
  check_cpu(op, "k", k);
  check_cpu(op, "ks", ks);
  check_cpu(op, "ke", ke);
  const Dtype dtype = float_dtype(op, "q", q);
  check_same_dtype(op, "k", k, "q", q);
  check_dtype(op, "ks", ks, {ScalarType::Int});
  check_dtype(op, "ke", ke, {ScalarType::Int});
  check_dim(op, "q", q, 3, "[queries, heads, dim]");
  check_dim(op, "k", k, 3, "[keys, heads, dim]");
  check_dim(op, "ks", ks, 1, "[queries]");
  check_dim(op, "ke", ke, 1, "[queries]");
  if (q.size(1) < 1) fail(op, ": q has shape ", shape_of(q), ", want at least one head");
  if (q.size(2) < 1) fail(op, ": q has shape ", shape_of(q), ", want a non-empty last dimension");
  check_size(op, "k", k, 1, q.size(1), "the heads of q");
  check_size(op, "k", k, 2, q.size(2), "the last dimension of q");
  check_size(op, "ks", ks, 0, q.size(0), "the queries of q");
  check_size(op, "ke", ke, 0, q.size(0), "the queries of q");
  if (!std::isfinite(scale)) fail(op, ": scale is ", scale, ", want a finite number");
  MlaAttentionArgs args{};
  args.dtype = static_cast<int>(dtype);
  args.num_queries = q.size(0);
  args.num_keys = k.size(0);
  args.heads = q.size(1);
  args.dk = q.size(2);
  args.scale = scale;
  args.q = q.const_data_ptr();
  args.k = k.const_data_ptr();
  args.ks = static_cast<const int32_t*>(ks.const_data_ptr());
  args.ke = static_cast<const int32_t*>(ke.const_data_ptr());
  for (int64_t i = 0; i < args.num_queries; ++i)
    if (args.ks[i] < args.ke[i] && (args.ks[i] < 0 || args.ke[i] > args.num_keys))
      fail(op, ": query ", i, " has the key range [", args.ks[i], ", ", args.ke[i], "), want one within [0, ", args.num_keys,
           ")");
  return args;
}

void add_values(const char* op, MlaAttentionArgs& args, const Tensor& v, const Tensor& q) {
  check_cpu(op, "v", v);
  check_same_dtype(op, "v", v, "q", q);
  check_dim(op, "v", v, 3, "[keys, heads, dim]");
  check_size(op, "v", v, 0, args.num_keys, "the keys of k");
  check_size(op, "v", v, 1, args.heads, "the heads of q");
  if (v.size(2) < 1) fail(op, ": v has shape ", shape_of(v), ", want a non-empty last dimension");
  args.dv = v.size(2);
  args.v_stride = args.heads * args.dv;
  args.v = v.const_data_ptr();
}

ScalarType lse_dtype(const MlaAttentionArgs& args) {
  return args.dtype == static_cast<int>(Dtype::float64) ? ScalarType::Double : ScalarType::Float;
}

void check_per_head(const char* op, const char* name, const MlaAttentionArgs& args, const Tensor& t) {
  check_cpu(op, name, t);
  check_dtype(op, name, t, {lse_dtype(args)});
  check_dim(op, name, t, 2, "[queries, heads]");
  check_size(op, name, t, 0, args.num_queries, "the queries of q");
  check_size(op, name, t, 1, args.heads, "the heads of q");
}

// The order that starts the costliest tasks first, so that the last ones to end are short.
std::vector<int32_t> heavy_first(const std::vector<int64_t>& costs) {
  std::vector<int32_t> order(costs.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return costs[a] > costs[b]; });
  return order;
}

// Rows cut into tiles of one ks (a row without keys goes with any).
struct Tiles {
  std::vector<MlaRowTile> tiles;
  std::vector<int32_t> order;

  // `most_rows` a tile, if less than the kernel's own number.
  explicit Tiles(MlaAttentionArgs& args, int64_t most_rows = std::numeric_limits<int64_t>::max()) {
    std::vector<int64_t> costs;
    const bool amx = args.dtype == static_cast<int>(Dtype::bf16) && current_isa() == Isa::amx;
    most_rows = std::min(most_rows, amx ? kMlaForwardRowsAmx : kMlaForwardRows);
    bool has_keys = false;
    for (int64_t row = 0; row < args.num_queries; ++row) {
      const int64_t ks = args.ks[row], ke = args.ke[row];
      const bool keys = ks < ke;
      const bool fits = !tiles.empty() && row - tiles.back().begin < most_rows &&
                        (!keys || !has_keys || tiles.back().ks == ks);
      if (!fits) {
        tiles.push_back({row, row, 0, 0});
        costs.push_back(0);
        has_keys = false;
      }
      MlaRowTile& tile = tiles.back();
      tile.end = row + 1;
      if (!keys) continue;
      tile.ks = ks;
      tile.ke = has_keys ? std::max(tile.ke, ke) : ke;
      has_keys = true;
      costs.back() += ke - ks;
    }
    order = heavy_first(costs);
    args.tiles = tiles.data();
    args.num_tiles = static_cast<int64_t>(tiles.size());
    args.order = order.data();
  }
};

// Rows cut into segments whose key ranges are disjoint, each segment into tiles.
struct Segments {
  std::vector<MlaRowTile> tiles;
  std::vector<MlaSegment> segments;
  std::vector<int32_t> order;

  explicit Segments(MlaAttentionArgs& args) {
    std::vector<MlaRowTile> spans;
    for (int64_t row = 0; row < args.num_queries; ++row) {
      MlaRowTile span{row, row + 1, args.ks[row], args.ke[row]};
      if (span.ks >= span.ke) {
        if (!spans.empty()) spans.back().end = row + 1;
        else spans.push_back({row, row + 1, 0, 0});
        continue;
      }
      while (!spans.empty() && spans.back().ke > span.ks) {
        span = {spans.back().begin, span.end, std::min(spans.back().ks, span.ks), std::max(spans.back().ke, span.ke)};
        spans.pop_back();
      }
      spans.push_back(span);
    }
    std::vector<int64_t> costs;
    for (const MlaRowTile& span : spans) {
      MlaSegment segment{static_cast<int64_t>(tiles.size()), 0, span.ks, span.ke};
      int64_t cost = 0;
      for (int64_t row = span.begin; row < span.end; row += kMlaBackwardRows) {
        MlaRowTile tile{row, std::min(row + kMlaBackwardRows, span.end), span.ke, span.ks};
        for (int64_t r = tile.begin; r < tile.end; ++r)
          if (args.ks[r] < args.ke[r]) {
            tile.ks = std::min<int64_t>(tile.ks, args.ks[r]);
            tile.ke = std::max<int64_t>(tile.ke, args.ke[r]);
          }
        if (tile.ks > tile.ke) tile.ks = tile.ke = span.ks;
        cost += tile.ke - tile.ks + 1;
        tiles.push_back(tile);
      }
      segment.end = static_cast<int64_t>(tiles.size());
      segments.push_back(segment);
      costs.push_back(cost);
    }
    order = heavy_first(costs);
    args.tiles = tiles.data();
    args.num_tiles = static_cast<int64_t>(tiles.size());
    args.segments = segments.data();
    args.num_segments = static_cast<int64_t>(segments.size());
    args.order = order.data();
  }
};

std::tuple<Tensor, Tensor> mla_attention(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& ks_in,
                                         const Tensor& ke_in, double scale) {
  const char* op = "mla_attention";
  const Tensor q = torch::stable::contiguous(q_in), k = torch::stable::contiguous(k_in);
  const Tensor v = torch::stable::contiguous(v_in);
  const Tensor ks = torch::stable::contiguous(ks_in), ke = torch::stable::contiguous(ke_in);
  MlaAttentionArgs args = common_args(op, q, k, ks, ke, scale);
  add_values(op, args, v, q);
  const Tiles tiles(args);
  Tensor out = empty_cpu({args.num_queries, args.heads, args.dv}, q.scalar_type());
  Tensor lse = empty_cpu({args.num_queries, args.heads}, lse_dtype(args));
  args.out = out.mutable_data_ptr();
  args.lse = lse.mutable_data_ptr();
  GLM5_CALL_MLA_KERNEL(mla_attention_forward, args);
  return {out, lse};
}

std::tuple<Tensor, Tensor> mla_attention_paged(const Tensor& q, const Tensor& cache, const Tensor& block_table,
                                               const Tensor& sequence, const Tensor& ks, const Tensor& ke, double scale,
                                               int64_t d_v) {
  return attend_to_paged_ranges(q, cache, block_table, sequence, ks, ke, scale, d_v, [](MlaAttentionArgs& args) {
    // Rows enough for every thread, whole tiles of them.
    const int64_t share = (args.num_queries + num_threads() - 1) / num_threads();
    const Tiles tiles(args, std::max<int64_t>(16, (share + 15) / 16 * 16));
    GLM5_CALL_MLA_KERNEL(mla_attention_forward, args);
  });
}

std::tuple<Tensor, Tensor, Tensor> mla_attention_backward(const Tensor& dout_in, const std::optional<Tensor>& dlse_in,
                                                          const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                                          const Tensor& lse_in, const Tensor& ks_in, const Tensor& ke_in,
                                                          double scale) {
  const char* op = "mla_attention_backward";
  const Tensor q = torch::stable::contiguous(q_in), k = torch::stable::contiguous(k_in);
  const Tensor v = torch::stable::contiguous(v_in), dout = torch::stable::contiguous(dout_in);
  const Tensor ks = torch::stable::contiguous(ks_in), ke = torch::stable::contiguous(ke_in);
  const Tensor lse = torch::stable::contiguous(lse_in);
  std::optional<Tensor> dlse;
  if (dlse_in) dlse = torch::stable::contiguous(*dlse_in);
  MlaAttentionArgs args = common_args(op, q, k, ks, ke, scale);
  add_values(op, args, v, q);
  check_per_head(op, "lse", args, lse);
  if (dlse) check_per_head(op, "dlse", args, *dlse);
  check_cpu(op, "dout", dout);
  check_same_dtype(op, "dout", dout, "q", q);
  check_dim(op, "dout", dout, 3, "[queries, heads, dim]");
  check_size(op, "dout", dout, 0, args.num_queries, "the queries of q");
  check_size(op, "dout", dout, 1, args.heads, "the heads of q");
  check_size(op, "dout", dout, 2, args.dv, "the last dimension of v");
  const Segments segments(args);
  Tensor dq = empty_like_contiguous(q), dk = empty_like_contiguous(k), dv = empty_like_contiguous(v);
  torch::stable::zero_(dk);
  torch::stable::zero_(dv);
  args.lse = const_cast<void*>(lse.const_data_ptr());
  args.dout = dout.const_data_ptr();
  args.dlse = dlse ? dlse->const_data_ptr() : nullptr;
  args.dq = dq.mutable_data_ptr();
  args.dk_out = dk.mutable_data_ptr();
  args.dv_out = dv.mutable_data_ptr();
  GLM5_CALL_MLA_KERNEL(mla_attention_backward, args);
  return {dq, dk, dv};
}

Tensor mla_attn_target(const Tensor& q_in, const Tensor& k_in, const Tensor& lse_in, const Tensor& ks_in,
                       const Tensor& ke_in, double scale) {
  const char* op = "mla_attn_target";
  const Tensor q = torch::stable::contiguous(q_in), k = torch::stable::contiguous(k_in);
  const Tensor ks = torch::stable::contiguous(ks_in), ke = torch::stable::contiguous(ke_in);
  const Tensor lse = torch::stable::contiguous(lse_in);
  MlaAttentionArgs args = common_args(op, q, k, ks, ke, scale);
  check_per_head(op, "lse", args, lse);
  const Tiles tiles(args);
  Tensor target = empty_cpu({args.num_queries, args.num_keys}, lse_dtype(args));
  args.lse = const_cast<void*>(lse.const_data_ptr());
  args.target = target.mutable_data_ptr();
  GLM5_CALL_MLA_KERNEL(mla_attn_target, args);
  return target;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glm5, m) {
  m.def("mla_attention(Tensor q, Tensor k, Tensor v, Tensor ks, Tensor ke, float scale) -> (Tensor out, Tensor lse)");
  m.def(
      "mla_attention_paged(Tensor q, Tensor cache, Tensor block_table, Tensor sequence, Tensor ks, Tensor ke, float scale, "
      "int d_v) -> (Tensor out, Tensor lse)");
  m.def(
      "mla_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor ks, Tensor ke, "
      "float scale) -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def("mla_attn_target(Tensor q, Tensor k, Tensor lse, Tensor ks, Tensor ke, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(glm5, CPU, m) {
  GLM5_IMPL(m, mla_attention);
  GLM5_IMPL(m, mla_attention_paged);
  GLM5_IMPL(m, mla_attention_backward);
  GLM5_IMPL(m, mla_attn_target);
}

}  // namespace glm5
