"""linear, batched_linear, grouped_linear against torch, decode sizes with cold weights."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Case, Rotating
from glm5 import ops

bf16, f32 = torch.bfloat16, torch.float32


def linear_case(m: int, n: int, k: int, dtype=bf16, isa: str | None = None, **goals) -> Case:
    x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    name = f"linear {'bf16' if dtype == bf16 else 'float32'} M={m} N={n} K={k}"
    peer = None if isa else F.linear
    if m <= 8:  # decode reads every weight once: from memory, not from a cache
        cold = Rotating(w)
        return Case(
            name, lambda: ops.linear(x, cold.next()), peer and (lambda: peer(x, cold.next())),
            work=w.numel() * w.element_size(), peak="read", isa=isa, note="cold weights", **goals,
        )  # fmt: skip
    return Case(
        name, lambda: ops.linear(x, w), peer and (lambda: peer(x, w)), work=2.0 * m * n * k,
        peak="bf16" if dtype == bf16 else "float32", isa=isa, **goals,
    )  # fmt: skip


def backward_case(m: int, n: int, k: int) -> Case:
    x, w, dy = torch.randn(m, k).to(bf16), torch.randn(n, k).to(bf16), torch.randn(m, n).to(bf16)
    return Case(
        f"linear dx + dw bf16 M={m} N={n} K={k}",
        lambda: (torch.ops.glm5.linear_dx(dy, w), torch.ops.glm5.linear_dw(dy, x)),
        lambda: (dy @ w, dy.T @ x),
        work=4.0 * m * n * k, peak="bf16", goal_ratio=1.0,
    )  # fmt: skip


def batched_case(m: int, h: int, n: int, k: int) -> Case:
    x, w = torch.randn(m, h, k).to(bf16), torch.randn(h, n, k).to(bf16)
    return Case(
        f"batched_linear bf16 M={m} H={h} N={n} K={k}",
        lambda: ops.batched_linear(x, w),
        lambda: torch.bmm(x.transpose(0, 1), w.transpose(1, 2)).transpose(0, 1).contiguous(),
        work=2.0 * m * h * n * k, peak="bf16", goal_ratio=1.0,
    )  # fmt: skip


def grouped_case(m: int, e: int, n: int, k: int) -> Case:
    x, w = torch.randn(m, k).to(bf16), torch.randn(e, n, k).to(bf16)
    ends = torch.sort(torch.randint(0, m + 1, (e,))).values.int()
    ends[-1] = m
    bounds = [0, *ends.tolist()]

    def peer():
        return torch.cat([F.linear(x[a:b], w[i]) for i, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False))])

    return Case(
        f"grouped_linear bf16 M={m} E={e} N={n} K={k}", lambda: ops.grouped_linear(x, w, ends), peer,
        work=2.0 * m * n * k, peak="bf16", peer_name="torch loop", goal_ratio=1.0,
    )  # fmt: skip


def cases(quick: bool):
    yield linear_case(1, 4096, 4096, goal_ratio=2.0)
    yield linear_case(8, 4096, 4096)
    for m in (64, 512) if quick else (16, 64, 512, 2048):
        yield linear_case(m, 4096, 4096, goal_ratio=1.0 if m >= 64 else None)
    yield linear_case(4096, 512, 256, goal_ratio=1.0)
    yield backward_case(4096, 512, 256)
    yield linear_case(512, 2048, 2048, dtype=f32)
    yield linear_case(512, 2048, 2048, dtype=f32, isa="avx2", goal_share=0.6)
    yield linear_case(512, 2048, 2048, dtype=bf16, isa="avx2", goal_share=0.6)
    yield batched_case(512, 16, 192, 512)
    yield grouped_case(2048, 16, 1024, 512)
    if quick:
        return
    yield linear_case(1, 4096, 4096, dtype=f32)
    yield backward_case(2048, 2048, 2048)
    yield linear_case(1, 4096, 4096, isa="avx2")
