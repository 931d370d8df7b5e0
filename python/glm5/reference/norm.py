"""Normalisations, as specified."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """[..., dim], [dim] -> [..., dim]: normalise in at least float32, cast to x's dtype, then multiply by weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return normalised.to(x.dtype) * weight


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """[..., dim], [dim], [dim] -> [..., dim]: everything in at least float32, rounded to x's dtype once."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    normalised = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    return (normalised * weight.to(wide.dtype) + bias.to(wide.dtype)).to(x.dtype)
