"""mla_attention against scaled_dot_product_attention: GLM-5's shape and the tiny model's packed one; mla_attn_target."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Case, MemoryCase
from glm5 import ops

bf16 = torch.bfloat16


def inputs(tokens: int, heads: int, dk: int, dv: int, document: int | None = None, dtype=bf16):
    """q, k, v, ks, ke of causal documents of `document` tokens, one behind the other (one document by default)."""
    q, k = (torch.randn(tokens, heads, dk).to(dtype) for _ in range(2))
    v = torch.randn(tokens, heads, dv).to(dtype)
    position = torch.arange(tokens, dtype=torch.int32)
    return q, k, v, position // (document or tokens) * (document or tokens), position + 1


def per_document(x: torch.Tensor, document: int) -> torch.Tensor:
    """[tokens, heads, dim] -> [documents, heads, document, dim], contiguous: what SDPA wants."""
    return x.unflatten(0, (-1, document)).transpose(1, 2).contiguous()


def forward_case(tokens: int, heads: int, dim: int, isa: str | None = None, **goals) -> Case:
    q, k, v, ks, ke = inputs(tokens, heads, dim, dim)
    peers = [per_document(x, tokens) for x in (q, k, v)]
    return Case(
        f"mla_attention bf16 causal T={tokens} H={heads} D={dim}",
        lambda: ops.mla_attention(q, k, v, ks, ke, dim**-0.5),
        None if isa else lambda: F.scaled_dot_product_attention(*peers, is_causal=True),
        work=2.0 * heads * tokens * tokens * dim, peak="bf16", peer_name="SDPA", isa=isa, **goals,
    )  # fmt: skip


def training_case(tokens: int, document: int, heads: int, dk: int, dv: int, dtype=bf16) -> Case:
    """Forward and backward over packed documents; SDPA gets the documents as a batch."""
    *ours, ks, ke = inputs(tokens, heads, dk, dv, document, dtype)
    peers = [per_document(x, document).requires_grad_() for x in ours]
    ours = [x.requires_grad_() for x in ours]
    cotangent = torch.randn(tokens, heads, dv).to(dtype)
    peer_cotangent = per_document(cotangent, document)

    def run():
        return torch.autograd.grad(ops.mla_attention(*ours, ks, ke, dk**-0.5)[0], ours, cotangent)

    def peer():
        return torch.autograd.grad(F.scaled_dot_product_attention(*peers, is_causal=True), peers, peer_cotangent)

    return Case(
        f"mla_attention {'bf16' if dtype == bf16 else 'float32'} forward + backward T={tokens} in documents of {document} "
        f"H={heads} Dk={dk} Dv={dv}",
        run, peer, work=float(heads * tokens * document * (4 * dk + 3 * dv)),
        peak="bf16" if dtype == bf16 else "float32", peer_name="SDPA",
    )  # fmt: skip


def target_case(tokens: int, heads: int, dim: int) -> Case:
    """The teacher over all keys before each query; in torch a head at a time, as all at once would not fit."""
    q, k, v, ks, ke = inputs(tokens, heads, dim, 8)
    scale = dim**-0.5
    _, lse = ops.mla_attention(q, k, v, ks, ke, scale)
    hidden = torch.arange(tokens) >= ke[:, None]

    def peer():
        mass = torch.zeros(tokens, tokens)
        for h in range(heads):
            mass += ((q[:, h] @ k[:, h].T).float() * scale - lse[:, h, None]).exp()
        mass.masked_fill_(hidden, 0)
        return mass / mass.sum(-1, keepdim=True)

    return Case(
        f"mla_attn_target bf16 causal T={tokens} H={heads} D={dim}",
        lambda: ops.mla_attn_target(q, k, lse, ks, ke, scale), peer, work=1.0 * heads * tokens * tokens * dim, peak="bf16",
    )  # fmt: skip


def paged_case(queries: int, context: int, heads: int = 64, dim: int = 576, d_v: int = 512, page: int = 64) -> Case:
    """Dense decoding in the absorbed form."""
    q, kv = torch.randn(queries, heads, dim).to(bf16), torch.randn(context, dim).to(bf16)
    order = torch.randperm(context // page, generator=torch.Generator().manual_seed(0))
    cache = torch.empty(context // page, page, dim, dtype=bf16)
    cache[order] = kv.view(-1, page, dim)
    ke = torch.arange(context - queries + 1, context + 1, dtype=torch.int32)
    paged = q, cache, order.int()[None], torch.zeros_like(ke), torch.zeros_like(ke), ke, dim**-0.5, d_v
    return Case(
        f"mla_attention_paged bf16 {queries} x {context} H={heads} {dim}/{d_v}, pages of {page}",
        lambda: ops.mla_attention_paged(*paged),
        lambda: torch.softmax((q.view(-1, dim) @ kv.T) * dim**-0.5, -1) @ kv[:, :d_v],
        peer_name="torch products, no mask", work=2.0 * heads * (dim + d_v) * int(ke.sum()), peak="bf16",
    )  # fmt: skip


def cases(quick: bool):
    yield forward_case(2048, 2, 256)
    yield forward_case(8192, 2, 256, goal_ratio=1.8)
    yield forward_case(2048, 2, 256, isa="avx2")
    yield training_case(8192, 1024, 4, 64, 32)
    yield training_case(8192, 1024, 4, 64, 32, dtype=torch.float32)
    yield target_case(2048, 4, 256)
    if not quick:
        yield training_case(2048, 2048, 2, 256, 256)
    yield paged_case(1, 8192)
    yield paged_case(64, 8192)


def prepare(queries: int, keys: int, backward: bool):
    """For the memory benchmark: the last `queries` of `keys` tokens, 2 heads of 256 dims."""
    q = torch.randn(queries, 2, 256).to(bf16)
    k, v = (torch.randn(keys, 2, 256).to(bf16) for _ in range(2))
    ke = torch.arange(keys - queries + 1, keys + 1, dtype=torch.int32)
    ks = torch.zeros_like(ke)
    if not backward:
        return lambda: ops.mla_attention(q, k, v, ks, ke, 0.0625)
    out, lse = ops.mla_attention(q, k, v, ks, ke, 0.0625)
    return lambda: torch.ops.glm5.mla_attention_backward(out, None, q, k, v, lse, ks, ke, 0.0625)


def memory_cases(quick: bool):
    for keys in (32768,) if quick else (32768, 131072):
        # Forward: the output and a few megabytes a thread. Backward: the gradients, and a thread's head of one segment:
        # K, V and K^T in bf16, dk and dv in float32, 64 rows of probabilities and slopes: 3584 + 512 bytes a key.
        forward, backward = 128 << 20, 2 * keys * 2 * 512 + torch.get_num_threads() * keys * 4096 + (64 << 20)
        for name, is_backward, limit in (("forward", False, forward), ("backward", True, backward)):
            yield MemoryCase(
                f"mla_attention {name}, 256 queries, {keys} keys, 2 heads",
                "benchmarks.ops.bench_mla_attention:prepare",
                {"queries": 256, "keys": keys, "backward": is_backward},
                limit=limit,
            )
