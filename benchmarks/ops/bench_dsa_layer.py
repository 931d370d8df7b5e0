"""What sparse attention buys a GLM-5 layer: indexer, top-k and sparse_mla together, against dense causal attention.

Neither side is run whole: ours on query rows spread evenly over all positions, each with all of its keys, the dense side
on two heads. Both scale linearly, in the rows and in the heads.
"""

import torch
import torch.nn.functional as F

from benchmarks.harness import Case
from glm5 import ops

HEADS, DIM, D_V = 64, 576, 512  # of the sparse attention
DENSE_DIM, DENSE_HEADS = 256, 2  # of the dense one, whose time is scaled to HEADS
INDEXER_HEADS, INDEXER_DIM, TOPK = 32, 128, 2048
bf16 = torch.bfloat16


def inputs(tokens: int, rows: int) -> tuple[tuple, tuple]:
    """(q, k, None, weights, ks, ke) of the indexer and (q, kv) of the attention; ``rows`` of the ``tokens`` queries."""
    position = torch.arange(rows) * (tokens // rows) + tokens // rows // 2
    ke = (position + 1).int()
    q, k = torch.randn(rows, INDEXER_HEADS, INDEXER_DIM).to(bf16), torch.randn(tokens, INDEXER_DIM).to(bf16)
    indexer = q, k, None, torch.randn(rows, INDEXER_HEADS), torch.zeros_like(ke), ke
    return indexer, (torch.randn(rows, HEADS, DIM).to(bf16), torch.randn(tokens, DIM).to(bf16))


def choose(indexer: tuple) -> torch.Tensor:
    return ops.lightning_indexer_topk(*indexer, TOPK)[0]


def dsa(indexer: tuple, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """Each row's best TOPK keys, and the attention over them."""
    return ops.sparse_mla(q, kv, choose(indexer), DIM**-0.5, D_V)[0]


def dense_in_torch(tokens: int):
    qkv = [torch.randn(1, DENSE_HEADS, tokens, DENSE_DIM).to(bf16) for _ in range(3)]
    return lambda: F.scaled_dot_product_attention(*qkv, is_causal=True)


def our_dense(tokens: int):
    qkv = [torch.randn(tokens, DENSE_HEADS, DENSE_DIM).to(bf16) for _ in range(3)]
    ke = torch.arange(1, tokens + 1, dtype=torch.int32)
    return lambda: ops.mla_attention(*qkv, torch.zeros_like(ke), ke, DENSE_DIM**-0.5)


def cases(quick: bool):
    tokens, rows = (8192, 256) if quick else (32768, 512)
    indexer, attention = inputs(tokens, rows)
    indices = choose(indexer)
    scoring = 2.0 * INDEXER_HEADS * INDEXER_DIM * int(indexer[-1].sum()) * tokens / rows
    attending = 2.0 * HEADS * (DIM + D_V) * int((indices >= 0).sum()) * tokens / rows
    dense = 2.0 * HEADS * DENSE_DIM * tokens * tokens
    sample = f"{rows} of {tokens} rows, scaled"
    ours = {"scale": tokens / rows, "peak": "bf16"}
    peer = {"peer_scale": HEADS / DENSE_HEADS, "peer_work": dense}
    note = f"ours: {sample}; dense: {DENSE_HEADS} of {HEADS} heads, scaled"

    yield Case(
        f"dsa_layer bf16 T={tokens}: indexer {INDEXER_HEADS}x{INDEXER_DIM}, top-{TOPK}, sparse_mla H={HEADS} {DIM}/{D_V}",
        lambda: dsa(indexer, *attention), dense_in_torch(tokens), work=scoring + attending,
        peer_name=f"dense SDPA {DENSE_DIM}/{DENSE_DIM}", goal_ratio=None if quick else 5.0, note=note, **ours, **peer,
    )  # fmt: skip
    yield Case(f"dsa_layer T={tokens}: its indexer and top-k", lambda: choose(indexer), work=scoring, note=sample, **ours)
    yield Case(
        f"dsa_layer T={tokens}: its sparse_mla", lambda: ops.sparse_mla(*attention, indices, DIM**-0.5, D_V),
        work=attending, note=sample, **ours,
    )  # fmt: skip
    if quick:
        return
    yield Case(
        f"dsa_layer bf16 T={tokens}: against our own dense attention", lambda: dsa(indexer, *attention), our_dense(tokens),
        work=scoring + attending, peer_name=f"mla_attention {DENSE_DIM}/{DENSE_DIM}", note=note, **ours, **peer,
    )  # fmt: skip
