"""fp8_gemm and fp8_grouped_gemm beside torch's bf16 products of the same matrices; cold weights where few rows read them."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Case, Rotating
from glm5 import ops

bf16 = torch.bfloat16


def quantized(*shape: int, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.quantize_fp8(torch.randn(shape), block)


def gemm_case(m: int, n: int, k: int, isa: str | None = None, **goals) -> Case:
    a, a_scale = quantized(m, k, block=(1, 128))
    b, b_scale = quantized(n, k, block=(128, 128))
    x, w = ops.dequantize_fp8(a, a_scale), ops.dequantize_fp8(b, b_scale, (128, 128))
    name, peer_name = f"fp8_gemm M={m} N={n} K={k}", "torch bf16"
    if m <= 8:  # decode reads every weight once: from memory, not from a cache
        cold, cold_w = Rotating(b), None if isa else Rotating(w)
        peer = None if isa else (lambda: F.linear(x, cold_w.next()))
        return Case(
            name, lambda: ops.fp8_gemm(a, a_scale, cold.next(), b_scale), peer, work=b.numel(), peak="read",
            peer_work=2 * b.numel(), isa=isa, peer_name=peer_name, note="cold weights", **goals,
        )  # fmt: skip
    return Case(
        name, lambda: ops.fp8_gemm(a, a_scale, b, b_scale), None if isa else (lambda: F.linear(x, w)), work=2.0 * m * n * k,
        peak="bf16", isa=isa, peer_name=peer_name, **goals,
    )  # fmt: skip


def grouped_case(tokens: int, topk: int, experts: int, n: int, k: int, **goals) -> Case:
    """Every token at ``topk`` experts of ``experts``; all experts' weights are more than a cache holds, or nearly."""
    m = tokens * topk
    a, a_scale = quantized(m, k, block=(1, 128))
    codes = [quantized(n, k, block=(128, 128)) for _ in range(experts)]
    b, b_scale = (torch.stack([c[i] for c in codes]) for i in (0, 1))
    ids = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0)).argsort(-1)[:, :topk]
    ends = torch.bincount(ids.flatten(), minlength=experts).cumsum(0).int()
    bounds = [0, *ends.tolist()]
    x, w = ops.dequantize_fp8(a, a_scale), torch.stack([ops.dequantize_fp8(*c, (128, 128)) for c in codes])
    del codes

    def peer():
        return torch.cat([F.linear(x[i:j], w[e]) for e, (i, j) in enumerate(zip(bounds, bounds[1:], strict=False))])

    return Case(
        f"fp8_grouped_gemm {tokens} tokens x {topk} of {experts} N={n} K={k}",
        lambda: ops.fp8_grouped_gemm(a, a_scale, b, b_scale, ends), peer,
        work=2.0 * m * n * k, peak="bf16", peer_name="torch bf16 loop", **goals,
    )  # fmt: skip


def cases(quick: bool):
    yield gemm_case(1, 4096, 4096, goal_ratio=4.0)
    yield gemm_case(8, 4096, 4096)
    yield gemm_case(64, 4096, 4096, goal_ratio=1.1)
    yield gemm_case(512, 4096, 4096)
    yield gemm_case(1, 4096, 4096, isa="avx512")
    yield gemm_case(64, 4096, 4096, isa="avx512")
    yield grouped_case(64, 8, 32, 2048, 6144)
    if quick:
        return
    yield grouped_case(256, 8, 32, 6144, 2048)
    yield gemm_case(512, 4096, 4096, isa="avx512")
    yield gemm_case(64, 4096, 4096, isa="avx2")
