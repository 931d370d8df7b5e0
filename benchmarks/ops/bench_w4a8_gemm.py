"""w4a8_gemm and w4a8_grouped_gemm against torch's bf16 product of the same sizes, decode sizes with cold weights."""

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.harness import Case, Rotating
from glm5 import ops

bf16 = torch.bfloat16


def random_weight(n: int, k: int, group: int, *before: int) -> torch.Tensor:
    packed = torch.randint(0, 256, (*before, n, k // 2), dtype=torch.uint8)
    return ops.w4a8_prepack(packed, torch.rand(*before, n, k // group) * 1e-2)


def activations(m: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(-127, 128, (m, k), dtype=torch.int8), torch.rand(m) * 1e-2


def gemm_case(m: int, n: int, k: int, group: int = 128, isa: str | None = None, **goals) -> Case:
    x, x_scale = activations(m, k)
    w, dense = random_weight(n, k, group), torch.randn(n, k).to(bf16)
    floats = torch.randn(m, k).to(bf16)
    name = f"w4a8_gemm M={m} N={n} K={k} group {group}"
    if m <= 8:  # decode reads every weight once: from memory, not from a cache
        cold, cold_dense = Rotating(w), None if isa else Rotating(dense)
        return Case(
            name, lambda: ops.w4a8_gemm(x, x_scale, cold.next()),
            cold_dense and (lambda: F.linear(floats, cold_dense.next())),
            work=w.numel(), peak="read", peer_work=2.0 * n * k, peer_name="torch bf16", isa=isa,
            note="cold weights", **goals,
        )  # fmt: skip
    return Case(
        name, lambda: ops.w4a8_gemm(x, x_scale, w), None if isa else (lambda: F.linear(floats, dense)),
        work=2.0 * m * n * k, peak="int8", peer_name="torch bf16", isa=isa, **goals,
    )  # fmt: skip


def grouped_case(tokens: int, topk: int, experts: int, n: int, k: int, group: int = 128, **goals) -> Case:
    """One product of an expert layer: every token goes to topk of the experts. The peer is a loop of bf16 products."""
    rows = tokens * topk
    x, x_scale = activations(rows, k)
    w = random_weight(n, k, group, experts)
    counts = torch.bincount(torch.rand(tokens, experts).topk(topk).indices.flatten(), minlength=experts)
    ends = counts.cumsum(0).int()
    dense, floats = torch.randn(experts, n, k, dtype=bf16), torch.randn(rows, k).to(bf16)
    bounds = [0, *ends.tolist()]

    def peer():
        return torch.cat([F.linear(floats[a:b], dense[e]) for e, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False))])

    return Case(
        f"w4a8_grouped_gemm tokens={tokens} top-{topk} of {experts} N={n} K={k}",
        lambda: ops.w4a8_grouped_gemm(x, x_scale, w, ends), peer, work=w.numel(), peak="read",
        peer_work=2.0 * experts * n * k, peer_name="torch bf16 loop", **goals,
    )  # fmt: skip


def move_cases(n: int, k: int):
    packed, scale = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8), torch.rand(n, k // 128)
    w = ops.w4a8_prepack(packed, scale)
    work = 2.0 * w.numel()  # read and written
    yield Case(
        f"w4a8_prepack N={n} K={k}", lambda: ops.w4a8_prepack(packed, scale), w.clone, work=work, peak="read",
        peer_name="torch copy",
    )  # fmt: skip
    yield Case(
        f"w4a8_unpack N={n} K={k}", lambda: ops.w4a8_unpack(w), w.clone, work=work, peak="read", peer_name="torch copy",
    )  # fmt: skip


def torchao_cases(n: int, k: int, group: int):
    """A linear layer of bf16 rows, quantising them included. torchao quantises rows with a zero point, to int8 as we do."""
    if not peers.library("torchao"):
        return
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    layer = torch.nn.Sequential(torch.nn.Linear(k, n, bias=False, dtype=bf16)).requires_grad_(False)
    packed, scale, _ = ops.quantize_int4(layer[0].weight, group)
    w = ops.w4a8_prepack(packed, scale)
    quantize_(layer, Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(group)))
    for m in (1, 64, 512):
        x = torch.randn(m, k).to(bf16)
        yield Case(
            f"quantize_int8 + w4a8_gemm M={m} N={n} K={k} group {group}",
            lambda x=x: ops.w4a8_gemm(*ops.quantize_int8(x), w), lambda x=x: layer(x),
            work=2.0 * m * n * k, peak="int8", peer_name="torchao", library="torchao", note="torchao dequantises w",
        )  # fmt: skip


def cases(quick: bool):
    yield gemm_case(1, 4096, 4096, goal_ratio=6.0, goal_share=0.7)
    yield gemm_case(8, 4096, 4096, goal_ratio=4.5)
    yield gemm_case(64, 4096, 4096, goal_ratio=2.2)
    yield gemm_case(64, 4096, 4096, isa="avx512", goal_share=0.85)
    yield gemm_case(512, 4096, 4096, goal_ratio=1.9)
    yield gemm_case(512, 4096, 4096, group=32)
    yield grouped_case(64, 8, 64, 2048, 6144)
    yield from torchao_cases(4096, 4096, 128)
    if quick:
        return
    yield from move_cases(4096, 4096)
    yield gemm_case(1, 4096, 4096, group=32)
    yield gemm_case(8, 4096, 4096, group=32)
    yield gemm_case(64, 4096, 4096, group=32)
    yield gemm_case(64, 4096, 4096, group=32, isa="avx512")
    yield gemm_case(512, 4096, 4096, isa="avx512")
    for m in (1, 64):
        yield gemm_case(m, 4096, 4096, isa="avx2")
    yield grouped_case(64, 8, 64, 6144, 2048)
    yield grouped_case(256, 8, 64, 2048, 6144)
    yield grouped_case(256, 8, 64, 6144, 2048)
