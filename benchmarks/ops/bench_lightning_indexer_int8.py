"""The int8 lightning indexer against torch's bfloat16 expression and our bfloat16 form; how many of its keys it finds."""

import torch

from benchmarks.harness import Case
from benchmarks.ops import bench_lightning_indexer as bf16
from glm5 import ops

HEADS, DIM, TOPK = bf16.HEADS, bf16.DIM, bf16.TOPK


def quantised(q, k, k_scale, weights, ks, ke) -> tuple:
    """The int8 form's arguments for those of the bfloat16 form."""
    (q, q_scale), (k, k_scale) = ops.quantize_int8(q), ops.quantize_int8(k)
    return q, k, k_scale, weights * q_scale, ks, ke


def recall(inputs: tuple, topk: int = TOPK) -> float:
    """The share of the bfloat16 form's choice that the int8 form chooses too."""
    exact, _ = ops.lightning_indexer_topk(*inputs, topk)
    found, _ = ops.lightning_indexer_topk_int8(*quantised(*inputs), topk)
    common = sum(torch.isin(a[a >= 0], b).sum().item() for a, b in zip(exact, found, strict=True))
    return common / max((exact >= 0).sum().item(), 1)


def heavy_tailed(inputs: tuple) -> tuple:
    """The same shapes, each element of q and k times the exponential of a normal number."""
    q, k, *rest = inputs
    return (q * torch.randn(q.shape).exp()).bfloat16(), (k * torch.randn(k.shape).exp()).bfloat16(), *rest


def logits_case(queries: int, keys: int, isa: str | None = None, **goals) -> Case:
    inputs = bf16.inputs(queries, keys)
    arguments = quantised(*inputs)
    return Case(
        f"lightning_indexer_logits_int8 {queries} x {keys}, {HEADS} heads x {DIM}",
        lambda: ops.lightning_indexer_logits_int8(*arguments),
        None if isa else lambda: bf16.expression(*inputs), peer_name="torch bf16",
        work=2.0 * queries * keys * HEADS * DIM, peak="int8", isa=isa, **goals,
    )  # fmt: skip


def topk_case(queries: int, keys: int) -> Case:
    inputs = bf16.inputs(queries, keys)
    arguments = quantised(*inputs)
    shares = ", ".join(f"{recall(x):.3f} {name}" for name, x in (("normal", inputs), ("heavy-tailed", heavy_tailed(inputs))))
    return Case(
        f"lightning_indexer_topk_int8 {queries} x {keys}, top-{TOPK}",
        lambda: ops.lightning_indexer_topk_int8(*arguments, TOPK),
        lambda: ops.lightning_indexer_topk(*inputs, TOPK), peer_name="our bf16 form", note=f"recall {shares}",
    )  # fmt: skip


def cases(quick: bool):
    yield logits_case(256, 8192, goal_ratio=4.0)
    yield logits_case(256, 8192, isa="avx512", goal_share=0.85)
    yield logits_case(1, 32768)
    yield topk_case(128, 8192 if quick else 32768)
    if quick:
        return
    yield logits_case(64, 8192, isa="avx2")
    yield logits_case(16, 8192, isa="portable")
    yield topk_case(1, 131072)
    yield topk_case(64, 131072)
