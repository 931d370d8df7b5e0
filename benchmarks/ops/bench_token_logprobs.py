"""token_logprobs against torch's projection + log_softmax, and its working memory."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Case, MemoryCase
from glm5 import ops

bf16 = torch.bfloat16


def inputs(tokens: int, dim: int, vocab: int, grad: bool = False):
    hidden, head = torch.empty(tokens, dim, dtype=bf16).normal_(), torch.empty(vocab, dim, dtype=bf16).normal_(std=dim**-0.5)
    hidden.requires_grad_(grad), head.requires_grad_(grad)
    return hidden, head, torch.randint(0, vocab, (tokens,)), torch.ones(tokens)


def peer(hidden, head, targets, temperature):
    logp = torch.log_softmax(F.linear(hidden, head).float() / temperature[:, None], -1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def forward_case(tokens: int, dim: int, vocab: int) -> Case:
    arguments = inputs(tokens, dim, vocab)
    return Case(
        f"token_logprobs bf16 T={tokens} D={dim} V={vocab}", lambda: ops.token_logprobs(*arguments),
        lambda: peer(*arguments), work=2.0 * tokens * dim * vocab, peak="bf16",
    )  # fmt: skip


def training_case(tokens: int, dim: int, vocab: int) -> Case:
    arguments = inputs(tokens, dim, vocab, grad=True)

    def step(function):
        logp, entropy = function(*arguments)
        return torch.autograd.grad((logp.sum() + 0.1 * entropy.sum()), arguments[:2])

    return Case(
        f"token_logprobs forward + backward bf16 T={tokens} D={dim} V={vocab}", lambda: step(ops.token_logprobs),
        lambda: step(peer), work=8.0 * tokens * dim * vocab, peer_work=6.0 * tokens * dim * vocab, peak="bf16",
        note="ours computes the logits twice",
    )  # fmt: skip


def memory(tokens: int, dim: int, vocab: int, backward: bool):
    arguments = inputs(tokens, dim, vocab, grad=backward)

    def work():
        logp, entropy = ops.token_logprobs(*arguments)
        return torch.autograd.grad(logp.sum() + entropy.sum(), arguments[:2]) if backward else logp

    return work


def cases(quick: bool):
    yield forward_case(1024, 512, 4096)
    yield training_case(1024, 512, 4096)
    if not quick:
        yield forward_case(512, 1024, 32768)


def memory_cases(quick: bool):
    """At GLM-5's sizes the forward alone: the backward there takes four times as long, and gives the gradients of 2 GB of
    weights. It promises them, the float32 sum of hidden's gradient, and no more than the forward."""
    here = "benchmarks.ops.bench_token_logprobs:memory"
    large = {"tokens": 8192, "dim": 6144, "vocab": 154880}
    small = {"tokens": 4096, "dim": 512, "vocab": 32768}
    if not quick:
        yield MemoryCase("token_logprobs bf16 T=8192 D=6144 V=154880", here, {**large, "backward": False}, limit=64e6)
    yield MemoryCase("token_logprobs bf16 T=4096 D=512 V=32768", here, {**small, "backward": False}, limit=64e6)
    gradients = small["dim"] * (6 * small["tokens"] + 2 * small["vocab"])
    name = "token_logprobs backward bf16 T=4096 D=512 V=32768, its gradients included"
    yield MemoryCase(name, here, {**small, "backward": True}, limit=gradients + 64e6)
