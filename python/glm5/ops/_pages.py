"""What the fake kernels of all ops on pages want of a pool; the compiled side's csrc/common/pages.h."""

import torch

from glm5.ops._register import want_that


def latent_dims(width: int | torch.SymInt) -> int | torch.SymInt:
    """Dims of a latent row of so many bytes in an FP8 cache."""
    return width // 132 * 128 + width % 132 // 2


def latent_pool(like: str, dim: str):
    """What ``fake`` wants of a pool of latent rows: pages of ``like``'s dtype with rows of ``dim``, or bytes."""
    return lambda arguments: "uint8 [P, S+, W]" if arguments["cache"].dtype == torch.uint8 else f"{like} [P, S+, {dim}]"


def want_latent_pool(op: str, cache: torch.Tensor) -> None:
    """Raises ValueError unless rows of bytes are such as latent rows have."""
    if cache.dtype == torch.uint8:
        right = cache.shape[2] % 132 % 2 == 0
        want_that(right, op, "cache has shape", cache.shape, "rows of 132 bytes for each 128 FP8 dims and 2 for each other")


def want_latent_rows(op: str, cache: torch.Tensor, dim: int | torch.SymInt) -> None:
    """The same, and that they have ``dim`` dims."""
    want_latent_pool(op, cache)
    if cache.dtype == torch.uint8:
        want_that(latent_dims(cache.shape[2]) == dim, op, "cache has shape", cache.shape, f"rows of {dim} dims")
