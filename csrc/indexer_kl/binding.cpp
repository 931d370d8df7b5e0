// Schemas, argument checks and dispatch of the indexer_kl family.
#include "indexer_kl/indexer_kl.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "common/checks.h"

namespace glm5 {
namespace {

constexpr int64_t kSelectedTileRows = 8;

// Contiguous inputs, checked; `args` points into them.
struct KlInputs {
  const char* op;
  std::vector<Tensor> kept;
  std::vector<KlTile> tiles;
  std::vector<int32_t> order;
  ScalarType real;
  LightningIndexerKlArgs args{};

  const Tensor& keep(const char* name, const Tensor& t, int64_t dim, const char* layout) {
    kept.push_back(torch::stable::contiguous(t));
    check_cpu(op, name, kept.back());
    check_dim(op, name, kept.back(), dim, layout);
    return kept.back();
  }

  KlInputs(const char* op_name, const Tensor& q_in, const Tensor& k_in, const Tensor& weights_in, const Tensor& ks_in,
           const Tensor& ke_in, const Tensor& attn_q_in, const Tensor& attn_k_in, const Tensor& attn_lse_in, double scale,
           const std::optional<Tensor>& indices_in)
      : op(op_name) {
    kept.reserve(12);
    const Tensor& q = keep("q", q_in, 3, "[queries, heads, dim]");
    const Tensor& k = keep("k", k_in, 2, "[keys, dim]");
    const Tensor& weights = keep("weights", weights_in, 2, "[queries, heads]");
    const Tensor& attn_q = keep("attn_q", attn_q_in, 3, "[queries, attention heads, dim]");
    const Tensor& attn_k = indices_in ? keep("attn_k", attn_k_in, 2, "[keys, dim] (latent rows, with indices)")
                                      : keep("attn_k", attn_k_in, 3, "[keys, attention heads, dim]");
    const Tensor& attn_lse = keep("attn_lse", attn_lse_in, 2, "[queries, attention heads]");
    args.dtype = static_cast<int>(float_dtype(op, "q", q));
    real = args.dtype == static_cast<int>(Dtype::float64) ? ScalarType::Double : ScalarType::Float;
    check_same_dtype(op, "k", k, "q", q);
    check_same_dtype(op, "attn_q", attn_q, "q", q);
    check_same_dtype(op, "attn_k", attn_k, "q", q);
    check_dtype(op, "weights", weights, {real});
    check_dtype(op, "attn_lse", attn_lse, {real});
    args.num_queries = q.size(0);
    args.num_keys = k.size(0);
    args.heads = q.size(1);
    args.dim = q.size(2);
    args.attn_heads = attn_q.size(1);
    args.attn_dim = attn_q.size(2);
    args.scale = scale;
    if (!std::isfinite(scale)) fail(op, ": scale is ", scale, ", want a finite number");
    if (args.heads < 1 || args.dim < 1) fail(op, ": q has shape ", shape_of(q), ", want at least one head and dimension");
    if (args.attn_heads < 1 || args.attn_dim < 1)
      fail(op, ": attn_q has shape ", shape_of(attn_q), ", want at least one head and dimension");
    if (args.num_keys > std::numeric_limits<int32_t>::max())
      fail(op, ": k has shape ", shape_of(k), ", want at most 2^31 - 1 keys");
    check_size(op, "k", k, 1, args.dim, "the last dimension of q");
    check_size(op, "weights", weights, 0, args.num_queries, "the queries of q");
    check_size(op, "weights", weights, 1, args.heads, "the heads of q");
    check_size(op, "attn_q", attn_q, 0, args.num_queries, "the queries of q");
    check_size(op, "attn_k", attn_k, 0, args.num_keys, "the keys of k");
    if (!indices_in) check_size(op, "attn_k", attn_k, 1, args.attn_heads, "the heads of attn_q");
    check_size(op, "attn_k", attn_k, attn_k.dim() - 1, args.attn_dim, "the last dimension of attn_q");
    check_size(op, "attn_lse", attn_lse, 0, args.num_queries, "the queries of q");
    check_size(op, "attn_lse", attn_lse, 1, args.attn_heads, "the heads of attn_q");
    args.q = q.const_data_ptr();
    args.k = k.const_data_ptr();
    args.weights = weights.const_data_ptr();
    args.attn_q = attn_q.const_data_ptr();
    args.attn_k = attn_k.const_data_ptr();
    args.attn_lse = attn_lse.const_data_ptr();
    set_ranges(ks_in, ke_in);
    if (indices_in) set_indices(*indices_in);
    cut();
  }

  void set_ranges(const Tensor& ks_in, const Tensor& ke_in) {
    const Tensor& ks = keep("ks", ks_in, 1, "[queries]");
    const Tensor& ke = keep("ke", ke_in, 1, "[queries]");
    check_dtype(op, "ks", ks, {ScalarType::Int});
    check_dtype(op, "ke", ke, {ScalarType::Int});
    check_size(op, "ks", ks, 0, args.num_queries, "the queries of q");
    check_size(op, "ke", ke, 0, args.num_queries, "the queries of q");
    args.ks = static_cast<const int32_t*>(ks.const_data_ptr());
    args.ke = static_cast<const int32_t*>(ke.const_data_ptr());
    for (int64_t t = 0; t < args.num_queries; ++t) {
      if (args.ks[t] < 0) fail(op, ": ks is ", args.ks[t], " for query ", t, ", want a number >= 0");
      if (args.ke[t] > args.num_keys)
        fail(op, ": ke is ", args.ke[t], " for query ", t, ", want at most the ", args.num_keys, " keys of k");
    }
  }

  void set_indices(const Tensor& indices_in) {
    const Tensor& indices = keep("indices", indices_in, 2, "[queries, topk]");
    check_dtype(op, "indices", indices, {ScalarType::Int});
    check_size(op, "indices", indices, 0, args.num_queries, "the queries of q");
    args.topk = indices.size(1);
    args.indices = static_cast<const int32_t*>(indices.const_data_ptr());
    for (int64_t t = 0; t < args.num_queries; ++t) {
      const int32_t* row = args.indices + t * args.topk;
      for (int64_t i = 0; i < args.topk; ++i) {
        if (row[i] == -1) {
          for (int64_t j = i + 1; j < args.topk; ++j)
            if (row[j] != -1) fail(op, ": indices holds ", row[j], " after -1 for query ", t, ", want -1 at the end alone");
          break;
        }
        if (row[i] < args.ks[t] || row[i] >= args.ke[t])
          fail(op, ": indices holds ", row[i], " for query ", t, ", want -1 or a key in its range [", args.ks[t], ", ",
               args.ke[t], ")");
        if (i > 0 && row[i] <= row[i - 1])
          fail(op, ": indices holds ", row[i], " after ", row[i - 1], " for query ", t, ", want ascending keys");
      }
    }
  }

  // Tiles of neighbouring queries with one ks (a query without keys goes with any), and an order that starts the
  // costliest first.
  void cut() {
    const int64_t max_rows = args.indices ? kSelectedTileRows : kKlTileRows;
    std::vector<int64_t> costs;
    for (int64_t t = 0; t < args.num_queries; ++t) {
      const bool has_keys = args.ks[t] < args.ke[t];
      const bool fits = !tiles.empty() && t - tiles.back().begin < max_rows &&
                        (args.indices || !has_keys || costs.back() == 0 || tiles.back().ks == args.ks[t]);
      if (!fits) {
        tiles.push_back({t, t, 0, 0});
        costs.push_back(0);
      }
      KlTile& tile = tiles.back();
      tile.end = t + 1;
      if (!has_keys) continue;
      tile.ke = costs.back() ? std::max<int64_t>(tile.ke, args.ke[t]) : args.ke[t];
      tile.ks = args.ks[t];
      costs.back() += args.ke[t] - args.ks[t];
    }
    order.resize(tiles.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return costs[a] > costs[b]; });
    args.tiles = tiles.data();
    args.order = order.data();
    args.num_tiles = static_cast<int64_t>(tiles.size());
    const int64_t part_bytes = std::max<int64_t>(args.num_keys * args.dim * (is_float64() ? 8 : 4), 1);
    args.num_parts = std::min({args.num_tiles, kKlParts, std::max(kKlPartsBytes / part_bytes, kKlFewestParts)});
  }

  bool is_float64() const { return args.dtype == static_cast<int>(Dtype::float64); }
};

std::tuple<Tensor, Tensor, Tensor> lightning_indexer_kl(const Tensor& q, const Tensor& k, const Tensor& weights,
                                                        const Tensor& ks, const Tensor& ke, const Tensor& attn_q,
                                                        const Tensor& attn_k, const Tensor& attn_lse, double scale,
                                                        std::optional<Tensor> indices) {
  KlInputs in("lightning_indexer_kl", q, k, weights, ks, ke, attn_q, attn_k, attn_lse, scale, indices);
  Tensor kl = empty_cpu({in.args.num_queries}, in.real);
  Tensor stats = empty_cpu({in.args.num_queries, 2}, ScalarType::Double);
  Tensor mass = empty_cpu({in.args.num_queries, in.args.topk}, in.real);
  in.args.kl = kl.mutable_data_ptr();
  in.args.stats = static_cast<double*>(stats.mutable_data_ptr());
  in.args.mass = mass.mutable_data_ptr();
  GLM5_CALL_KERNEL(in.is_float64(), lightning_indexer_kl_forward, in.args);
  return {kl, stats, mass};
}

std::tuple<Tensor, Tensor, Tensor> lightning_indexer_kl_backward(const Tensor& dkl_in, const Tensor& stats_in,
                                                                 const Tensor& mass_in, const Tensor& q, const Tensor& k,
                                                                 const Tensor& weights, const Tensor& ks, const Tensor& ke,
                                                                 const Tensor& attn_q, const Tensor& attn_k,
                                                                 const Tensor& attn_lse, double scale,
                                                                 std::optional<Tensor> indices) {
  const char* op = "lightning_indexer_kl_backward";
  KlInputs in(op, q, k, weights, ks, ke, attn_q, attn_k, attn_lse, scale, indices);
  const Tensor dkl = in.keep("dkl", dkl_in, 1, "[queries]");
  const Tensor stats = in.keep("stats", stats_in, 2, "[queries, 2]");
  const Tensor mass = in.keep("mass", mass_in, 2, "[queries, topk]");
  check_dtype(op, "dkl", dkl, {in.real});
  check_size(op, "dkl", dkl, 0, in.args.num_queries, "the queries of q");
  check_dtype(op, "stats", stats, {ScalarType::Double});
  check_size(op, "stats", stats, 0, in.args.num_queries, "the queries of q");
  check_size(op, "stats", stats, 1, 2, "mass and lse");
  check_dtype(op, "mass", mass, {in.real});
  check_size(op, "mass", mass, 0, in.args.num_queries, "the queries of q");
  check_size(op, "mass", mass, 1, in.args.topk, "the columns of indices");
  Tensor dq = empty_cpu({in.args.num_queries, in.args.heads, in.args.dim}, q.scalar_type());
  Tensor dk = empty_cpu({in.args.num_keys, in.args.dim}, q.scalar_type());
  Tensor dweights = empty_cpu({in.args.num_queries, in.args.heads}, in.real);
  Tensor parts = empty_cpu({in.args.num_parts, in.args.num_keys, in.args.dim}, in.real);
  in.args.dkl = dkl.const_data_ptr();
  in.args.stats = static_cast<double*>(const_cast<void*>(stats.const_data_ptr()));
  in.args.mass = const_cast<void*>(mass.const_data_ptr());
  in.args.dq = dq.mutable_data_ptr();
  in.args.dk = dk.mutable_data_ptr();
  in.args.dweights = dweights.mutable_data_ptr();
  in.args.dk_parts = parts.mutable_data_ptr();
  GLM5_CALL_KERNEL(in.is_float64(), lightning_indexer_kl_backward, in.args);
  return {dq, dk, dweights};
}

// Contiguous inputs of indexer_kl_loss, checked.
struct LossInputs {
  Tensor logits, target;
  std::optional<Tensor> indices;
  IndexerKlLossArgs args{};

  LossInputs(const char* op, const Tensor& logits_in, const Tensor& target_in, const std::optional<Tensor>& indices_in)
      : logits(torch::stable::contiguous(logits_in)), target(torch::stable::contiguous(target_in)) {
    check_cpu(op, "logits", logits);
    check_cpu(op, "target", target);
    check_dtype(op, "logits", logits, {ScalarType::Float, ScalarType::Double});
    check_same_dtype(op, "target", target, "logits", logits);
    check_dim(op, "logits", logits, 2, "[queries, keys]");
    check_dim(op, "target", target, 2, "[queries, keys], or [queries, topk] with indices");
    check_size(op, "target", target, 0, logits.size(0), "the queries of logits");
    args.is_float64 = logits.scalar_type() == ScalarType::Double;
    args.rows = logits.size(0);
    args.columns = args.topk = logits.size(1);
    if (indices_in) {
      indices = torch::stable::contiguous(*indices_in);
      check_cpu(op, "indices", *indices);
      check_dtype(op, "indices", *indices, {ScalarType::Int});
      check_dim(op, "indices", *indices, 2, "[queries, topk]");
      check_size(op, "indices", *indices, 0, args.rows, "the queries of logits");
      args.topk = indices->size(1);
      args.indices = static_cast<const int32_t*>(indices->const_data_ptr());
      for (int64_t i = 0; i < indices->numel(); ++i)
        if (args.indices[i] < -1 || args.indices[i] >= args.columns)
          fail(op, ": indices holds ", args.indices[i], " for query ", i / args.topk, ", want -1 or a key in [0, ",
               args.columns, ")");
    }
    check_size(op, "target", target, 1, args.topk, indices_in ? "the columns of indices" : "the keys of logits");
    args.logits = logits.const_data_ptr();
    args.target = target.const_data_ptr();
  }
};

Tensor indexer_kl_loss(const Tensor& logits, const Tensor& target, std::optional<Tensor> indices) {
  LossInputs in("indexer_kl_loss", logits, target, indices);
  Tensor kl = empty_cpu({in.args.rows}, logits.scalar_type());
  in.args.kl = kl.mutable_data_ptr();
  GLM5_CALL_KERNEL(in.args.is_float64, indexer_kl_loss_forward, in.args);
  return kl;
}

Tensor indexer_kl_loss_backward(const Tensor& dkl_in, const Tensor& logits, const Tensor& target,
                                std::optional<Tensor> indices) {
  const char* op = "indexer_kl_loss_backward";
  LossInputs in(op, logits, target, indices);
  const Tensor dkl = torch::stable::contiguous(dkl_in);
  check_cpu(op, "dkl", dkl);
  check_same_dtype(op, "dkl", dkl, "logits", in.logits);
  check_dim(op, "dkl", dkl, 1, "[queries]");
  check_size(op, "dkl", dkl, 0, in.args.rows, "the queries of logits");
  Tensor dlogits = empty_like_contiguous(in.logits);
  in.args.dkl = dkl.const_data_ptr();
  in.args.dlogits = dlogits.mutable_data_ptr();
  GLM5_CALL_KERNEL(in.args.is_float64, indexer_kl_loss_backward, in.args);
  return dlogits;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glm5, m) {
  m.def(
      "lightning_indexer_kl(Tensor q, Tensor k, Tensor weights, Tensor ks, Tensor ke, Tensor attn_q, Tensor attn_k, "
      "Tensor attn_lse, float scale, Tensor? indices=None) -> (Tensor kl, Tensor stats, Tensor mass)");
  m.def(
      "lightning_indexer_kl_backward(Tensor dkl, Tensor stats, Tensor mass, Tensor q, Tensor k, Tensor weights, "
      "Tensor ks, Tensor ke, Tensor attn_q, Tensor attn_k, Tensor attn_lse, float scale, Tensor? indices) -> "
      "(Tensor dq, Tensor dk, Tensor dweights)");
  m.def("indexer_kl_loss(Tensor logits, Tensor target, Tensor? indices=None) -> Tensor");
  m.def("indexer_kl_loss_backward(Tensor dkl, Tensor logits, Tensor target, Tensor? indices) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(glm5, CPU, m) {
  GLM5_IMPL(m, lightning_indexer_kl);
  GLM5_IMPL(m, lightning_indexer_kl_backward);
  GLM5_IMPL(m, indexer_kl_loss);
  GLM5_IMPL(m, indexer_kl_loss_backward);
}

}  // namespace glm5
