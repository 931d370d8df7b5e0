"""silu_mul against torch's silu and product. Work is the bytes that must move."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Case
from glm5 import ops

bf16 = torch.bfloat16


def torch_silu_mul(x):
    """Two passes, two roundings."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def torch_silu_mul_quantize(x):
    """The same, and then FP8 in blocks of 1 x 128."""
    blocks = torch_silu_mul(x).float().unflatten(-1, (-1, 128))
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 448
    return (blocks / scale).flatten(-2).to(torch.float8_e4m3fn), scale.squeeze(-1)


def cases(quick: bool):
    """An expert's activations, and a dense layer's."""
    for rows, width in ((4096, 2048), (1024, 12288))[: 1 if quick else 2]:
        x, dy = torch.randn(rows, 2 * width).to(bf16), torch.randn(rows, width).to(bf16)
        leaf = x.clone().requires_grad_()
        yield Case(
            f"silu_mul bf16 {rows}x{width}", lambda x=x: ops.silu_mul(x), lambda x=x: torch_silu_mul(x),
            work=6.0 * rows * width, peak="read",
        )  # fmt: skip
        yield Case(
            f"silu_mul + backward bf16 {rows}x{width}",
            lambda leaf=leaf, dy=dy: torch.autograd.grad(ops.silu_mul(leaf), leaf, dy),
            lambda leaf=leaf, dy=dy: torch.autograd.grad(torch_silu_mul(leaf), leaf, dy),
            work=16.0 * rows * width, peak="read",
        )  # fmt: skip
        for dtype in (torch.float8_e4m3fn, torch.int8):
            yield Case(
                f"silu_mul_quantize {'int8' if dtype == torch.int8 else 'e4m3'} {rows}x{width}",
                lambda x=x, dtype=dtype: ops.silu_mul_quantize(x, dtype),
                None if dtype == torch.int8 else lambda x=x: torch_silu_mul_quantize(x),
                work=5.0 * rows * width, peak="read",
            )  # fmt: skip
