"""Specs of the indexer_kl family."""

import torch

from glm5.testing.spec import OpSpec, register


def _ranges(draw, queries, keys):
    """int32 ks, ke: causal documents, or anything at all."""
    generator = torch.Generator().manual_seed(draw.integer(0, 2**31 - 1))
    if draw.choice([True, False]):
        cuts = torch.randint(keys + 1, (draw.integer(0, 3),), generator=generator).sort().values.tolist()
        starts = torch.zeros(queries, dtype=torch.int64)
        ends = (torch.arange(queries) * max(keys, 1) // max(queries, 1) + 1).clamp(max=keys)
        for cut in cuts:
            starts = torch.where(ends > cut, cut, starts)
        return starts.to(torch.int32), ends.to(torch.int32)
    pairs = torch.randint(keys + 1, (queries, 2), generator=generator, dtype=torch.int32)
    return pairs[:, 0], pairs[:, 1]  # some empty


def select(ks, ke, topk, seed):
    """int32 [Tq, topk]: random keys of each range, ascending, -1 padded."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.full((len(ks), topk), -1, dtype=torch.int32)
    for row, (low, high) in enumerate(zip(ks.tolist(), ke.tolist(), strict=True)):
        if low < high:
            chosen = torch.randperm(high - low, generator=generator)[:topk].sort().values + low
            indices[row, : len(chosen)] = chosen.to(torch.int32)
    return indices


def _draw_lightning_indexer_kl(draw, dtype):
    queries, keys = draw.integer(0, 80), draw.choice([0, 1, 17, 100, 300])
    heads, dim = draw.choice([1, 3, 4, 32]), draw.choice([1, 5, 16, 33, 128])
    attn_heads, attn_dim = draw.choice([1, 2, 5]), draw.choice([3, 16, 40])
    real = torch.promote_types(dtype, torch.float32)
    ks, ke = _ranges(draw, queries, keys)
    topk = draw.choice([None, None, 1, 7, 64, 270])
    indices = None if topk is None else select(ks, ke, topk, draw.integer(0, 2**31 - 1))
    attn_q = draw.tensor(queries, attn_heads, attn_dim, dtype=dtype)
    attn_k = draw.tensor(*((keys, attn_heads, attn_dim) if indices is None else (keys, attn_dim)), dtype=dtype)
    scale = draw.choice([0.3, 1.0]) * attn_dim**-0.5
    # The lse that the attention would give, in any precision: it is an input here.
    wide_k = attn_k.double() if indices is None else attn_k.double()[:, None].expand(keys, attn_heads, attn_dim)
    scores = torch.einsum("qhd,khd->qhk", attn_q.double(), wide_k) * scale
    key = torch.arange(keys)
    seen = (key >= ks[:, None]) & (key < ke[:, None])
    if indices is not None:
        seen = torch.zeros(queries, keys + 1, dtype=torch.bool)
        seen.scatter_(1, torch.where(indices < 0, keys, indices).long(), True)
        seen = seen[:, :keys]
    lse = scores.masked_fill(~seen[:, None], float("-inf")).logsumexp(-1)
    return {
        "q": draw.tensor(queries, heads, dim, dtype=dtype),
        "k": draw.tensor(keys, dim, dtype=dtype),
        "weights": draw.tensor(queries, heads, dtype=real, scale=(dim * heads) ** -0.5),
        "ks": ks,
        "ke": ke,
        "attn_q": attn_q,
        "attn_k": attn_k,
        "attn_lse": lse.masked_fill(lse == float("-inf"), float("inf")).to(real),
        "scale": scale,
        "indices": indices,
    }


register(
    OpSpec(
        "lightning_indexer_kl",
        _draw_lightning_indexer_kl,
        differentiable=("q", "k", "weights"),
        budget="softmax",
        rows=("q", "weights", "ks", "ke", "attn_q", "attn_lse", "indices"),
        keys=("k", "attn_k"),
        positions=("ks", "ke", "indices"),
        lists=("indices",),
        outputs=("rows",),
    )
)


def _draw_indexer_kl_loss(draw, dtype):
    rows, columns = draw.integer(0, 40), draw.choice([1, 17, 300, 1000])
    ks, ke = _ranges(draw, rows, columns)
    column = torch.arange(columns)
    seen = (column >= ks[:, None]) & (column < ke[:, None])
    logits = draw.tensor(rows, columns, dtype=dtype, scale=draw.choice([0.1, 2.0])).masked_fill(~seen, float("-inf"))
    topk = draw.choice([None, 1, 20, 300])
    indices = None if topk is None else select(ks, ke, topk, draw.integer(0, 2**31 - 1))
    valid = seen if indices is None else indices >= 0
    scores = draw.tensor(*valid.shape, dtype=torch.float64, scale=2.0).masked_fill(~valid, float("-inf"))
    return {"logits": logits, "target": scores.softmax(-1).nan_to_num(0).to(dtype), "indices": indices}


register(
    OpSpec(
        "indexer_kl_loss",
        _draw_indexer_kl_loss,
        differentiable=("logits",),
        budget="softmax",
        dtypes=(torch.float32,),
        rows=("logits", "target", "indices"),
        outputs=("rows",),
        empty=lambda arguments: (arguments["logits"] == float("-inf")).all(1),
    )
)
