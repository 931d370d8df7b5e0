"""lightning_indexer_kl and indexer_kl_loss, forward and backward, against the torch expression that holds [Tq, Tk]."""

import torch

from benchmarks.harness import Case, MemoryCase
from glm5 import ops
from glm5.testing.indexer_kl import select

bf16 = torch.bfloat16


def inputs(queries: int, keys: int, heads: int, dim: int, attn_heads: int, attn_dim: int, topk: int | None):
    """Causal queries over the last keys; the attention's lse is the true one."""
    ke = torch.arange(keys - queries + 1, keys + 1, dtype=torch.int32)
    ks = torch.zeros(queries, dtype=torch.int32)
    indices = None if topk is None else select(ks, ke, topk, 0)
    attn_q = torch.randn(queries, attn_heads, attn_dim).to(bf16)
    attn_k = torch.randn(*((keys, attn_heads, attn_dim) if topk is None else (keys, attn_dim))).to(bf16)
    scale = attn_dim**-0.5
    if topk is None:
        _, lse = ops.mla_attention(attn_q, attn_k, attn_k[..., :8].contiguous(), ks, ke, scale)
    else:
        _, lse = ops.sparse_mla(attn_q, attn_k, indices, scale, 8)
    return {
        "q": torch.randn(queries, heads, dim).to(bf16),
        "k": torch.randn(keys, dim).to(bf16),
        "weights": torch.randn(queries, heads) * (dim * heads) ** -0.5,
        "ks": ks,
        "ke": ke,
        "attn_q": attn_q,
        "attn_k": attn_k,
        "attn_lse": lse,
        "scale": scale,
        "indices": indices,
    }


def torch_kl(q, k, weights, ks, ke, attn_q, attn_k, attn_lse, scale, indices):
    """The same in torch: bf16 matrix products, float32 softmaxes."""
    if indices is None:
        hidden = torch.arange(len(k)) >= ke[:, None]
        mass = torch.zeros(len(q), len(k))
        for h in range(attn_q.shape[1]):  # a head at a time: all at once would not fit
            mass += ((attn_q[:, h] @ attn_k[:, h].T).float() * scale - attn_lse[:, h, None]).exp()
        scores = torch.einsum("qhd,kd->qhk", q, k)
    else:
        hidden = indices < 0
        rows = indices.clamp(min=0).long()
        mass = (torch.bmm(attn_q, attn_k[rows].transpose(1, 2)).float() * scale - attn_lse[..., None]).exp().sum(1)
        scores = torch.bmm(q, k[rows].transpose(1, 2))
    logits = torch.einsum("qhk,qh->qk", scores.float().relu(), weights).masked_fill(hidden, float("-inf"))
    mass = mass.masked_fill(hidden, 0)
    p = mass / mass.sum(-1, keepdim=True)
    return (torch.xlogy(p, p) - p * logits.log_softmax(-1).masked_fill(hidden, 0)).sum(-1)


def with_backward(function, arguments):
    """A call that runs ``function`` and its gradients."""
    leaves = {name: arguments[name].clone().requires_grad_() for name in ("q", "k", "weights")}
    arguments = {**arguments, **leaves}
    return lambda: torch.autograd.grad(function(**arguments).sum(), list(leaves.values()))


def cases(quick: bool):
    """The shapes of the tiny model's stages and of GLM-5's."""
    shapes = [
        ("tiny warm-up", 2048, 2048, 4, 32, 4, 48, None),
        ("tiny sparse", 2048, 2048, 4, 32, 4, 80, 64),
        ("GLM-5 warm-up", 1024, 1024, 32, 128, 64, 256, None),
        ("GLM-5 sparse", 64, 4096, 32, 128, 64, 576, 2048),
    ]
    for name, queries, keys, heads, dim, attn_heads, attn_dim, topk in shapes[:2] if quick else shapes:
        arguments = inputs(queries, keys, heads, dim, attn_heads, attn_dim, topk)
        pairs = float((arguments["ke"] - arguments["ks"]).sum() if topk is None else (arguments["indices"] >= 0).sum())
        attention, index = 2.0 * attn_heads * attn_dim, 2.0 * heads * dim
        sizes = f"Tq={queries} Tk={keys} {heads}x{dim} of {attn_heads}x{attn_dim}" + (f" top-{topk}" if topk else "")
        yield Case(
            f"lightning_indexer_kl bf16 {name} {sizes}",
            lambda a=arguments: ops.lightning_indexer_kl(**a), lambda a=arguments: torch_kl(**a),
            work=pairs * (attention + index), peak="bf16",
        )  # fmt: skip
        # The backward computes the scores again (the attention's too, without indices), then two products of their size.
        again = attention + index if topk is None else index
        yield Case(
            f"lightning_indexer_kl + backward bf16 {name} {sizes}",
            with_backward(ops.lightning_indexer_kl, arguments), with_backward(torch_kl, arguments),
            work=pairs * (attention + index + again + 2 * index), peak="bf16",
        )  # fmt: skip

    yield loss_case(512, 4096 if quick else 32768)


def loss_case(queries: int, keys: int):
    """The loss from given logits and target; what it reads and writes once each is the work."""
    visible = torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]
    logits = torch.randn(queries, keys).masked_fill(~visible, float("-inf")).requires_grad_()
    target = torch.rand(queries, keys).masked_fill(~visible, 0)
    target /= target.sum(-1, keepdim=True)

    def torch_loss():
        log_p = logits.log_softmax(-1).masked_fill(~visible, 0)
        return (torch.xlogy(target, target) - target * log_p).sum(-1)

    return Case(
        f"indexer_kl_loss + backward float32 Tq={queries} Tk={keys}",
        lambda: torch.autograd.grad(ops.indexer_kl_loss(logits, target).sum(), logits),
        lambda: torch.autograd.grad(torch_loss().sum(), logits),
        work=4.0 * queries * keys * 5, peak="read",
    )  # fmt: skip


def memory_call(queries: int, keys: int, dim: int, topk: int | None):
    """One forward and backward of 4 indexer heads."""
    arguments = inputs(queries, keys, 4, dim, 2, 32, topk)
    return with_backward(ops.lightning_indexer_kl, arguments)


def memory_cases(quick: bool):
    """Parts of dk, 256 MiB of them at most, and the outputs, never [Tq, Tk] (4 GiB at 32K)."""
    for queries, keys, dim in ((4096, 4096, 64),) if quick else ((32768, 32768, 64), (1024, 131072, 128)):
        parts = min(16 * keys * dim * 4, 256 << 20)
        outputs = (queries * 4 + keys) * dim * 2 + queries * 4 * 4
        yield MemoryCase(
            f"lightning_indexer_kl + backward, {queries} queries, {keys} keys",
            "benchmarks.ops.bench_indexer_kl:memory_call",
            {"queries": queries, "keys": keys, "dim": dim, "topk": None}, limit=1.25 * (parts + 2 * outputs) + (32 << 20),
        )  # fmt: skip
