"""int4 weights times int8 activations: groups of exact integer sums, float32 scales, one order for every row.

A weight is prepacked once, for the kernels of this backend, and can be had back bit for bit. Quantising is the business of
``quantize_int4`` and ``quantize_int8``.
"""

import torch

from glm5 import _native  # noqa: F401  (registers the ops)
from glm5.ops._checks import want_tensors
from glm5.ops._register import compiled, fake, not_differentiable, want_that

_gemm = compiled("w4a8_gemm")
_grouped_gemm = compiled("w4a8_grouped_gemm")

_LONGEST_GROUP = 2**18


def w4a8_prepack(packed: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor | None = None) -> torch.Tensor:
    """The weight in the order in which ``w4a8_gemm`` reads it; ``w4a8_unpack`` gives the arguments back bit for bit.

    Args:
        packed: uint8 [..., N, K/2], two codes a byte, low nibble = even k: in two's complement, [-8, 7], without zeros,
            else in [0, 15].
        scale: float32 [..., N, groups]: groups of 32, 64 or 128 k, or one group of all (up to 2^18) k.
        zeros: uint8 [..., N, groups], in [0, 15], or None. A weight is (code - zero) * scale, and code * scale without
            zeros.

    Returns:
        [..., N, groups, bytes], int8 without zeros, uint8 with them. What it holds is private to this backend, the same on
        every instruction set; its shape and dtype tell the products all they must know of it. Index its leading dimensions,
        but not N. Not differentiable.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: wrong dtype, shape or device; a group of another size; a zero point over 15.
    """
    optional = {} if zeros is None else {"zeros": zeros}
    want_tensors("w4a8_prepack", packed=packed, scale=scale, **optional)
    return torch.ops.glm5.w4a8_prepack(packed, scale, zeros)


def w4a8_unpack(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What ``w4a8_prepack`` made ``w`` of.

    Args:
        w: [..., N, groups, bytes] from ``w4a8_prepack``.

    Returns:
        packed uint8 [..., N, K/2], scale float32 [..., N, groups], zeros uint8 [..., N, groups] or None. Not
        differentiable.

    Raises:
        TypeError: w is not a tensor.
        ValueError: w has not the dtype and shape of a prepacked weight, or is not on the CPU.
    """
    want_tensors("w4a8_unpack", w=w)
    packed, scale, zeros = torch.ops.glm5.w4a8_unpack(w)
    return packed, scale, (zeros if w.dtype == torch.uint8 else None)


def w4a8_gemm(
    x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, out_dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """``(x_scale x) w^T`` for int8 rows and int4 columns (as in QServe, W4A8 with groups, section 4.1).

    The sum over a group is exact in int32; it is rounded to float32, multiplied by the weight's scale and added, by a fused
    multiply-add, to the sum of the groups before it; the total is multiplied by x_scale and rounded to out_dtype. Every
    instruction set gives the same bits.

    Args:
        x: int8 [M, K].
        x_scale: float32 [M].
        w: [N, groups, bytes] from ``w4a8_prepack``.
        out_dtype: bfloat16 or float32.

    Returns:
        [M, N] in out_dtype. Row m depends on row m of x and x_scale alone (and on w). Not differentiable.

    Raises:
        TypeError: x, x_scale or w is not a tensor.
        ValueError: wrong dtype, shape or device, K is not that of w, another out_dtype.
    """
    want_tensors("w4a8_gemm", x=x, x_scale=x_scale, w=w)
    return _gemm(x, x_scale, w, out_dtype)


def w4a8_grouped_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    group_ends: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """``w4a8_gemm`` with weights of its own for each group of rows: one product per expert over rows sorted by expert.

    Args:
        x: int8 [M, K], rows sorted by group.
        x_scale: float32 [M].
        w: [E, N, groups, bytes] from ``w4a8_prepack``.
        group_ends: [E] int32; group e is rows [group_ends[e-1], group_ends[e]), the first starts at row 0.
        out_dtype: bfloat16 or float32.

    Returns:
        [M, N] in out_dtype; rows from group_ends[E-1] on belong to no group and give 0. A row has the bits that
        ``w4a8_gemm(row, its scale, w[e])`` gives it. Not differentiable.

    Raises:
        TypeError: x, x_scale, w or group_ends is not a tensor.
        ValueError: wrong dtype, shape or device, K is not that of w, another out_dtype, group_ends falls or passes M.
    """
    want_tensors("w4a8_grouped_gemm", x=x, x_scale=x_scale, w=w, group_ends=group_ends)
    return _grouped_gemm(x, x_scale, w, group_ends, out_dtype)


# ---- fake kernels ----


def _group_size(op, w):
    """k in a group of the weight, from its shape: lines of 8 k, the scale, the zero point, a byte for 2 k of padding."""
    rest = w.shape[-1] - (5 if w.dtype == torch.uint8 else 4)
    size = rest // 4 * 8 - rest % 4 * 2
    allowed = size == 32 or size == 64 or size == 128 if w.shape[-2] > 1 else w.shape[-2] == 1 or size == 0
    for condition in (rest >= 0, size >= 0, size <= _LONGEST_GROUP, allowed):
        want_that(condition, op, "w has shape", w.shape, "that of a weight from w4a8_prepack")
    return size


@fake("w4a8_prepack", packed="uint8 [..., N, bytes]", scale="float32 [..., N, groups]", zeros="uint8 [..., N, groups]")
def _(packed, scale, zeros=None):
    op = "w4a8_prepack"
    k, groups = 2 * packed.shape[-1], scale.shape[-1]
    want_that(scale.dim() == packed.dim(), op, "scale has shape", scale.shape, f"{packed.dim()} dimensions")
    for got, size in zip(scale.shape[:-1], packed.shape[:-1], strict=True):
        want_that(got == size, op, "scale has shape", scale.shape, f"the leading dimensions of packed, {[*packed.shape]}")
    if zeros is not None:
        want_that(zeros.dim() == scale.dim(), op, "zeros has shape", zeros.shape, f"that of scale, {[*scale.shape]}")
        for got, size in zip(zeros.shape, scale.shape, strict=True):
            want_that(got == size, op, "zeros has shape", zeros.shape, f"that of scale, {[*scale.shape]}")
    size = k // groups if groups != 0 else 0
    want = "one scale a row, or for each 32, 64 or 128 k of packed"
    want_that(size * groups == k, op, "scale has shape", scale.shape, want)
    if groups > 1:
        want_that(size == 32 or size == 64 or size == 128, op, "scale has shape", scale.shape, want)
    want_that(size <= _LONGEST_GROUP, op, "packed has shape", packed.shape, f"at most {_LONGEST_GROUP} k in a group")
    lines = (size + 7) // 8
    row_bytes = 4 * lines + (4 if zeros is None else 5) + (8 * lines - size) // 2
    return packed.new_empty((*packed.shape[:-1], groups, row_bytes), dtype=torch.int8 if zeros is None else torch.uint8)


@fake("w4a8_unpack", w="int8/uint8 [..., N, groups, bytes]")
def _(w):
    n, groups = w.shape[-3], w.shape[-2]
    size = _group_size("w4a8_unpack", w)
    packed = w.new_empty((*w.shape[:-3], n, groups * size // 2), dtype=torch.uint8)
    scale = w.new_empty((*w.shape[:-3], n, groups), dtype=torch.float32)
    return packed, scale, w.new_empty((*w.shape[:-3], n, groups if w.dtype == torch.uint8 else 0), dtype=torch.uint8)


def _product(op, x, w, out_dtype):
    k = w.shape[-2] * _group_size(op, w)
    want_that(x.shape[1] == k, op, "x has shape", x.shape, f"size {k} in dimension 1 (the k of w)")
    allowed = (torch.bfloat16, torch.float32)
    want_that(out_dtype in allowed, op, "out_dtype is", out_dtype, "torch.bfloat16 or torch.float32")
    return x.new_empty((x.shape[0], w.shape[-3]), dtype=out_dtype)


@fake("w4a8_gemm", w="int8/uint8 [N, groups, bytes]", x="int8 [M, K]", x_scale="float32 [M]")
def _(x, x_scale, w, out_dtype):
    return _product("w4a8_gemm", x, w, out_dtype)


@fake(
    "w4a8_grouped_gemm", w="int8/uint8 [E, N, groups, bytes]", x="int8 [M, K]", x_scale="float32 [M]", group_ends="int32 [E]"
)
def _(x, x_scale, w, group_ends, out_dtype):
    return _product("w4a8_grouped_gemm", x, w, out_dtype)


not_differentiable("w4a8_prepack", "w4a8_unpack", "w4a8_gemm", "w4a8_grouped_gemm")
