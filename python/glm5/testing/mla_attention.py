"""Specs of the dense attention family."""

import torch

from glm5.testing.cache import draw_latent_pages, draw_lengths, draw_positions, draw_sequences
from glm5.testing.spec import OpSpec, register


def draw_ranges(draw, queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 ks and ke [queries]: causal, packed documents, sliding windows, the whole, or anything at all."""
    generator = torch.Generator().manual_seed(draw.integer(0, 2**31 - 1))
    row = torch.arange(queries)
    kind = draw.choice(["causal", "packed", "window", "whole", "any"])
    if kind == "causal":  # the queries are the last ones of the keys
        ks, ke = torch.zeros_like(row), (keys - queries + row + 1).clamp(0, keys)
    elif kind == "packed":
        cuts = torch.randint(0, keys + 1, (3,), generator=generator).sort().values
        own = (row * keys // max(queries, 1)).clamp(max=keys)
        document = torch.bucketize(own, cuts, right=True)
        ks, ke = torch.cat([torch.zeros(1, dtype=torch.long), cuts])[document], (own + 1).clamp(max=keys)
    elif kind == "window":
        ke = (keys - queries + row + 1).clamp(0, keys)
        ks = (ke - 37).clamp(min=0)
    elif kind == "whole":
        ks, ke = torch.zeros_like(row), torch.full_like(row, keys)
    else:
        ks, ke = torch.randint(0, keys + 1, (2, queries), generator=generator)
    return ks.int(), ke.int()


def _draw_mla_attention(draw, dtype):
    keys = draw.choice([0, 1, 40, 255, 300, 530])
    queries, heads = draw.choice([0, 1, 5, 26, 70, 200]), draw.choice([1, 2, 3])
    # One dim is left to an example test: there the gradients of q and k are pure cancellation.
    dk, dv = draw.choice([9, 17, 32, 64, 100]), draw.choice([5, 16, 24, 32, 90])
    ks, ke = draw_ranges(draw, queries, keys)
    return {
        "q": draw.tensor(queries, heads, dk, dtype=dtype, scale=draw.choice([0.3, 1.5])),
        "k": draw.tensor(keys, heads, dk, dtype=dtype),
        "v": draw.tensor(keys, heads, dv, dtype=dtype),
        "ks": ks,
        "ke": ke,
        "scale": dk**-0.5,
    }


def _draw_mla_attn_target(draw, dtype):
    from glm5 import reference

    arguments = _draw_mla_attention(draw, dtype)
    lse = reference.mla_attention(
        **{k: v.double() if torch.is_floating_point(v) else v for k, v in arguments.items() if k != "scale"},
        scale=arguments["scale"],
    )[1]
    del arguments["v"]
    return {**arguments, "lse": lse.to(torch.promote_types(dtype, torch.float32))}


register(
    OpSpec(
        "mla_attention",
        _draw_mla_attention,
        differentiable=("q", "k", "v"),
        budget="softmax",
        rows=("q", "ks", "ke"),
        keys=("k", "v"),
        positions=("ks", "ke"),
        outputs=("rows", "rows"),
    )
)
register(
    OpSpec(
        "mla_attn_target",
        _draw_mla_attn_target,
        budget="softmax",
        rows=("q", "lse", "ks", "ke"),
        keys=("k",),
        positions=("ks", "ke"),
        outputs=("columns",),
    )
)


def _draw_mla_attention_paged(draw, dtype):
    pages, dim = draw_latent_pages(draw, dtype, draw_lengths(draw))
    queries = draw.choice([3, 0, 1, 9])
    sequence = draw_sequences(draw, queries, pages)
    ks, ke = draw_positions(draw, sequence, pages)
    return {
        "q": draw.tensor(queries, draw.choice([1, 3, 20]), dim, dtype=dtype, scale=draw.choice([0.3, 1.5])),
        "cache": pages.cache,
        "block_table": pages.block_table,
        "sequence": sequence,
        "ks": ks,
        "ke": ke,
        "scale": dim**-0.5,
        "d_v": draw.choice([dim, max(1, dim - dim // 4)]),
    }


register(
    OpSpec(
        "mla_attention_paged",
        _draw_mla_attention_paged,
        budget="softmax",
        rows=("q", "sequence", "ks", "ke"),
        outputs=("rows", "rows"),
    )
)
