"""Quantisation to FP8, int8 and int4 and back on the compiled kernels.

Codes and scales are defined in float32 arithmetic to the bit, in ``glm5.reference``: every instruction set gives the same.
None of it carries a gradient but ``fake_quantize_int4``, which hands its on.
"""

import torch

from glm5 import _native  # noqa: F401  (registers the ops)
from glm5.ops._checks import want_booleans, want_dtype, want_integers, want_tensors
from glm5.ops._register import compiled, fake, not_differentiable, want_that

_quantize_fp8 = compiled("quantize_fp8")
_dequantize_fp8 = compiled("dequantize_fp8")
_quantize_int8 = compiled("quantize_int8")
_quantize_int4 = compiled("quantize_int4")
_dequantize_int4 = compiled("dequantize_int4")
_fake_quantize_int4 = compiled("fake_quantize_int4")


def quantize_fp8(
    x: torch.Tensor, block: tuple[int, int] = (1, 128), power_of_two: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes with one scale a block: 1 x 128 for activations, 128 x 128 for weights (DeepSeek-V3, 2412.19437, 3.3.2).

    ``scale = max(amax, 1e-4) / 448`` of the block, ``q = e4m3(x / scale)``, to nearest even. Blocks at the edges are cut
    off. A block that holds NaN or infinity has that for its scale, and comes back as NaN.

    Args:
        x: [..., M, K], bfloat16 or float32.
        block: (1, 128) or (128, 128), rows and columns of a block.
        power_of_two: rounds each scale up to a power of two (DeepGEMM's ue8m0 scales).

    Returns:
        q [..., M, K] float8_e4m3fn and scale [..., ceil(M / rows), ceil(K / 128)] float32. No gradient.

    Raises:
        TypeError: x is not a tensor, block not a pair of integers, power_of_two not a bool.
        ValueError: x is not bfloat16 or float32, has less than two dimensions, or is not on the CPU; another block.
    """
    want_tensors("quantize_fp8", x=x)
    want_booleans("quantize_fp8", power_of_two=power_of_two)
    return _quantize_fp8(x, *_pair("quantize_fp8", block), power_of_two)


def dequantize_fp8(
    q: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] = (1, 128), out_dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """``q * scale``, block by block: the float32 product, rounded once.

    Args:
        q: [..., M, K] float8_e4m3fn.
        scale: [..., ceil(M / rows), ceil(K / 128)] float32.
        block: (1, 128) or (128, 128), rows and columns of a block.
        out_dtype: bfloat16 or float32.

    Returns:
        [..., M, K] of out_dtype. No gradient.

    Raises:
        TypeError: q or scale is not a tensor, block not a pair of integers, out_dtype not a dtype.
        ValueError: wrong dtypes, shapes that do not match, another block, a tensor not on the CPU.
    """
    want_tensors("dequantize_fp8", q=q, scale=scale)
    want_dtype("dequantize_fp8", out_dtype=out_dtype)
    return _dequantize_fp8(q, scale, *_pair("dequantize_fp8", block), out_dtype)


def quantize_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 codes with one scale a row (a token): the activations of W4A8 and W8A8.

    ``scale = max(amax, 1e-10) / 127`` of the row, ``q = rint(x / scale)``, ties to even. A row that holds NaN or infinity
    has that for its scale and codes 0, so that it comes back as NaN.

    Args:
        x: [..., K], bfloat16 or float32.

    Returns:
        q [..., K] int8 in [-127, 127] and scale [...] float32. No gradient.

    Raises:
        TypeError: x is not a tensor.
        ValueError: x is not bfloat16 or float32, has no dimension, or is not on the CPU.
    """
    want_tensors("quantize_int8", x=x)
    return _quantize_int8(x)


def quantize_int4(
    w: torch.Tensor, group_size: int = 128, symmetric: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """int4 codes, two a byte, with one scale a group of ``group_size`` consecutive k.

    Symmetric: ``scale = amax / 7``, ``code = rint(w / scale)``. Else, with lo and hi the least and the greatest of the group
    and of 0: ``scale = (hi / 2 - lo / 2) / 7.5``, ``zero = rint(-lo / scale)``, ``code = rint(w / scale) + zero`` cut off to
    [0, 15]. Where the scale is 0 so are code and zero. A group that holds NaN or infinity has that for its scale, codes and
    zero 0, and comes back as NaN.

    Args:
        w: [..., N, K], bfloat16 or float32; K even, and a multiple of group_size.
        group_size: 32, 64, 128, or -1 for the whole row.
        symmetric: codes around 0 in two's complement, else with a zero point a group.

    Returns:
        packed [..., N, K / 2] uint8, the even k in the low nibble, scale [..., N, groups] float32, and zeros [..., N,
        groups] uint8, None if symmetric. No gradient.

    Raises:
        TypeError: w is not a tensor, group_size not an integer, symmetric not a bool.
        ValueError: w is not bfloat16 or float32, has less than two dimensions, or is not on the CPU; K is odd or no multiple
            of group_size; another group_size.
    """
    want_tensors("quantize_int4", w=w)
    want_integers("quantize_int4", group_size=group_size)
    want_booleans("quantize_int4", symmetric=symmetric)
    packed, scale, zeros = _quantize_int4(w, group_size, symmetric)
    return packed, scale, None if symmetric else zeros


def dequantize_int4(
    packed: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """``(code - zero) * scale``: the float32 product, rounded once. The size of a group follows from the shapes.

    Args:
        packed: [..., N, K / 2] uint8, the even k in the low nibble: in two's complement, or 0 to 15 with zeros.
        scale: [..., N, groups] float32; K is a multiple of 2 groups.
        zeros: [..., N, groups] uint8, or None: 0.
        out_dtype: bfloat16 or float32.

    Returns:
        [..., N, K] of out_dtype. No gradient.

    Raises:
        TypeError: packed, scale or zeros is not a tensor, out_dtype not a dtype.
        ValueError: wrong dtypes, shapes that do not match, a tensor not on the CPU.
    """
    want_tensors("dequantize_int4", packed=packed, scale=scale, **({} if zeros is None else {"zeros": zeros}))
    want_dtype("dequantize_int4", out_dtype=out_dtype)
    return _dequantize_int4(packed, scale, zeros, out_dtype)


def fake_quantize_int4(x: torch.Tensor, group_size: int = 128, symmetric: bool = True) -> torch.Tensor:
    """What ``quantize_int4`` leaves of x: ``dequantize_int4(*quantize_int4(x, ...), x.dtype)`` bit for bit, for training.

    Args:
        x: [..., N, K], bfloat16 or float32; K even, and a multiple of group_size.
        group_size: 32, 64, 128, or -1 for the whole row.
        symmetric: codes around 0, else with a zero point a group.

    Returns:
        [..., N, K], dtype of x. Differentiable straight through: the gradient is handed on unchanged (Bengio et al. 2013,
        1308.3432).

    Raises:
        TypeError: x is not a tensor, group_size not an integer, symmetric not a bool.
        ValueError: as ``quantize_int4``.
    """
    want_tensors("fake_quantize_int4", x=x)
    want_integers("fake_quantize_int4", group_size=group_size)
    want_booleans("fake_quantize_int4", symmetric=symmetric)
    return _fake_quantize_int4(x, group_size, symmetric)


def _pair(op, block):
    if not isinstance(block, tuple | list) or len(block) != 2:
        raise TypeError(f"{op}: block is {block!r}, want a pair of int: (1, 128) or (128, 128)")
    want_integers(op, **{"block[0]": block[0], "block[1]": block[1]})
    return block


# ---- fake kernels ----


def _scale_shape(op, shape, block_rows, block_columns):
    allowed = ((1, 128), (128, 128))
    want_that((block_rows, block_columns) in allowed, op, "block is", (block_rows, block_columns), "(1, 128) or (128, 128)")
    return (*shape[:-2], -(-shape[-2] // block_rows), -(-shape[-1] // block_columns))


def _group_shape(op, name, shape, group_size):
    want_that(group_size in (32, 64, 128, -1), op, "group_size is", group_size, "32, 64, 128 or -1 (a row)")
    if group_size == -1:
        want_that(shape[-1] % 2 == 0, op, f"{name} has shape", shape, "an even last dimension (two codes a byte)")
        return (*shape[:-1], 1)
    want_that(
        shape[-1] % group_size == 0,
        op,
        f"{name} has shape",
        shape,
        f"a last dimension that group_size = {group_size} divides",
    )
    return (*shape[:-1], shape[-1] // group_size)


def _want_out_dtype(op, out_dtype):
    want_that(out_dtype in (torch.bfloat16, torch.float32), op, "out_dtype is", out_dtype, "torch.bfloat16 or torch.float32")


@fake("quantize_fp8", x="bfloat16/float32 [..., M, K]")
def _(x, block_rows, block_columns, power_of_two):
    scale_shape = _scale_shape("quantize_fp8", x.shape, block_rows, block_columns)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(scale_shape, dtype=torch.float32)


@fake("dequantize_fp8", q="e4m3 [..., M, K]", scale="float32 [..., MB, KB]")
def _(q, scale, block_rows, block_columns, out_dtype):
    op = "dequantize_fp8"
    _want_shape(op, "scale", scale, _scale_shape(op, q.shape, block_rows, block_columns), "one a block of q")
    _want_out_dtype(op, out_dtype)
    return q.new_empty(q.shape, dtype=out_dtype)


@fake("quantize_int8", x="bfloat16/float32 [..., K]")
def _(x):
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


@fake("quantize_int4", w="bfloat16/float32 [..., N, K]")
def _(w, group_size, symmetric):
    scale_shape = _group_shape("quantize_int4", "w", w.shape, group_size)
    packed = w.new_empty((*w.shape[:-1], w.shape[-1] // 2), dtype=torch.uint8)
    zeros = w.new_empty((0,) if symmetric else scale_shape, dtype=torch.uint8)
    return packed, w.new_empty(scale_shape, dtype=torch.float32), zeros


@fake("dequantize_int4", packed="uint8 [..., N, K/2]", scale="float32 [..., N, groups]", zeros="uint8 [..., N, groups]")
def _(packed, scale, zeros, out_dtype):
    op = "dequantize_int4"
    _want_shape(op, "scale", scale, (*packed.shape[:-1], scale.shape[-1]), "one a group of packed's rows")
    if zeros is not None:
        _want_shape(op, "zeros", zeros, scale.shape, "that of scale")
    codes, groups = 2 * packed.shape[-1], scale.shape[-1]
    wanted = f"groups of equal, even size for the {codes} codes of a row of packed"
    if not isinstance(codes, int) or codes > 0:
        want_that(groups >= 1, op, "scale has shape", scale.shape, wanted)
        want_that(codes % (2 * groups) == 0, op, "scale has shape", scale.shape, wanted)
    _want_out_dtype(op, out_dtype)
    return packed.new_empty((*packed.shape[:-1], codes), dtype=out_dtype)


@fake("fake_quantize_int4", x="bfloat16/float32 [..., N, K]")
def _(x, group_size, symmetric):
    _group_shape("fake_quantize_int4", "x", x.shape, group_size)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _want_shape(op, name, value, want, why):
    want_that(value.dim() == len(want), op, f"{name} has shape", value.shape, f"{[*want]} ({why})")
    for got, size in zip(value.shape, want, strict=True):
        want_that(got == size, op, f"{name} has shape", value.shape, f"{[*want]} ({why})")


not_differentiable("quantize_fp8", "dequantize_fp8", "quantize_int8", "quantize_int4", "dequantize_int4")


# ---- gradients ----


def _straight_through(ctx, dy):
    return dy, None, None


torch.library.register_autograd("glm5::fake_quantize_int4", _straight_through)
