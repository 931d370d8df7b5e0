// Log-probabilities of given tokens under the language-model head: the contract between binding and kernels.
//
// With z = (hidden lm_head^T) / temperature, in float32, one row a token:  logp = z[target] - lse,  lse = log sum exp z,
// entropy = lse - sum p z. A row is reduced in blocks of kVocabBlock columns counted from column 0; inside a block lane l
// takes columns l, l + lanes, ...; block results join in order, in double. So the bits depend on the row's logits alone.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace glm5 {

struct TokenLogprobsArgs {
  int dtype;                 // Dtype of hidden, lm_head and their gradients
  int64_t tokens, dim, vocab;
  const void* hidden;        // [tokens, dim]
  const void* lm_head;       // [vocab, dim]
  const int64_t* targets;    // [tokens], in [0, vocab)
  const float* temperature;  // [tokens], > 0
  // float32, or float64 where hidden is:
  void* logp;                // [tokens]                                     forward
  void* entropy;             // [tokens]                                     forward: written; backward: read
  void* lse;                 // [tokens]                                     forward: written; backward: read
  void* partial;  // [min(tokens, kForwardChunk), vocab blocks, 3]  forward: max, sum of e^(z-max), of (z-max) e^
  const void* dlogp;  // [tokens]                                     backward
  const void* dentropy;  // [tokens]                                     backward
  void* dhidden;  // [tokens, dim] or null                        backward
  void* dlm_head;  // [vocab, dim] or null                         backward
  void* dlogits;  // [min(tokens, kTokenChunk), min(vocab, kVocabChunk)] of dtype    backward
  void* dhidden_sum;  // [tokens, dim] float32 where dtype is bf16, else dhidden         backward
  void* dlm_head_sum;  // [min(vocab, kVocabChunk), dim] float32 where dtype is bf16      backward
};

inline constexpr int64_t kVocabBlock = 256;
inline constexpr int64_t kTokenBlock = 240;
// Forward keeps the blocks' results of this many tokens at a time: lm_head is read again for the next ones.
inline constexpr int64_t kForwardChunk = 8 * kTokenBlock;
// Backward forms the gradient of this many logits at a time.
inline constexpr int64_t kTokenChunk = 960, kVocabChunk = 2048;

}  // namespace glm5

GLM5_DECLARE_KERNEL(void token_logprobs_forward(const TokenLogprobsArgs& args);
                    void token_logprobs_backward(const TokenLogprobsArgs& args))
