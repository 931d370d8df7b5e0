"""moe_router, moe_permute, moe_unpermute and moe_dispatch_layout against torch. Work is the bytes that must move.

Outputs are new tensors on both sides, as a model's are: from 32 MiB on the system has to put their pages in place each time.
"""

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


def torch_layout(ids, num_experts, num_ranks, ranks_per_node):
    """One-hot choices, and any() over ranks and nodes."""
    choices = torch.zeros(len(ids), num_experts, dtype=torch.bool).scatter_(1, ids.long(), True)
    in_rank = choices.view(len(ids), num_ranks, -1).any(-1)
    in_node = in_rank.view(len(ids), -1, ranks_per_node).any(-1)
    return in_rank.sum(0), in_node.sum(0), torch.bincount(ids.flatten(), minlength=num_experts), in_rank


def index_add(y, row_of_slot, weight_of_slot, tokens):
    """What moe_unpermute computes, on torch's index_add_, which has no weights."""
    return y.new_zeros(tokens, y.shape[1]).index_add_(0, row_of_slot, y * weight_of_slot)


def torch_unpermute(y, slot_of_row, weights):
    """A gather and a weighted sum."""
    return (y[slot_of_row.long()] * weights[..., None]).sum(1).to(y.dtype)


def cases(quick: bool):
    """GLM-5's 256 experts with 8 chosen, and the tiny model's 8 with 2."""
    for tokens, experts, topk, dim in ((2048, 256, 8, 6144), (2048, 8, 2, 128))[-1 if quick else 0 :]:
        large = dim == 6144
        peak, moved = ("read", 1.0) if large else (None, 0.0)  # the small one stays in the caches: no limit of its own
        logits, bias = torch.randn(tokens, experts), torch.randn(experts) * 0.1
        sizes = f"{tokens} tokens to {topk} of {experts}"
        yield Case(
            f"moe_router {sizes}", lambda a=(logits, bias, topk): ops.moe_router(*a, scaling=2.5),
            lambda a=(logits, bias, topk): torch_router(*a, 2.5), work=moved * 4 * logits.numel(), peak=peak,
        )  # fmt: skip
        x = torch.randn(tokens, dim).to(bf16)
        weights, ids = ops.moe_router(logits, bias, topk)
        y, rows, slots, _ = ops.moe_permute(x, ids, experts)
        rows = rows.long()
        weight_of_slot = (
            torch.empty(tokens * topk).index_put_((slots.long().flatten(),), weights.flatten())[:, None].to(bf16)
        )
        yield Case(
            f"moe_permute bf16 {sizes}, dim {dim}", lambda a=(x, ids, experts): ops.moe_permute(*a),
            lambda a=(x, 0, rows): torch.index_select(*a), work=moved * 2 * (x.numel() + y.numel()), peak=peak,
            peer_name="index_select", goal_ratio=8.0 if large else None, note="the peer is given the order",
        )  # fmt: skip
        combined = moved * 2 * (x.numel() + y.numel())
        yield Case(
            f"moe_unpermute bf16 {sizes}, dim {dim}", lambda a=(y, slots, weights): ops.moe_unpermute(*a),
            lambda a=(y, rows, weight_of_slot, tokens): index_add(*a), work=combined, peak=peak,
            peer_name="index_add_", goal_ratio=5.0 if large else None,
        )  # fmt: skip
        yield Case(
            f"moe_unpermute bf16 {sizes}, dim {dim}, against a sum without weights",
            lambda a=(y, slots, weights): ops.moe_unpermute(*a),
            lambda a=(y, rows, x): a[2].new_zeros(a[2].shape).index_add_(0, a[1], a[0]), work=combined, peak=peak,
            peer_name="index_add_",
        )  # fmt: skip
        leaves = [y.clone().requires_grad_(), weights.clone().requires_grad_()]
        yield Case(
            f"moe_unpermute + backward bf16 {sizes}, dim {dim}",
            lambda a=leaves, s=slots, d=x: torch.autograd.grad(ops.moe_unpermute(a[0], s, a[1]), a, d),
            lambda a=leaves, s=slots, d=x: torch.autograd.grad(torch_unpermute(a[0], s, a[1]), a, d),
            work=moved * 2 * (2 * x.numel() + 3 * y.numel()), peak=peak,
        )  # fmt: skip
        layout = (ids, experts, experts // 4, 2)
        yield Case(
            f"moe_dispatch_layout {sizes}, {layout[2]} ranks", lambda a=layout: ops.moe_dispatch_layout(*a),
            lambda a=layout: torch_layout(*a),
        )  # fmt: skip
