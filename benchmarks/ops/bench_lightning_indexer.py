"""The lightning indexer against torch's expression of it, its streamed top-k against scores + top-k, and its memory."""

import torch

from benchmarks.harness import Case, MemoryCase
from glm5 import ops

HEADS, DIM, TOPK = 32, 128, 2048
BF16 = torch.bfloat16


def inputs(queries: int, keys: int, dtype=BF16) -> tuple:
    """q, k, k_scale, weights, ks, ke of ``queries`` queries that all see ``keys`` keys."""
    q, k = torch.randn(queries, HEADS, DIM).to(dtype), torch.randn(keys, DIM).to(dtype)
    k_scale = torch.rand(keys) if dtype == torch.float8_e4m3fn else None
    ranges = torch.zeros(queries, dtype=torch.int32), torch.full((queries,), keys, dtype=torch.int32)
    return q, k, k_scale, torch.randn(queries, HEADS), *ranges


def expression(q, k, k_scale, weights, ks, ke):
    """What one writes in torch: matmul, relu, einsum over heads."""
    dots = (q.flatten(0, 1) @ k.T).view(q.shape[0], q.shape[1], -1)
    return torch.einsum("qhk,qh->qk", torch.relu_(dots), weights.to(dots.dtype))


def logits_case(queries: int, keys: int, dtype=BF16, isa: str | None = None, **goals) -> Case:
    arguments = inputs(queries, keys, dtype)
    name = str(dtype).removeprefix("torch.").replace("bfloat16", "bf16")
    return Case(
        f"lightning_indexer_logits {name} {queries} x {keys}, {HEADS} heads x {DIM}",
        lambda: ops.lightning_indexer_logits(*arguments),
        None if isa or dtype == torch.float8_e4m3fn else lambda: expression(*arguments),
        work=2.0 * queries * keys * HEADS * DIM, peak="float32" if dtype == torch.float32 else "bf16", isa=isa, **goals,
    )  # fmt: skip


def topk_case(queries: int, keys: int) -> Case:
    arguments = inputs(queries, keys)
    return Case(
        f"lightning_indexer_topk bf16 {queries} x {keys}, top-{TOPK}",
        lambda: ops.lightning_indexer_topk(*arguments, TOPK),
        lambda: ops.topk_indices(ops.lightning_indexer_logits(*arguments), TOPK, *arguments[4:]),
        peer_name="our logits + top-k", goal_ratio=1 / 1.05, note="lse included",
    )  # fmt: skip


def backward_case(queries: int, keys: int) -> Case:
    q, k, _, weights, ks, ke = inputs(queries, keys)
    grad = torch.randn(queries, keys)
    leaves = [t.clone().requires_grad_() for t in (q, k, weights)]

    def peer():
        scores = expression(leaves[0], leaves[1], None, leaves[2], ks, ke)
        return torch.autograd.grad(scores, leaves, grad.to(scores.dtype))

    return Case(
        f"lightning_indexer_logits backward bf16 {queries} x {keys}",
        lambda: torch.ops.glm5.lightning_indexer_logits_backward(grad, q, k, weights, ks, ke),
        peer, peer_name="torch forward + backward", work=8.0 * queries * keys * HEADS * DIM, peak="bf16",
    )  # fmt: skip


def paged_case(queries: int, keys: int, page: int = 16) -> Case:
    q, k, _, weights, ks, ke = inputs(queries, keys)
    order = torch.randperm(keys // page, generator=torch.Generator().manual_seed(0))
    cache = torch.empty(keys // page, page, k.shape[1], dtype=k.dtype)
    cache[order] = k.view(-1, page, k.shape[1])
    paged = q, weights, cache, order.int()[None], torch.zeros_like(ks), ks, ke, TOPK
    return Case(
        f"lightning_indexer_topk_paged bf16 {queries} x {keys}, pages of {page}",
        lambda: ops.lightning_indexer_topk_paged(*paged),
        lambda: ops.lightning_indexer_topk(q, k, None, weights, ks, ke, TOPK),
        peer_name="lightning_indexer_topk",
    )  # fmt: skip


def cases(quick: bool):
    yield logits_case(256, 8192, goal_ratio=2.0)
    yield logits_case(256, 8192, isa="avx512", goal_share=0.92)
    yield logits_case(1, 32768)
    yield logits_case(256, 8192, dtype=torch.float8_e4m3fn)
    yield topk_case(256, 8192)
    yield paged_case(256, 8192)
    yield backward_case(128, 4096)
    if quick:
        return
    yield logits_case(256, 8192, dtype=torch.float32)
    yield logits_case(64, 8192, dtype=torch.float32, isa="avx2")
    yield topk_case(128, 32768)


def streamed(queries: int, keys: int):
    """One call of the streamed top-k, for the memory measurement."""
    arguments = inputs(queries, keys)
    return lambda: ops.lightning_indexer_topk(*arguments, TOPK)


def memory_cases(quick: bool):
    for queries, keys in ((256, 32768), (256, 131072), (96, 131072)):
        outputs = queries * TOPK * 4
        # Many strips: one for each thread. Few: the threads share one after the other.
        threads = torch.get_num_threads()
        strips = (threads if -(-queries // 32) >= 2 * threads else 1) * (32 + 2) * keys * 4
        yield MemoryCase(
            f"lightning_indexer_topk {queries} x {keys} ([Tq, Tk] would be {queries * keys * 4 >> 20} MiB)",
            "benchmarks.ops.bench_lightning_indexer:streamed", {"queries": queries, "keys": keys},
            limit=outputs + strips + (8 << 20),
        )  # fmt: skip
