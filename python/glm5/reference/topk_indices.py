"""Deterministic top-k, as specified."""

import torch

from glm5.reference._precision import within


def topk_indices(
    scores: torch.Tensor, k: int, ks: torch.Tensor | None = None, ke: torch.Tensor | None = None
) -> torch.Tensor:
    """scores [R, N], ks and ke [R] int32 -> int32 [R, k]: columns of the k largest scores, ascending, padded with -1.

    Only columns in [ks, ke) compete. NaN and -inf are never selected, -0.0 ties with +0.0, ties go to the lower column.
    """
    rows, columns = scores.shape
    selectable = ~scores.isnan() & (scores != float("-inf"))
    if ks is not None or ke is not None:
        ks = scores.new_zeros(rows, dtype=torch.int32) if ks is None else ks
        ke = scores.new_full((rows,), columns, dtype=torch.int32) if ke is None else ke
        selectable &= within(ks, ke, columns)
    order = scores.detach().masked_fill(~selectable, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    order = order[:, :k]
    order = order.masked_fill(~selectable.gather(1, order), columns).sort(-1).values
    chosen = torch.full((rows, k), -1, dtype=torch.int32, device=scores.device)
    chosen[:, : order.shape[1]] = order.masked_fill(order == columns, -1).to(torch.int32)
    return chosen
