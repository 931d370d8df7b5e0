"""Products of e4m3 matrices with block scales, as FP8 checkpoints hold them (DeepSeek-V3, section 3.3). Row-invariant: a
row's bits do not depend on the other rows, the tile, the group or the thread that computed it."""

import torch

from glm5 import _native  # noqa: F401  (registers the ops)
from glm5.ops._checks import want_tensors
from glm5.ops._register import compiled, fake, not_differentiable, want_that

_fp8_gemm = compiled("fp8_gemm")
_fp8_grouped_gemm = compiled("fp8_grouped_gemm")


def fp8_gemm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """``(a a_scale) (b b_scale)^T``, the product of two dequantised matrices, from their codes.

    Sums of 128 products, in float32, are multiplied by ``a_scale * b_scale`` and added in order, from k = 0; what comes out
    is rounded once. `quantize_fp8` gives codes and scales of a with block (1, 128), of b with block (128, 128).

    Args:
        a: [M, K] float8_e4m3fn.
        a_scale: [M, ceil(K / 128)] float32.
        b: [N, K] float8_e4m3fn.
        b_scale: [ceil(N / 128), ceil(K / 128)] float32.
        out_dtype: bfloat16 or float32.

    Returns:
        [M, N] in out_dtype. Row m depends on row m of a and a_scale alone (and on b and b_scale). A NaN code makes its row
        or column NaN. No gradient.

    Raises:
        TypeError: a, a_scale, b or b_scale is not a tensor.
        ValueError: another dtype or shape, another out_dtype, a tensor is not on the CPU.
    """
    want_tensors("fp8_gemm", a=a, a_scale=a_scale, b=b, b_scale=b_scale)
    return _fp8_gemm(a, a_scale, b, b_scale, out_dtype)


def fp8_grouped_gemm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    group_ends: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """`fp8_gemm` of the rows of every group with that group's matrix: one product per expert over rows sorted by expert.

    Args:
        a: [M, K] float8_e4m3fn, rows sorted by group.
        a_scale: [M, ceil(K / 128)] float32.
        b: [E, N, K] float8_e4m3fn.
        b_scale: [E, ceil(N / 128), ceil(K / 128)] float32.
        group_ends: [E] int32; group e is rows [group_ends[e-1], group_ends[e]), the first starts at row 0.
        out_dtype: bfloat16 or float32.

    Returns:
        [M, N] in out_dtype; rows from group_ends[E-1] on belong to no group and give 0. A row has the bits that
        ``fp8_gemm(row, row_scale, b[e], b_scale[e])`` gives it. No gradient.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: another dtype or shape, another out_dtype, group_ends falls or passes M, a tensor is not on the CPU.
    """
    want_tensors("fp8_grouped_gemm", a=a, a_scale=a_scale, b=b, b_scale=b_scale, group_ends=group_ends)
    return _fp8_grouped_gemm(a, a_scale, b, b_scale, group_ends, out_dtype)


# ---- fake kernels ----


def _check_blocks(op, a, a_scale, b, b_scale, out_dtype):
    rows, blocks = (b.shape[-2] + 127) // 128, (a.shape[1] + 127) // 128
    want_that(a_scale.shape[1] == blocks, op, "a_scale has shape", a_scale.shape, "[M, ceil(K / 128)]")
    want_that(b_scale.shape[-2] == rows, op, "b_scale has shape", b_scale.shape, "[..., ceil(N / 128), ceil(K / 128)]")
    want_that(b_scale.shape[-1] == blocks, op, "b_scale has shape", b_scale.shape, "[..., ceil(N / 128), ceil(K / 128)]")
    want_that(out_dtype in (torch.bfloat16, torch.float32), op, "out_dtype is", out_dtype, "bfloat16 or float32")


@fake("fp8_gemm", a="e4m3 [M, K]", a_scale="float32 [M, ka]", b="e4m3 [N, K]", b_scale="float32 [n, kb]")
def _(a, a_scale, b, b_scale, out_dtype):
    _check_blocks("fp8_gemm", a, a_scale, b, b_scale, out_dtype)
    return a.new_empty(a.shape[0], b.shape[0], dtype=out_dtype)


@fake(
    "fp8_grouped_gemm",
    a="e4m3 [M, K]",
    a_scale="float32 [M, ka]",
    b="e4m3 [E, N, K]",
    b_scale="float32 [E, n, kb]",
    group_ends="int32 [E]",
)
def _(a, a_scale, b, b_scale, group_ends, out_dtype):
    _check_blocks("fp8_grouped_gemm", a, a_scale, b, b_scale, out_dtype)
    return a.new_empty(a.shape[0], b.shape[1], dtype=out_dtype)


not_differentiable("fp8_gemm", "fp8_grouped_gemm")
