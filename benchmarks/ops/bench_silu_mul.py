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
