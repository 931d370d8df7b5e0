"""The three matrix products, as specified: accumulated in at least float32, rounded once."""

import torch

from glm5.reference._precision import wide


def linear(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x [M, K], w [N, K], bias [N] -> x w^T + bias [M, N] in out_dtype (x's dtype when None)."""
    x_wide, w_wide = wide(x, w)
    y = x_wide @ w_wide.T
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(out_dtype or x.dtype)


def batched_linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x [M, H, K], w [H, N, K] -> [M, H, N]: one product per head."""
    x_wide, w_wide = wide(x, w)
    return torch.einsum("mhk,hnk->mhn", x_wide, w_wide).to(x.dtype)


def grouped_linear(x: torch.Tensor, w: torch.Tensor, group_ends: torch.Tensor) -> torch.Tensor:
    """x [M, K] sorted by group, w [E, N, K], group_ends [E] int32 -> [M, N].

    Rows [group_ends[e-1], group_ends[e]) take w[e]; rows from group_ends[E-1] on belong to no group and give 0.
    """
    x_wide, w_wide = wide(x, w)
    ends = group_ends.tolist()
    parts = [x_wide[start:end] @ w_wide[e].T for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
    rest = x_wide.new_zeros(x.shape[0] - (ends[-1] if ends else 0), w.shape[1])
    return torch.cat([*parts, rest]).to(x.dtype)
