"""Normalisations, as specified."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """[..., dim], [dim] -> [..., dim]: normalise in at least float32, cast to x's dtype, then multiply by weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return normalised.to(x.dtype) * weight
