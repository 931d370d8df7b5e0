"""Rotary position embedding on the compiled kernels, with its backward (the rotation by the negative angle)."""

import torch

from glm5 import _native  # noqa: F401  (registers the ops)
from glm5.ops._checks import want_tensors
from glm5.ops._register import compiled, differentiable_once, fake

_rope = compiled("rope")


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotates each pair (a, b) of a token to ``(a cos - b sin, b cos + a sin)``, in its own place (Su et al. 2021, eq. 34).

    All of the last dimension is rotated; a view chooses the part that is (the leading or trailing dims of a head), and is
    read without a copy as long as its last dimension is contiguous. Computed in float32, rounded once.

    Args:
        x: [T, heads, D] or [T, D], D even; bfloat16, float32 or float64.
        cos: [P, D / 2] float32 (float64 if x is): one row a position.
        sin: as cos.
        positions: [T] int32 or int64, each in [0, P).
        interleaved: pairs are (2i, 2i + 1), as GLM-5 has them; otherwise (i, i + D / 2).

    Returns:
        shape and dtype of x, contiguous. Differentiable in x.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: wrong dtypes or shapes, a position outside [0, P), a tensor not on the CPU.
    """
    want_tensors("rope", x=x, cos=cos, sin=sin, positions=positions)
    return _rope(x, cos, sin, positions, interleaved)


def _inputs(x):
    def layout(arguments):
        return "float [T, heads, 2*pairs+]" if arguments[x].dim() == 3 else "float [T, 2*pairs+]"

    return {x: layout, "cos": f"sum({x}) [P, pairs]", "sin": "like cos", "positions": "int32/int64 [T]"}


@fake("rope", **_inputs("x"))
def _(x, cos, sin, positions, interleaved):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@fake("rope_backward", **_inputs("dy"))
def _(dy, cos, sin, positions, interleaved):
    return torch.empty_like(dy, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    _, cos, sin, positions, ctx.interleaved = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx, dy):
    return torch.ops.glm5.rope_backward(dy, *ctx.saved_tensors, ctx.interleaved), None, None, None, None


torch.library.register_autograd("glm5::rope", _backward, setup_context=_setup_context)
differentiable_once("rope_backward")
