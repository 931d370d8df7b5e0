"""Rotary position embedding, as specified."""

import torch

from glm5.reference._precision import wide


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x [T, ..., D], cos and sin [P, D/2], positions [T] int -> x rotated by its token's position, shape and dtype of x.

    interleaved: pairs are (2i, 2i+1); otherwise (i, i + D/2). Each pair (a, b) becomes (a cos - b sin, b cos + a sin) in its
    own place.
    """
    x_wide, cos, sin = wide(x, cos, sin)
    shape = (x.shape[0],) + (1,) * (x.dim() - 2) + (x.shape[-1] // 2,)
    c, s = cos[positions.long()].view(shape), sin[positions.long()].view(shape)
    if interleaved:
        a, b = x_wide[..., 0::2], x_wide[..., 1::2]
        return torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2).to(x.dtype)
    a, b = x_wide.chunk(2, -1)
    return torch.cat([a * c - b * s, b * c + a * s], -1).to(x.dtype)
