"""Specs of the sparse MLA family."""

import torch

from glm5.testing.cache import draw_latent_pages, draw_lengths, draw_sequences
from glm5.testing.spec import OpSpec, register


def draw_indices(draw, queries: int, keys: int, topk: int) -> torch.Tensor:
    """[queries, topk] int32 lists of distinct rows, ascending, of every length 0 to topk; -1 at the end or in between."""
    generator = torch.Generator().manual_seed(draw.integer(0, 2**31 - 1))
    indices = torch.full((queries, topk), -1, dtype=torch.int32)
    scattered = draw.choice([False, True])
    for row in indices:
        most = min(keys, topk)
        count = draw.choice([most, most // 2, 0]) if most else 0
        chosen = torch.randperm(keys, generator=generator)[:count].sort().values.int()
        places = torch.randperm(topk, generator=generator)[:count].sort().values if scattered else torch.arange(count)
        row[places] = chosen
    return indices


def _draw_sparse_mla(draw, dtype):
    queries, keys = draw.integer(0, 5), draw.choice([0, 1, 40, 150])
    heads, topk = draw.choice([1, 3, 16, 20]), draw.choice([0, 1, 7, 64, 65, 130])
    dim = draw.choice([1, 18, 48, 64, 96, 130])
    d_v = draw.choice([dim, max(1, dim - dim // 4)])
    # Scores of standard deviation about 1.5: a peaked softmax, in which float32 still holds its budget.
    return {
        "q": draw.tensor(queries, heads, dim, dtype=dtype, scale=draw.choice([0.3, 1.5])),
        "kv": draw.tensor(keys, dim, dtype=dtype),
        "indices": draw_indices(draw, queries, keys, topk),
        "scale": dim**-0.5,
        "d_v": d_v,
    }


def _draw_sparse_mla_attn_target(draw, dtype):
    from glm5 import reference

    arguments = _draw_sparse_mla(draw, dtype)
    d_v = arguments.pop("d_v")
    wide = torch.promote_types(dtype, torch.float32)
    lse = reference.sparse_mla(
        arguments["q"].double(), arguments["kv"].double(), arguments["indices"], arguments["scale"], d_v
    )[1]
    return {**arguments, "lse": lse.to(wide)}


def _draw_sparse_mla_paged(draw, dtype):
    pages, dim = draw_latent_pages(draw, dtype, draw_lengths(draw))
    queries, topk = draw.integer(0, 5), draw.choice([7, 0, 1, 65, 130])
    sequence = draw_sequences(draw, queries, pages)
    lists = [draw_indices(draw, 1, pages.lengths[s], topk) for s in sequence.tolist()]
    return {
        "q": draw.tensor(queries, draw.choice([1, 3, 16, 20]), dim, dtype=dtype, scale=draw.choice([0.3, 1.5])),
        "cache": pages.cache,
        "block_table": pages.block_table,
        "sequence": sequence,
        "indices": torch.cat([*lists, torch.zeros(0, topk, dtype=torch.int32)]),
        "scale": dim**-0.5,
        "d_v": draw.choice([dim, max(1, dim - dim // 4)]),
    }


_KEYS = {"keys": ("kv",), "positions": ("indices",), "lists": ("indices",)}
register(
    OpSpec(
        "sparse_mla",
        _draw_sparse_mla,
        differentiable=("q", "kv"),
        budget="softmax",
        rows=("q", "indices"),
        outputs=("rows", "rows"),
        **_KEYS,
    )
)
register(
    OpSpec(
        "sparse_mla_attn_target",
        _draw_sparse_mla_attn_target,
        budget="softmax",
        rows=("q", "indices", "lse"),
        outputs=("list",),
        **_KEYS,
    )
)
register(
    OpSpec(
        "sparse_mla_paged",
        _draw_sparse_mla_paged,
        budget="softmax",
        rows=("q", "sequence", "indices"),
        positions=("indices",),
        lists=("indices",),
        outputs=("rows", "rows"),
    )
)
