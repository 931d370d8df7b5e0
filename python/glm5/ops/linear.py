"""The matrix products under every projection, row-invariant: a row's bits do not depend on the other rows, the tile, the
group or the thread that computed it. Backward computes only the gradients that are asked for, each by an op of its own."""

import torch

from glm5 import _native  # noqa: F401  (registers the ops)
from glm5.ops._checks import want_tensors
from glm5.ops._register import compiled, differentiable_once, fake, want_that

_linear = compiled("linear")
_batched_linear = compiled("batched_linear")
_grouped_linear = compiled("grouped_linear")


def linear(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """``x w^T + bias``, accumulated in float32 (float64 for float64) and rounded once.

    Args:
        x: [M, K], bfloat16, float32 or float64.
        w: [N, K], dtype of x.
        bias: [N], dtype of x, or None.
        out_dtype: dtype of x when None; float32 is also allowed for bfloat16 inputs.

    Returns:
        [M, N] in out_dtype. Row m depends on row m of x alone (and on w and bias). Differentiable in x, w and bias; a
        float32 gradient of bfloat16 inputs is rounded to bfloat16 first. Under CPU autocast x, w and bias are cast to its
        dtype.

    Raises:
        TypeError: x, w or bias is not a tensor.
        ValueError: dtypes differ or are not floating, shapes do not match, out_dtype is another one, a tensor is not on
            the CPU.
    """
    want_tensors("linear", x=x, w=w, **({} if bias is None else {"bias": bias}))
    return _linear(x, w, bias, out_dtype)


def batched_linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``y[m, h] = w[h] x[m, h]``: one product per head, as in the absorption of W_UK and W_UV (DeepSeek-V2, 2.1.2).

    Args:
        x: [M, H, K], bfloat16, float32 or float64.
        w: [H, N, K], dtype of x. A view of a wider tensor and one with its last two dimensions transposed are read where
            they are.

    Returns:
        [M, H, N], dtype of x; row m depends on row m of x alone (and on w). Differentiable in x and w. Under CPU autocast
        both are cast to its dtype.

    Raises:
        TypeError: x or w is not a tensor.
        ValueError: dtypes differ or are not floating, shapes do not match, a tensor is not on the CPU.
    """
    want_tensors("batched_linear", x=x, w=w)
    return _batched_linear(x, w)


def grouped_linear(x: torch.Tensor, w: torch.Tensor, group_ends: torch.Tensor) -> torch.Tensor:
    """``y[m] = w[e] x[m]`` for the rows m of group e: one product per expert over rows sorted by expert.

    Args:
        x: [M, K], bfloat16, float32 or float64, rows sorted by group.
        w: [E, N, K], dtype of x.
        group_ends: [E] int32; group e is rows [group_ends[e-1], group_ends[e]), the first starts at row 0.

    Returns:
        [M, N], dtype of x; rows from group_ends[E-1] on belong to no group and give 0. A row has the bits that
        ``linear(row, w[e])`` gives it. Differentiable in x and w. Under CPU autocast both are cast to its dtype.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: dtypes differ or are not floating, shapes do not match, group_ends falls or passes M, a tensor is not
            on the CPU.
    """
    want_tensors("grouped_linear", x=x, w=w, group_ends=group_ends)
    return _grouped_linear(x, w, group_ends)


# ---- fake kernels ----


@fake("linear", x="float [M, K]", w="x [N, K]", bias="x [N]")
def _(x, w, bias=None, out_dtype=None):
    allowed = (None, x.dtype, torch.float32) if x.dtype == torch.bfloat16 else (None, x.dtype)
    want_that(out_dtype in allowed, "linear", "out_dtype is", out_dtype, f"{x.dtype}, or float32 for bfloat16")
    return x.new_empty(x.shape[0], w.shape[0], dtype=out_dtype or x.dtype)


@fake("linear_dx", w="float [N, K]", dy="w [M, N]")
def _(dy, w):
    return dy.new_empty(dy.shape[0], w.shape[1])


@fake("linear_dw", x="float [M, K]", dy="x [M, N]")
def _(dy, x):
    return dy.new_empty(dy.shape[1], x.shape[1])


@fake("linear_dbias", dy="float [M, N]")
def _(dy):
    return dy.new_empty(dy.shape[1])


@fake("batched_linear", x="float [M, H, K]", w="x [H, N, K]")
def _(x, w):
    return x.new_empty(x.shape[0], w.shape[0], w.shape[1])


@fake("batched_linear_dx", w="float [H, N, K]", dy="w [M, H, N]")
def _(dy, w):
    return dy.new_empty(dy.shape[0], w.shape[0], w.shape[2])


@fake("batched_linear_dw", x="float [M, H, K]", dy="x [M, H, N]")
def _(dy, x):
    return dy.new_empty(x.shape[1], dy.shape[2], x.shape[2])


@fake("grouped_linear", x="float [M, K]", w="x [E, N, K]", group_ends="int32 [E]")
def _(x, w, group_ends):
    return x.new_empty(x.shape[0], w.shape[1])


@fake("grouped_linear_dx", w="float [E, N, K]", dy="w [M, N]", group_ends="int32 [E]")
def _(dy, w, group_ends):
    return dy.new_empty(dy.shape[0], w.shape[2])


@fake("grouped_linear_dw", x="float [M, K]", dy="x [M, N]", group_ends="int32 [E]")
def _(dy, x, group_ends):
    return dy.new_empty(group_ends.shape[0], dy.shape[1], x.shape[1])


# ---- gradients ----


def _linear_setup(ctx, inputs, output):
    x, w, bias, _ = inputs
    # What a frozen side needs for the other's gradient is all that is kept.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w if ctx.needs_input_grad[0] else None)
    ctx.dtype = x.dtype


def _linear_backward(ctx, dy):
    x, w = ctx.saved_tensors
    # The dispatcher leaves out trailing arguments that have their default.
    need_x, need_w, need_bias = (*ctx.needs_input_grad, False)[:3]
    dy = dy.to(ctx.dtype)
    dx = torch.ops.glm5.linear_dx(dy, w) if need_x else None
    dw = torch.ops.glm5.linear_dw(dy, x) if need_w else None
    dbias = torch.ops.glm5.linear_dbias(dy) if need_bias else None
    return dx, dw, dbias, None


def _batched_setup(ctx, inputs, output):
    x, w = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w if ctx.needs_input_grad[0] else None)


def _batched_backward(ctx, dy):
    x, w = ctx.saved_tensors
    need_x, need_w = ctx.needs_input_grad
    dx = torch.ops.glm5.batched_linear_dx(dy, w) if need_x else None
    dw = torch.ops.glm5.batched_linear_dw(dy, x) if need_w else None
    return dx, dw


def _grouped_setup(ctx, inputs, output):
    x, w, group_ends = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w if ctx.needs_input_grad[0] else None, group_ends)


def _grouped_backward(ctx, dy):
    x, w, group_ends = ctx.saved_tensors
    need_x, need_w, _ = ctx.needs_input_grad
    dx = torch.ops.glm5.grouped_linear_dx(dy, w, group_ends) if need_x else None
    dw = torch.ops.glm5.grouped_linear_dw(dy, x, group_ends) if need_w else None
    return dx, dw, None


torch.library.register_autograd("glm5::linear", _linear_backward, setup_context=_linear_setup)
torch.library.register_autograd("glm5::batched_linear", _batched_backward, setup_context=_batched_setup)
torch.library.register_autograd("glm5::grouped_linear", _grouped_backward, setup_context=_grouped_setup)
differentiable_once("linear_dx", "linear_dw", "linear_dbias", "batched_linear_dx", "batched_linear_dw")
differentiable_once("grouped_linear_dx", "grouped_linear_dw")
for _name in ("linear", "batched_linear", "grouped_linear"):
    torch.library.register_autocast(f"glm5::{_name}", "cpu", torch.bfloat16)
