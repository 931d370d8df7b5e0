// Schemas, argument checks and dispatch of token_logprobs.
#include "token_logprobs/token_logprobs.h"

#include <cmath>
#include <optional>
#include <tuple>

#include "common/checks.h"

namespace glm5 {
namespace {

TokenLogprobsArgs check_arguments(const char* op, const Tensor& hidden, const Tensor& lm_head, const Tensor& targets,
                                  const Tensor& temperature) {
  check_cpu(op, "hidden", hidden);
  check_cpu(op, "lm_head", lm_head);
  check_cpu(op, "targets", targets);
  check_cpu(op, "temperature", temperature);
  TokenLogprobsArgs args{};
  args.dtype = static_cast<int>(float_dtype(op, "hidden", hidden));
  check_same_dtype(op, "lm_head", lm_head, "hidden", hidden);
  check_dtype(op, "targets", targets, {ScalarType::Long});
  check_dtype(op, "temperature", temperature, {ScalarType::Float});
  check_dim(op, "hidden", hidden, 2, "[T, D]");
  check_dim(op, "lm_head", lm_head, 2, "[V, D]");
  check_dim(op, "targets", targets, 1, "[T]");
  check_dim(op, "temperature", temperature, 1, "[T]");
  check_size(op, "lm_head", lm_head, 1, hidden.size(1), "the last dimension of hidden");
  check_size(op, "targets", targets, 0, hidden.size(0), "the first dimension of hidden");
  check_size(op, "temperature", temperature, 0, hidden.size(0), "the first dimension of hidden");
  if (lm_head.size(0) < 1) fail(op, ": lm_head has shape ", shape_of(lm_head), ", want at least one row");
  args.tokens = hidden.size(0);
  args.dim = hidden.size(1);
  args.vocab = lm_head.size(0);
  args.hidden = hidden.const_data_ptr();
  args.lm_head = lm_head.const_data_ptr();
  args.targets = static_cast<const int64_t*>(targets.const_data_ptr());
  args.temperature = static_cast<const float*>(temperature.const_data_ptr());
  for (int64_t t = 0; t < args.tokens; ++t) {
    if (args.targets[t] < 0 || args.targets[t] >= args.vocab)
      fail(op, ": targets[", t, "] is ", args.targets[t], ", want a number in [0, ", args.vocab, ")");
    if (!(args.temperature[t] > 0) || std::isinf(args.temperature[t]))
      fail(op, ": temperature[", t, "] is ", args.temperature[t], ", want a finite number > 0");
  }
  return args;
}

ScalarType accumulator(int dtype) { return dtype == 2 ? ScalarType::Double : ScalarType::Float; }

std::tuple<Tensor, Tensor, Tensor> token_logprobs(const Tensor& hidden_in, const Tensor& lm_head_in,
                                                  const Tensor& targets_in, const Tensor& temperature_in) {
  const Tensor hidden = torch::stable::contiguous(hidden_in), lm_head = torch::stable::contiguous(lm_head_in);
  const Tensor targets = torch::stable::contiguous(targets_in), temperature = torch::stable::contiguous(temperature_in);
  TokenLogprobsArgs args = check_arguments("token_logprobs", hidden, lm_head, targets, temperature);
  const ScalarType type = accumulator(args.dtype);
  Tensor logp = empty_cpu({args.tokens}, type), entropy = empty_cpu({args.tokens}, type);
  Tensor lse = empty_cpu({args.tokens}, type);
  const int64_t chunk = args.tokens < kForwardChunk ? args.tokens : kForwardChunk;
  Tensor partial = empty_cpu({chunk, (args.vocab + kVocabBlock - 1) / kVocabBlock, 3}, type);
  args.logp = logp.mutable_data_ptr();
  args.entropy = entropy.mutable_data_ptr();
  args.lse = lse.mutable_data_ptr();
  args.partial = partial.mutable_data_ptr();
  GLM5_CALL_KERNEL(args.dtype == 2, token_logprobs_forward, args);
  return {logp, entropy, lse};
}

std::tuple<Tensor, Tensor> token_logprobs_backward(const Tensor& dlogp_in, const Tensor& dentropy_in,
                                                   const Tensor& hidden_in, const Tensor& lm_head_in,
                                                   const Tensor& targets_in, const Tensor& temperature_in,
                                                   const Tensor& entropy_in, const Tensor& lse_in, bool need_hidden,
                                                   bool need_lm_head) {
  const char* op = "token_logprobs_backward";
  const Tensor hidden = torch::stable::contiguous(hidden_in), lm_head = torch::stable::contiguous(lm_head_in);
  const Tensor targets = torch::stable::contiguous(targets_in), temperature = torch::stable::contiguous(temperature_in);
  const Tensor dlogp = torch::stable::contiguous(dlogp_in), dentropy = torch::stable::contiguous(dentropy_in);
  const Tensor entropy = torch::stable::contiguous(entropy_in), lse = torch::stable::contiguous(lse_in);
  TokenLogprobsArgs args = check_arguments(op, hidden, lm_head, targets, temperature);
  const ScalarType type = accumulator(args.dtype);
  const auto check_row_values = [&](const char* name, const Tensor& t) {
    check_cpu(op, name, t);
    check_dtype(op, name, t, {type});
    check_dim(op, name, t, 1, "[T]");
    check_size(op, name, t, 0, args.tokens, "the first dimension of hidden");
  };
  check_row_values("dlogp", dlogp);
  check_row_values("dentropy", dentropy);
  check_row_values("entropy", entropy);
  check_row_values("lse", lse);
  const int64_t tokens = args.tokens < kTokenChunk ? args.tokens : kTokenChunk;
  const int64_t vocab = args.vocab < kVocabChunk ? args.vocab : kVocabChunk;
  const ScalarType own = hidden.scalar_type();
  Tensor dhidden = empty_cpu({need_hidden ? args.tokens : 0, args.dim}, own);
  Tensor dlm_head = empty_cpu({need_lm_head ? args.vocab : 0, args.dim}, own);
  Tensor dlogits = empty_cpu({tokens, vocab}, own);
  const bool narrow = args.dtype == 0;
  Tensor dhidden_sum = narrow && need_hidden ? empty_cpu({args.tokens, args.dim}, type) : dhidden;
  Tensor dlm_head_sum = empty_cpu({narrow && need_lm_head ? vocab : 0, args.dim}, type);
  args.entropy = entropy.mutable_data_ptr();
  args.lse = lse.mutable_data_ptr();
  args.dlogp = dlogp.const_data_ptr();
  args.dentropy = dentropy.const_data_ptr();
  args.dhidden = need_hidden ? dhidden.mutable_data_ptr() : nullptr;
  args.dlm_head = need_lm_head ? dlm_head.mutable_data_ptr() : nullptr;
  args.dlogits = dlogits.mutable_data_ptr();
  args.dhidden_sum = dhidden_sum.mutable_data_ptr();
  args.dlm_head_sum = dlm_head_sum.mutable_data_ptr();
  if (args.tokens == 0) {
    torch::stable::zero_(dlm_head);
    return {dhidden, dlm_head};
  }
  GLM5_CALL_KERNEL(args.dtype == 2, token_logprobs_backward, args);
  return {dhidden, dlm_head};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(glm5, m) {
  m.def(
      "token_logprobs(Tensor hidden, Tensor lm_head, Tensor targets, Tensor temperature) "
      "-> (Tensor logp, Tensor entropy, Tensor lse)");
  m.def(
      "token_logprobs_backward(Tensor dlogp, Tensor dentropy, Tensor hidden, Tensor lm_head, Tensor targets, "
      "Tensor temperature, Tensor entropy, Tensor lse, bool need_hidden, bool need_lm_head) "
      "-> (Tensor dhidden, Tensor dlm_head)");
}

STABLE_TORCH_LIBRARY_IMPL(glm5, CPU, m) {
  GLM5_IMPL(m, token_logprobs);
  GLM5_IMPL(m, token_logprobs_backward);
}

}  // namespace glm5
