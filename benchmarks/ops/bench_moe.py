"""moe_router, moe_permute and moe_unpermute against torch expressions. Work is the bytes that must move."""

import torch

from benchmarks.harness import Case
from glm5 import ops

bf16 = torch.bfloat16


def torch_router(logits, bias, topk, scaling):
    """Sigmoid, top-k of the biased scores, normalised weights."""
    scores = logits.sigmoid()
    ids = (scores + bias).topk(topk, -1, sorted=False).indices
    weights = scores.gather(1, ids)
    return weights / weights.sum(-1, keepdim=True) * scaling, ids


def torch_permute(x, ids, num_experts):
    """A stable sort and a gather."""
    order = ids.flatten().sort(stable=True).indices
    ends = torch.bincount(ids.flatten(), minlength=num_experts).cumsum(0)
    return x[order // ids.shape[1]], order, ends


def torch_unpermute(y, slot_of_row, weights):
    """A gather and a weighted sum."""
    return (y[slot_of_row.long()] * weights[..., None]).sum(1).to(y.dtype)


def cases(quick: bool):
    """GLM-5's 256 experts with 8 chosen, and the tiny model's 8 with 2."""
    for tokens, experts, topk, dim in ((2048, 256, 8, 6144), (2048, 8, 2, 128))[-1 if quick else 0 :]:
        logits, bias = torch.randn(tokens, experts), torch.randn(experts) * 0.1
        sizes = f"{tokens} tokens to {topk} of {experts}"
        yield Case(
            f"moe_router {sizes}", lambda a=(logits, bias, topk): ops.moe_router(*a, scaling=2.5),
            lambda a=(logits, bias, topk): torch_router(*a, 2.5), work=4.0 * logits.numel(), peak="read",
        )  # fmt: skip
        x = torch.randn(tokens, dim).to(bf16)
        weights, ids = ops.moe_router(logits, bias, topk)
        y, _, slots, _ = ops.moe_permute(x, ids, experts)
        yield Case(
            f"moe_permute bf16 {sizes}, dim {dim}", lambda a=(x, ids, experts): ops.moe_permute(*a),
            lambda a=(x, ids, experts): torch_permute(*a), work=2.0 * (x.numel() + y.numel()), peak="read",
        )  # fmt: skip
        yield Case(
            f"moe_unpermute bf16 {sizes}, dim {dim}", lambda a=(y, slots, weights): ops.moe_unpermute(*a),
            lambda a=(y, slots, weights): torch_unpermute(*a), work=2.0 * (x.numel() + y.numel()), peak="read",
        )  # fmt: skip
        leaves = [y.clone().requires_grad_(), weights.clone().requires_grad_()]
        yield Case(
            f"moe_unpermute + backward bf16 {sizes}, dim {dim}",
            lambda a=leaves, s=slots, d=x: torch.autograd.grad(ops.moe_unpermute(a[0], s, a[1]), a, d),
            lambda a=leaves, s=slots, d=x: torch.autograd.grad(torch_unpermute(a[0], s, a[1]), a, d),
            work=2.0 * (2 * x.numel() + 3 * y.numel()), peak="read",
        )  # fmt: skip
