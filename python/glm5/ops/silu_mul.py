"""The expert activation silu(gate) * up on the compiled kernels, with its backward."""

import torch

from glm5 import _native  # noqa: F401  (registers the ops)
from glm5.ops._checks import want_tensors
from glm5.ops._register import compiled, differentiable_once, fake

_silu_mul = compiled("silu_mul")


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` with ``gate, up = x.chunk(2, -1)`` (SwiGLU, Shazeer 2020, eq. 6), in float32, rounded once.

    Args:
        x: [M, 2I], bfloat16, float32 or float64: the gate's columns, then those of up.

    Returns:
        [M, I], dtype of x. Differentiable.

    Raises:
        TypeError: x is not a tensor.
        ValueError: x is not floating, not two-dimensional, has an odd width, or is not on the CPU.
    """
    want_tensors("silu_mul", x=x)
    return _silu_mul(x)


@fake("silu_mul", x="float [M, 2*I]")
def _(x):
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@fake("silu_mul_backward", x="float [M, 2*I]", dy="x [M, I]")
def _(dy, x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    return torch.ops.glm5.silu_mul_backward(dy, *ctx.saved_tensors)


torch.library.register_autograd("glm5::silu_mul", _backward, setup_context=_setup_context)
differentiable_once("silu_mul_backward")
