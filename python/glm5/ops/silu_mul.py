"""The expert activation silu(gate) * up on the compiled kernels, with its backward, and fused with quantisation."""

import torch

from glm5 import _native  # noqa: F401  (registers the ops)
from glm5.ops._checks import want_booleans, want_dtype, want_tensors
from glm5.ops._register import compiled, differentiable_once, fake, not_differentiable, want_that

_silu_mul = compiled("silu_mul")
_silu_mul_quantize = compiled("silu_mul_quantize")


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


def silu_mul_quantize(
    x: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn, power_of_two: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """``silu_mul`` fused with the quantisation that the next matrix product wants: the bits of ``quantize_fp8(silu_mul(x))``
    or ``quantize_int8(silu_mul(x))``, without silu_mul's output in memory.

    Codes carry no gradient. Straight through, that of the dequantised output is ``silu_mul``'s: train with
    ``silu_mul(x)`` and its fake quantisation.

    Args:
        x: [M, 2I], bfloat16 or float32: the gate's columns, then those of up.
        dtype: float8_e4m3fn, or int8.
        power_of_two: rounds each scale of float8_e4m3fn up to a power of two.

    Returns:
        float8_e4m3fn: q [M, I] and scale [M, ceil(I / 128)] float32; int8: q [M, I] and scale [M] float32. No gradient.

    Raises:
        TypeError: x is not a tensor, dtype not a dtype, power_of_two not a bool.
        ValueError: x is not bfloat16 or float32, is not two-dimensional, has an odd width, or is not on the CPU; dtype is
            neither of the two; power_of_two with int8.
    """
    want_tensors("silu_mul_quantize", x=x)
    want_dtype("silu_mul_quantize", dtype=dtype)
    want_booleans("silu_mul_quantize", power_of_two=power_of_two)
    return _silu_mul_quantize(x, dtype, power_of_two)


@fake("silu_mul", x="float [M, 2*I]")
def _(x):
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@fake("silu_mul_backward", x="float [M, 2*I]", dy="x [M, I]")
def _(dy, x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@fake("silu_mul_quantize", x="bfloat16/float32 [M, 2*I]")
def _(x, dtype, power_of_two):
    op, rows, width = "silu_mul_quantize", x.shape[0], x.shape[1] // 2
    want_that(dtype in (torch.float8_e4m3fn, torch.int8), op, "dtype is", dtype, "torch.float8_e4m3fn or torch.int8")
    want_that(not power_of_two or dtype != torch.int8, op, "power_of_two is", power_of_two, "False with int8")
    scale_shape = (rows,) if dtype == torch.int8 else (rows, -(-width // 128))
    return x.new_empty(rows, width, dtype=dtype), x.new_empty(scale_shape, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    return torch.ops.glm5.silu_mul_backward(dy, *ctx.saved_tensors)


torch.library.register_autograd("glm5::silu_mul", _backward, setup_context=_setup_context)
differentiable_once("silu_mul_backward")
not_differentiable("silu_mul_quantize")
