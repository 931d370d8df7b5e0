// Argument checks that the bindings of all indexer ops share.
#pragma once

#include <optional>
#include <vector>

#include "common/checks.h"
#include "lightning_indexer/lightning_indexer.h"

namespace glm5 {

// Contiguous inputs, checked; `args` points into them.
struct LightningIndexerInputs {
  Tensor q, k, weights;
  std::vector<Tensor> rest;
  LightningIndexerArgs args{};
  bool is_float64 = false;

  LightningIndexerInputs(const char* op, const Tensor& q_in, const Tensor& k_in, const Tensor& weights_in,
                         std::initializer_list<ScalarType> dtypes)
      : q(as_contiguous(q_in)), k(as_contiguous(k_in)), weights(as_contiguous(weights_in)) {
    check_cpu(op, "q", q);
    check_cpu(op, "k", k);
    check_cpu(op, "weights", weights);
    check_dim(op, "q", q, 3, "[queries, heads, dim]");
    check_dim(op, "k", k, 2, "[keys, dim]");
    check_dim(op, "weights", weights, 2, "[queries, heads]");
    check_dtype(op, "q", q, dtypes);
    if (q.scalar_type() == ScalarType::Float8_e4m3fn) args.dtype = kE4m3;
    else if (q.scalar_type() == ScalarType::Char) args.dtype = kInt8;
    else args.dtype = static_cast<int>(float_dtype(op, "q", q));
    is_float64 = args.dtype == static_cast<int>(Dtype::float64);
    check_same_dtype(op, "k", k, "q", q);
    check_dtype(op, "weights", weights, {real()});
    check_size(op, "k", k, 1, q.size(2), "the last dimension of q");
    check_size(op, "weights", weights, 0, q.size(0), "the queries of q");
    check_size(op, "weights", weights, 1, q.size(1), "the heads of q");
    if (k.size(0) > std::numeric_limits<int32_t>::max())
      fail(op, ": k has shape ", shape_of(k), ", want at most 2^31 - 1 keys");
    args.num_queries = q.size(0);
    args.num_heads = q.size(1);
    args.dim = q.size(2);
    args.num_keys = k.size(0);
    args.q = q.const_data_ptr();
    args.k = k.const_data_ptr();
    args.weights = weights.const_data_ptr();
  }

  ScalarType real() const { return is_float64 ? ScalarType::Double : ScalarType::Float; }

  const Tensor& keep(const Tensor& t) {
    rest.push_back(as_contiguous(t));
    return rest.back();
  }

  const int32_t* int_row(const char* op, const char* name, const Tensor& t_in) {
    const Tensor& t = keep(t_in);
    check_cpu(op, name, t);
    check_dtype(op, name, t, {ScalarType::Int});
    check_dim(op, name, t, 1, "[queries]");
    check_size(op, name, t, 0, args.num_queries, "the queries of q");
    return t.const_data_ptr<int32_t>();
  }

  void set_ranges(const char* op, const Tensor& ks, const Tensor& ke) {
    args.ks = int_row(op, "ks", ks);
    args.ke = int_row(op, "ke", ke);
    for (int64_t t = 0; t < args.num_queries; ++t) {
      if (args.ks[t] < 0) fail(op, ": ks is ", args.ks[t], " for query ", t, ", want a number >= 0");
      if (args.ke[t] > args.num_keys)
        fail(op, ": ke is ", args.ke[t], " for query ", t, ", want at most the ", args.num_keys, " keys of k");
    }
  }

  void set_k_scale(const char* op, const std::optional<Tensor>& k_scale_in) {
    if (!k_scale_in) return;
    const Tensor& k_scale = keep(*k_scale_in);
    check_cpu(op, "k_scale", k_scale);
    if (args.dtype != kE4m3 && args.dtype != kInt8)
      fail(op, ": k_scale is given with k of dtype ", torch::headeronly::toString(k.scalar_type()),
           ", want None unless k is Float8_e4m3fn");
    check_dtype(op, "k_scale", k_scale, {ScalarType::Float});
    check_dim(op, "k_scale", k_scale, 1, "[keys]");
    check_size(op, "k_scale", k_scale, 0, args.num_keys, "the keys of k");
    args.k_scale = k_scale.const_data_ptr<float>();
  }

  void set_indices(const char* op, const Tensor& indices_in) {
    const Tensor& indices = keep(indices_in);
    check_cpu(op, "indices", indices);
    check_dtype(op, "indices", indices, {ScalarType::Int});
    check_dim(op, "indices", indices, 2, "[queries, topk]");
    check_size(op, "indices", indices, 0, args.num_queries, "the queries of q");
    args.topk = indices.size(1);
    args.indices = indices.const_data_ptr<int32_t>();
    for (int64_t t = 0; t < args.num_queries; ++t) {
      const int32_t* row = args.indices + t * args.topk;
      for (int64_t i = 0; i < args.topk; ++i) {
        if (row[i] < -1 || row[i] >= args.num_keys)
          fail(op, ": indices holds ", row[i], " for query ", t, ", want -1 or a key in [0, ", args.num_keys, ")");
        if (i > 0 && row[i] >= 0 && row[i] <= row[i - 1])
          fail(op, ": indices holds ", row[i], " after ", row[i - 1], " for query ", t, ", want ascending keys");
        if (i > 0 && row[i] >= 0 && row[i - 1] < 0)
          fail(op, ": indices holds ", row[i], " after -1 for query ", t, ", want -1 at the end alone");
      }
    }
  }
};

}  // namespace glm5
