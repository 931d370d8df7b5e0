"""Deterministic top-k selection on the compiled kernels."""

import torch

from glm5 import _native  # noqa: F401  (registers the ops)
from glm5.ops._checks import want_integers, want_tensors
from glm5.ops._register import fake, not_differentiable, want_that


def topk_indices(
    scores: torch.Tensor, k: int, ks: torch.Tensor | None = None, ke: torch.Tensor | None = None
) -> torch.Tensor:
    """Columns of the k largest scores of each row, in ascending order of column.

    Ties go to the lower column, -0.0 ties with +0.0, NaN and -inf are never selected. The row-wise selection of DeepSeek
    Sparse Attention (DeepSeek-V3.2, eq. 2), made free of chance.

    Args:
        scores: [rows, cols], bfloat16, float32 or float64.
        k: how many columns, >= 0; it may exceed cols.
        ks, ke: int32 [rows]; only columns in [ks, ke) compete. None stands for 0 and for cols. ke <= ks is an empty range.

    Returns:
        int32 [rows, k], padded with -1 where fewer than k columns can be selected. Not differentiable.

    Raises:
        TypeError: scores, ks or ke is not a tensor, k not an integer.
        ValueError: wrong dtype, shape or device, k < 0, ks < 0, ke > cols.
    """
    optional = {name: value for name, value in (("ks", ks), ("ke", ke)) if value is not None}
    want_tensors("topk_indices", scores=scores, **optional)
    want_integers("topk_indices", k=k)
    return torch.ops.glm5.topk_indices(scores, k, ks, ke)


@fake("topk_indices", scores="float [rows, cols]", ks="int32 [rows]", ke="int32 [rows]")
def _(scores, k, ks=None, ke=None):
    want_that(k >= 0, "topk_indices", "k is", k, "a number >= 0")
    return scores.new_empty((scores.shape[0], k), dtype=torch.int32)


not_differentiable("topk_indices")
