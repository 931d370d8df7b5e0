"""A decode step of a GLM-5 layer over pages of 16 positions: indexer, top-k and sparse attention, and the attention alone,
against the best torch has for the same context: dense absorbed attention on one contiguous tensor.

The queries of a step belong to one sequence (speculative decoding), so that torch reads the context once for all of them.
"""

import torch
import torch.nn.functional as F

from benchmarks.harness import Case
from glm5 import ops

HEADS, DIM, D_V = 64, 576, 512
INDEXER_HEADS, INDEXER_DIM, TOPK = 32, 128, 2048
PAGE = 16
SCALE = DIM**-0.5
bf16 = torch.bfloat16


class Step:
    """Inputs of one decode step: ``form`` of the pages is bf16 or fp8."""

    def __init__(self, queries: int, context: int, form: str):
        fp8 = form == "fp8"
        pages = context // PAGE
        self.table = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).int()[None]
        positions = torch.arange(context)
        slots = (self.table[0, positions // PAGE] * PAGE + positions % PAGE).int()
        byte = {"dtype": torch.uint8}
        self.kv, k = torch.randn(context, DIM).to(bf16), torch.randn(context, INDEXER_DIM).to(bf16)
        self.latent = torch.zeros(pages, PAGE, 656, **byte) if fp8 else torch.zeros(pages, PAGE, DIM, dtype=bf16)
        self.keys = torch.zeros(pages, PAGE, 132, **byte) if fp8 else torch.zeros(pages, PAGE, INDEXER_DIM, dtype=bf16)
        ops.latent_cache_write(self.kv, slots, self.latent)
        ops.indexer_cache_write(k, slots, self.keys)
        if fp8:
            self.kv = ops.latent_cache_read(self.latent, slots)
        self.q = torch.randn(queries, HEADS, DIM).to(bf16)
        self.indexer_q = torch.randn(queries, INDEXER_HEADS, INDEXER_DIM).to(torch.float8_e4m3fn if fp8 else bf16)
        self.weights = torch.randn(queries, INDEXER_HEADS)
        self.sequence = torch.zeros(queries, dtype=torch.int32)
        self.ke = torch.arange(context - queries + 1, context + 1, dtype=torch.int32)
        self.indices = self.choose()

    def choose(self):
        return ops.lightning_indexer_topk_paged(
            self.indexer_q, self.weights, self.keys, self.table, self.sequence, torch.zeros_like(self.ke), self.ke, TOPK
        )[0]

    def attend(self, indices=None):
        indices = self.indices if indices is None else indices
        return ops.sparse_mla_paged(self.q, self.latent, self.table, self.sequence, indices, SCALE, D_V)[0]

    def layer(self):
        return self.attend(self.choose())

    # Dense absorbed attention in torch: a step's queries and heads as rows of one matrix.

    def products(self):
        scores = (self.q.view(-1, DIM) @ self.kv.T).mul_(SCALE)
        return torch.softmax(scores, -1) @ self.kv[:, :D_V]

    def sdpa(self):
        kv = self.kv[None, None]
        return F.scaled_dot_product_attention(self.q.view(1, 1, -1, DIM), kv, kv, scale=SCALE)[..., :D_V]


def cases(quick: bool):
    context = 8192 if quick else 131072
    for form in ("bf16", "fp8"):
        for queries in (1, 4):
            step = Step(queries, context, form)
            goal = queries == 1 and not quick
            name = f"paged decode {form} {queries} quer{'y' if queries == 1 else 'ies'} of {context} tokens"
            scored = 2.0 * queries * INDEXER_HEADS * INDEXER_DIM * context
            attended = 2.0 * queries * TOPK * HEADS * (DIM + D_V)
            for peer_name, peer in (("torch products", step.products), ("SDPA", step.sdpa)):
                yield Case(
                    f"{name}: layer", step.layer, peer, peer_name=f"dense, {peer_name}", work=scored + attended, peak="bf16",
                    goal_ratio=20.0 if goal else None, peer_work=2.0 * queries * context * HEADS * (DIM + D_V),
                )  # fmt: skip
            yield Case(
                f"{name}: sparse_mla_paged", step.attend, step.products, peer_name="dense, torch products", work=attended,
                peak="bf16", goal_ratio=80.0 if goal else None, peer_work=2.0 * queries * context * HEADS * (DIM + D_V),
            )  # fmt: skip
            yield Case(f"{name}: indexer and top-k", step.choose, work=scored, peak="bf16")
