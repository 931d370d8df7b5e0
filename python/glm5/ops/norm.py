"""RMSNorm and LayerNorm (the indexer's keys) on the compiled kernels, with their backwards."""

import torch

from glm5 import _native  # noqa: F401  (registers the ops)
from glm5.ops._checks import want_tensors
from glm5.ops._register import compiled, differentiable_once, fake, want_that

_rms_norm = compiled("rms_norm")
_layer_norm = compiled("layer_norm")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """``cast(x / sqrt(mean(x^2) + eps)) * weight`` over the last dimension (Zhang & Sennrich 2019, eq. 4).

    The normalised value is computed in float32 and rounded to x's dtype before the weight is applied, as Transformers does.

    Args:
        x: [..., dim], bfloat16, float32 or float64.
        weight: [dim], dtype of x.
        eps: added to the mean square.

    Returns:
        [..., dim], dtype of x. A row depends on that row of x and on weight alone. Differentiable in x and weight.

    Raises:
        TypeError: x or weight is not a tensor.
        ValueError: dtypes differ or are not floating, shapes do not match, eps is negative, a tensor is not on the CPU.
    """
    want_tensors("rms_norm", x=x, weight=weight)
    return _rms_norm(x, weight, eps)


_INPUTS = {"x": "float [..., dim+]", "weight": "x [dim]"}


def _want_eps(op, eps):
    want_that(not isinstance(eps, float) or eps >= 0, op, "eps is", eps, "a number >= 0")


@fake("rms_norm", **_INPUTS)
def _(x, weight, eps):
    _want_eps("rms_norm", eps)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@fake("rms_norm_backward", **_INPUTS, dy="like x")
def _(dy, x, weight, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _setup_context(ctx, inputs, output):
    x, weight, eps = inputs
    ctx.save_for_backward(x, weight)
    ctx.eps = eps


def _backward(ctx, dy):
    dx, dweight = torch.ops.glm5.rms_norm_backward(dy, *ctx.saved_tensors, ctx.eps)
    return dx, dweight, None


torch.library.register_autograd("glm5::rms_norm", _backward, setup_context=_setup_context)
differentiable_once("rms_norm_backward")


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last dimension (Ba et al. 2016), variance by 1/dim.

    Everything is computed in float32 and rounded to x's dtype once.

    Args:
        x: [..., dim], bfloat16, float32 or float64.
        weight: [dim], dtype of x.
        bias: [dim], dtype of x.
        eps: added to the variance.

    Returns:
        [..., dim], dtype of x. A row depends on that row of x, weight and bias alone. Differentiable in x, weight and bias.

    Raises:
        TypeError: x, weight or bias is not a tensor.
        ValueError: dtypes differ or are not floating, shapes do not match, eps is negative, a tensor is not on the CPU.
    """
    want_tensors("layer_norm", x=x, weight=weight, bias=bias)
    return _layer_norm(x, weight, bias, eps)


@fake("layer_norm", **_INPUTS, bias="x [dim]")
def _(x, weight, bias, eps):
    _want_eps("layer_norm", eps)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@fake("layer_norm_backward", **_INPUTS, dy="like x")
def _(dy, x, weight, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight), torch.empty_like(weight)


def _layer_norm_setup_context(ctx, inputs, output):
    x, weight, _, eps = inputs
    ctx.save_for_backward(x, weight)
    ctx.eps = eps


def _layer_norm_backward(ctx, dy):
    dx, dweight, dbias = torch.ops.glm5.layer_norm_backward(dy, *ctx.saved_tensors, ctx.eps)
    return dx, dweight, dbias, None


torch.library.register_autograd("glm5::layer_norm", _layer_norm_backward, setup_context=_layer_norm_setup_context)
differentiable_once("layer_norm_backward")
