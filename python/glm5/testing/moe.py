"""Specs of the moe family."""

import torch

from glm5.testing.compare import relative_error
from glm5.testing.spec import OpSpec, register


def _ids(draw, tokens, topk, experts, distinct=True, holes=False):
    generator = torch.Generator().manual_seed(draw.integer(0, 2**31 - 1))
    if distinct:
        ids = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :topk].to(torch.int32)
    else:
        ids = torch.randint(experts, (tokens, topk), generator=generator, dtype=torch.int32)
    return ids.masked_fill(torch.rand(tokens, topk, generator=generator) < 0.2, -1) if holes else ids


def _tokens(draw, most):
    """0 to ``most``. The simplest draw is 5, as most properties need rows."""
    return (draw.integer(0, most) + 5) % (most + 1)


def _router_arguments(draw, dtype, logits_of):
    tokens, experts = _tokens(draw, 70), draw.choice([4, 12, 16, 256])
    num_groups = draw.choice([1, 1, 2, 4])
    topk_groups = draw.integer(1, num_groups)
    topk = draw.integer(1, min(8, experts // num_groups * topk_groups))
    logits, bias = logits_of(draw.tensor(tokens, experts, dtype=dtype), draw.tensor(experts, dtype=dtype, scale=0.1))
    return {
        "logits": logits,
        "bias": bias,
        "topk": topk,
        "num_groups": num_groups,
        "topk_groups": topk_groups,
        # The renormalised weight of a single expert is constant: its gradient is nothing but cancellation.
        "renormalize": topk > 1 and draw.choice([True, False]),
        "scaling": draw.choice([1.0, 2.5]),
        "replay": _ids(draw, tokens, topk, experts) if draw.integer(0, 3) == 0 else None,
    }


def _draw_moe_router(draw, dtype):
    scale = draw.choice([0.1, 1.0, 8.0])
    return _router_arguments(draw, dtype, lambda logits, bias: (logits * scale, bias))


def _draw_moe_router_ties(draw, dtype):
    """A coarse grid without bias, within which no two sigmoids are nearly equal."""
    return _router_arguments(draw, dtype, lambda logits, _: ((logits * 2).round().clamp(-12, 12) / 2, torch.zeros_like(_)))


def _draw_moe_router_special(draw, dtype):
    """A few logits NaN or infinite, and whole rows of NaN."""
    generator = torch.Generator().manual_seed(draw.integer(0, 2**31 - 1))

    def special(logits, bias):
        which = torch.randint(0, 20, logits.shape, generator=generator)
        for i, value in enumerate([float("nan"), float("-inf"), float("inf")]):
            logits[which == i] = value
        logits[::5] = float("nan")
        return logits, bias

    return _router_arguments(draw, dtype, special)


def _compare_moe_router(got, want, arguments, dtype):
    """The choice is that of the reference exactly, the weights are within the budget."""
    budget = 1e-6 if dtype == torch.float32 else 1e-13
    found = [] if torch.equal(got[1], want[1]) else ["ids differ from the reference's"]
    if not (error := relative_error(got[0], want[0])) <= budget:
        found.append(f"weights: relative error {error:.3g}, budget {budget:g}")
    return found


register(
    OpSpec(
        "moe_router",
        _draw_moe_router,
        differentiable=("logits",),
        dtypes=(torch.float32,),
        compare=_compare_moe_router,
        rows=("logits", "replay"),
        outputs=("rows", "rows"),
        ties=_draw_moe_router_ties,
        special=_draw_moe_router_special,
    )
)


def _draw_moe_permute(draw, dtype):
    tokens, topk, experts = _tokens(draw, 50), draw.choice([1, 2, 8]), draw.choice([8, 11, 256])
    return {
        "x": draw.tensor(tokens, draw.choice([1, 16, 33, 576]), dtype=dtype),
        "ids": _ids(draw, tokens, topk, experts, draw.choice([True, False]), draw.choice([True, False])),
        "num_experts": experts,
    }


def _sorted_by_expert(got, want, arguments, dtype):
    """Every choice has a slot of its own among its expert's; the order within an expert is the business of ``ties``."""
    xp, row_of_slot, slot_of_row, group_ends = got
    x, ids = arguments["x"], arguments["ids"]
    if not torch.equal(group_ends, want[3]):
        return ["group_ends: other than the reference's"]
    if not torch.equal(slot_of_row < 0, ids < 0):
        return ["slot_of_row: -1 elsewhere than in ids"]
    slots, used = slot_of_row[ids >= 0].long(), want[1] >= 0
    if not torch.equal(slots.sort().values, torch.arange(int(used.sum()))):
        return ["slot_of_row: not every slot taken once"]
    found = []
    if not torch.equal(torch.searchsorted(group_ends, slots.int(), right=True).int(), ids[ids >= 0]):
        found.append("slot_of_row: a slot among those of another expert")
    if not torch.equal(row_of_slot[slots].long(), (ids >= 0).nonzero()[:, 0]) or not (row_of_slot[~used] == -1).all():
        found.append("row_of_slot: not the inverse of slot_of_row, or not -1 behind the last slot")
    rows = x[row_of_slot.long().clamp(min=0)] if len(x) else xp
    if not torch.equal(xp[used], rows[used]) or (xp[~used] != 0).any():
        found.append("xp: not the rows that row_of_slot names, or not 0 behind the last slot")
    return found


register(
    OpSpec(
        "moe_permute",
        _draw_moe_permute,
        differentiable=("x",),
        compare=_sorted_by_expert,
        rows=("x", "ids"),
        outputs=("other",) * 4,
        ties=_draw_moe_permute,
    )
)


def _draw_moe_unpermute(draw, dtype):
    tokens, topk = _tokens(draw, 50), draw.choice([1, 2, 8])
    generator = torch.Generator().manual_seed(draw.integer(0, 2**31 - 1))
    slots = torch.randperm(tokens * topk, generator=generator).view(tokens, topk).to(torch.int32)
    if draw.choice([True, False]):
        slots = slots.masked_fill(torch.rand(tokens, topk, generator=generator) < 0.2, -1)
    return {
        "y": draw.tensor(tokens * topk, draw.choice([1, 16, 33, 576, 2100]), dtype=dtype),
        "slot_of_row": slots,
        "weights": draw.tensor(tokens, topk, dtype=torch.promote_types(dtype, torch.float32)).abs(),
    }


register(
    OpSpec(
        "moe_unpermute",
        _draw_moe_unpermute,
        differentiable=("y", "weights"),
        rows=("slot_of_row", "weights"),
        keys=("y",),
        positions=("slot_of_row",),
        outputs=("rows",),
    )
)


def _draw_moe_dispatch_layout(draw, dtype):
    tokens, topk = _tokens(draw, 50), draw.choice([1, 2, 8])
    ranks_per_node, nodes, experts_a_rank = draw.choice([1, 2, 3, 8]), draw.choice([1, 2, 4]), draw.choice([1, 2, 5])
    ranks = ranks_per_node * nodes
    experts = ranks * experts_a_rank
    distinct = topk <= experts and draw.choice([True, False])
    return {
        "ids": _ids(draw, tokens, topk, experts, distinct, draw.choice([True, False])),
        "num_experts": experts,
        "num_ranks": ranks,
        "ranks_per_node": ranks_per_node,
    }


register(
    OpSpec(
        "moe_dispatch_layout",
        _draw_moe_dispatch_layout,
        dtypes=(torch.float32,),  # there is no float in it
        bitwise=True,
        rows=("ids",),
        outputs=("other", "other", "other", "rows"),
    )
)
