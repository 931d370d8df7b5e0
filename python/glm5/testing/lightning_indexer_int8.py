"""Specs of the int8 lightning indexer."""

from functools import partial

import torch

from glm5 import reference
from glm5.testing.lightning_indexer import valid_choice
from glm5.testing.spec import OpSpec, register
from glm5.testing.topk_indices import draw_ranges


def _draw_int8(draw, *shape):
    """Every value, -128 too, or few of them: then scores tie."""
    generator = torch.Generator().manual_seed(draw.integer(0, 2**31 - 1))
    low, high = draw.choice([(-128, 128), (-128, 128), (-1, 2), (-128, -126), (126, 128)])
    return torch.randint(low, high, shape, generator=generator).to(torch.int8)


def _draw_logits(draw, dtype):
    queries, keys = draw.choice([3, 1, 0, 16, 17, 40]), draw.choice([65, 1, 0, 15, 64, 130, 300])
    heads, dim = draw.choice([3, 1, 2, 4, 7, 32, 128]), draw.choice([16, 1, 3, 33, 64, 128])
    ks, ke = draw_ranges(draw, queries, keys)
    return {
        "q": _draw_int8(draw, queries, heads, dim),
        "k": _draw_int8(draw, keys, dim),
        "k_scale": draw.tensor(keys).abs() + 0.01,
        "weights": draw.tensor(queries, heads, scale=0.001),
        "ks": ks,
        "ke": ke,
    }


def _draw_topk(draw, dtype):
    return {**_draw_logits(draw, dtype), "topk": draw.choice([0, 1, 16, 64, 400])}


def _draw_ties(draw, dtype):
    """Small whole numbers: every score is exact in float32, and most are shared by several keys."""
    arguments = _draw_topk(draw, dtype)
    arguments["q"], arguments["k"] = arguments["q"].clamp(-2, 2), arguments["k"].sign()
    arguments["weights"] = (arguments["weights"] * 1000).round()
    return {**arguments, "k_scale": torch.full_like(arguments["k_scale"], 0.5)}


_COMMON = {
    "budget": "scores",
    "dtypes": (torch.int8,),
    "rows": ("q", "weights", "ks", "ke"),
    "keys": ("k", "k_scale"),
    "positions": ("ks", "ke"),
}
register(OpSpec("lightning_indexer_logits_int8", _draw_logits, outputs=("columns",), **_COMMON))
register(
    OpSpec(
        "lightning_indexer_topk_int8",
        _draw_topk,
        compare=partial(valid_choice, reference.lightning_indexer_logits_int8),
        outputs=("positions", "rows"),
        ties=_draw_ties,
        **_COMMON,
    )
)
