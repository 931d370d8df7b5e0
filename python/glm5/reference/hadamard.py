"""The Hadamard rotation of the FP8 indexer path, as specified."""

import torch

from glm5.reference._precision import wide


def rotate_hadamard(x: torch.Tensor) -> torch.Tensor:
    """x [..., dim], dim a power of two -> x H / sqrt(dim), H the Sylvester-ordered Hadamard matrix. Its own inverse."""
    dim = x.shape[-1]
    if dim == 0 or dim & (dim - 1):
        raise ValueError(f"rotate_hadamard: x has a last dimension of {dim}, want a power of two")
    (rotated,) = wide(x)
    h = 1
    while h < dim:
        pairs = rotated.unflatten(-1, (dim // (2 * h), 2, h))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        rotated = torch.stack([a + b, a - b], -2).flatten(-3)
        h *= 2
    return (rotated * dim**-0.5).to(x.dtype)
