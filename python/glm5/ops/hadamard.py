"""The Hadamard rotation of the FP8 indexer path on the compiled kernels."""

import torch

from glm5 import _native  # noqa: F401  (registers the ops)
from glm5.ops._checks import want_tensors
from glm5.ops._register import fake, want_that


def rotate_hadamard(x: torch.Tensor) -> torch.Tensor:
    """``x H / sqrt(dim)`` over the last dimension, H the Sylvester-ordered Hadamard matrix.

    Orthonormal, symmetric and its own inverse, so dot products of rotated vectors are those of the originals while
    outliers are spread over all dimensions: what the indexer does to q and k before quantising them to FP8
    (DeepSeek-V3.2).

    Args:
        x: [..., dim], dim a power of two; bfloat16, float32 or float64.

    Returns:
        [..., dim], dtype of x, computed in float32 (float64 for float64). A row depends on that row alone. Differentiable:
        the backward is the same rotation.

    Raises:
        TypeError: x is not a tensor.
        ValueError: dim is not a power of two, x is not floating or not on the CPU.
    """
    want_tensors("rotate_hadamard", x=x)
    return torch.ops.glm5.rotate_hadamard(x)


@fake("rotate_hadamard", x="float [..., dim+]")
def _(x):
    dim = x.shape[-1]
    want_that(dim & (dim - 1) == 0, "rotate_hadamard", "x has shape", x.shape, "a last dimension that is a power of two")
    return torch.empty_like(x, memory_format=torch.contiguous_format)


torch.library.register_autograd("glm5::rotate_hadamard", lambda ctx, dy: torch.ops.glm5.rotate_hadamard(dy))
