"""Products of e4m3 matrices with block scales, as specified: the product of the dequantised matrices."""

import torch

from glm5.reference._precision import wide


def fp8_gemm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """a [M, K], a_scale [M, ceil(K/128)], b [N, K], b_scale [ceil(N/128), ceil(K/128)] -> [M, N] in out_dtype (float64 where
    an argument is): blocks of 128 along k, in order, each ``a_scale b_scale`` times the product of the codes."""
    a, a_scale, b, b_scale = wide(a, a_scale, b, b_scale)
    y = a.new_zeros(a.shape[0], b.shape[0])
    b_scale = b_scale.repeat_interleave(128, 0)[: b.shape[0]]
    for block in range(a_scale.shape[1]):
        k = slice(128 * block, 128 * (block + 1))
        y = y + (a[:, k] @ b[:, k].T) * (a_scale[:, block, None] * b_scale[None, :, block])
    return y.to(y.dtype if y.dtype == torch.float64 else out_dtype)


def fp8_grouped_gemm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    group_ends: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """a [M, K] sorted by group, b [E, N, K], b_scale [E, ceil(N/128), ceil(K/128)], group_ends [E] int32 -> [M, N].

    Rows [group_ends[e-1], group_ends[e]) take b[e]; rows from group_ends[E-1] on belong to no group and give 0.
    """
    ends = group_ends.tolist()
    parts = [
        fp8_gemm(a[start:end], a_scale[start:end], b[e], b_scale[e], out_dtype)
        for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]
    dtype = torch.float64 if torch.float64 in (a.dtype, a_scale.dtype, b.dtype, b_scale.dtype) else out_dtype
    rest = torch.zeros(a.shape[0] - (ends[-1] if ends else 0), b.shape[1], dtype=dtype, device=a.device)
    return torch.cat([*parts, rest])
