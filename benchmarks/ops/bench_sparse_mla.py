"""sparse_mla, its backward and the indexer's teacher, against the same written in torch (gather, matmul, softmax)."""

import torch

from benchmarks.harness import Case, MemoryCase
from glm5 import _native, ops

bf16 = torch.bfloat16


def inputs(queries: int, keys: int, heads: int, dim: int, topk: int, dtype=bf16, seed: int = 0):
    """q, kv and ascending lists of distinct random rows."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(queries, heads, dim, generator=generator).to(dtype)
    kv = torch.randn(keys, dim, generator=generator).to(dtype)
    lists = [torch.randperm(keys, generator=generator)[:topk].sort().values for _ in range(queries)]
    return q, kv, torch.stack(lists).int()


def in_torch(q, kv, indices, scale, d_v):
    rows = kv[indices.long()]
    probabilities = torch.softmax((q @ rows.mT).float() * scale, -1)
    return probabilities.to(q.dtype) @ rows[..., :d_v]


def target_in_torch(q, kv, indices, lse, scale):
    mass = torch.exp((q @ kv[indices.long()].mT).float() * scale - lse[..., None]).sum(1)
    return mass / mass.sum(-1, keepdim=True)


def forward_case(heads: int, dim: int, d_v: int, topk: int, queries: int, keys: int, isa=None, dtype=bf16, **goals) -> Case:
    arguments = (*inputs(queries, keys, heads, dim, topk, dtype), dim**-0.5, d_v)
    kind = "bf16" if dtype == bf16 else "float32"
    return Case(
        f"sparse_mla {kind} H={heads} {dim}/{d_v} topk={topk} keys={keys}" + (" one row" if queries == 1 else ""),
        lambda: ops.sparse_mla(*arguments), None if isa else (lambda: in_torch(*arguments)),
        work=2.0 * queries * topk * heads * (dim + d_v), peak=goals.pop("peak", kind), isa=isa, **goals,
    )  # fmt: skip


def backward_case(heads: int, dim: int, d_v: int, topk: int, queries: int, keys: int, isa=None, dtype=bf16, **goals) -> Case:
    q, kv, indices = inputs(queries, keys, heads, dim, topk, dtype)
    scale = dim**-0.5
    out, lse = ops.sparse_mla(q, kv, indices, scale, d_v)
    dout = torch.randn(out.shape).to(dtype)
    kind = "bf16" if dtype == bf16 else "float32"
    return Case(
        f"sparse_mla backward {kind} H={heads} {dim}/{d_v} topk={topk} keys={keys}",
        lambda: torch.ops.glm5.sparse_mla_backward(dout, None, q, kv, indices, lse, scale),
        lambda: ops.sparse_mla(q, kv, indices, scale, d_v),
        work=2.0 * queries * topk * heads * (3 * dim + 2 * d_v), peak=kind, isa=isa, peer_name="its forward",
        peer_work=2.0 * queries * topk * heads * (dim + d_v), goal_ratio=1 / 3.2, **goals,
    )  # fmt: skip


def target_case(heads: int, dim: int, d_v: int, topk: int, queries: int, keys: int) -> Case:
    q, kv, indices = inputs(queries, keys, heads, dim, topk)
    scale = dim**-0.5
    lse = ops.sparse_mla(q, kv, indices, scale, d_v)[1]
    return Case(
        f"sparse_mla_attn_target bf16 H={heads} {dim} topk={topk} keys={keys}",
        lambda: ops.sparse_mla_attn_target(q, kv, indices, lse, scale),
        lambda: target_in_torch(q, kv, indices, lse, scale),
        work=2.0 * queries * topk * heads * dim, peak="bf16",
    )  # fmt: skip


def paged_case(heads: int, dim: int, d_v: int, topk: int, queries: int, keys: int, page: int = 16) -> Case:
    q, kv, indices = inputs(queries, keys, heads, dim, topk)
    order = torch.randperm(keys // page, generator=torch.Generator().manual_seed(0))
    cache = torch.empty(keys // page, page, dim, dtype=bf16)
    cache[order] = kv.view(-1, page, dim)
    paged = q, cache, order.int()[None], torch.zeros(queries, dtype=torch.int32), indices, dim**-0.5, d_v
    return Case(
        f"sparse_mla_paged bf16 H={heads} {dim}/{d_v} topk={topk} keys={keys}, pages of {page}",
        lambda: ops.sparse_mla_paged(*paged), lambda: ops.sparse_mla(q, kv, indices, dim**-0.5, d_v), peer_name="sparse_mla",
        work=2.0 * queries * topk * heads * (dim + d_v), peak="bf16",
    )  # fmt: skip


def cases(quick: bool):
    """Every case of the family, built one at a time."""
    has = _native.available_isas()
    shape = {"dim": 576, "d_v": 512, "topk": 2048, "queries": 16 if quick else 64, "keys": 32768}
    yield forward_case(64, **shape)
    yield paged_case(64, **shape)
    yield forward_case(16, **shape)
    yield forward_case(4, 96, 64, 128, 2048, 8192)
    if "avx512" in has:
        yield forward_case(64, **shape, isa="avx512", goal_share=0.8)
        yield forward_case(16, **shape, isa="avx512", goal_share=0.55)
    if "avx2" in has:
        yield forward_case(64, **shape, isa="avx2", peak="float32", goal_share=0.6)
    for heads in (8, 64):
        yield forward_case(heads, **{**shape, "queries": 1}, dtype=torch.float32)
    for heads in (4, 8, 64):
        few = {**shape, "queries": (64 if quick else 256) * 8 // max(heads, 8), "keys": 4096, "topk": 1536}
        share = 0.45 if heads < 8 else 0.6
        yield forward_case(heads, **few, dtype=torch.float32, goal_share=share)
        yield backward_case(heads, **few, dtype=torch.float32, goal_share=share)
    shape |= {"queries": 64 if quick else 256, "keys": 8192}
    yield backward_case(64, **shape)
    if "avx512" in has:
        yield backward_case(64, **shape, isa="avx512")
    yield backward_case(4, 96, 64, 128, 2048, 8192)
    yield target_case(64, **shape)
    yield target_case(4, 96, 64, 128, 2048, 8192)


def training_step(queries: int, keys: int, heads: int = 16, dim: int = 576, d_v: int = 512, topk: int = 2048):
    """A forward and a backward, to be measured for memory."""
    q, kv, _ = inputs(queries, keys, heads, dim, 1)
    indices = (torch.arange(topk) * (keys // topk)).int().expand(queries, topk).contiguous()

    def step():
        out, lse = ops.sparse_mla(q, kv, indices, dim**-0.5, d_v)
        return torch.ops.glm5.sparse_mla_backward(out, None, q, kv, indices, lse, dim**-0.5)

    return step


def memory_cases(quick: bool):
    """Working memory O(Tq (topk + H D) + Tk D): the outputs, the float32 sums of dkv and a chunk of queries."""
    for keys in (32768,) if quick else (32768, 131072):
        queries, heads = 256, 16
        outputs = queries * heads * (512 * 2 + 4 + 576 * 2) + keys * 576 * 2
        yield MemoryCase(
            f"sparse_mla forward + backward, {queries} queries x {keys} keys, {heads} heads",
            "benchmarks.ops.bench_sparse_mla:training_step", {"queries": queries, "keys": keys},
            limit=outputs + keys * 576 * 4 + (64 << 20),
        )  # fmt: skip
