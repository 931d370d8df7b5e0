"""int4 weights as others store them, to and from the form of ``ops.quantize_int4``: (packed, scale, zeros).

* compressed-tensors "pack-quantized" (llm-compressor, Kimi-K2): int32 holding eight codes along K, stored + 8, the first in
  the lowest bits; scales mostly bfloat16; zero points, if any, packed likewise along N.
* msModelSlim W4A8_DYNAMIC (vllm-ascend): int8 holding two codes along the *output* dimension, the even row in the low
  nibble; one float32 scale a row; ``scale_bias``, 8 * (codes * scale) summed over K. The NPU multiplies int8 activations as
  two signed nibbles, x = 16 high + low + 8, and adds it for the 8.

Codes and scales are moved, never computed: a round trip gives the same bytes, and what could not come back is refused. How a
tensor is called, and in which file it lies, is the caller's.
"""

from typing import NamedTuple

import torch

# msModelSlim stores down_proj's scale_bias in 16 parts of K, so that up to 16 ranks can sum their own; the rest in one.
MSMODELSLIM_DOWN_PARTS = 16


class Int4Weight(NamedTuple):
    """Arguments of ``ops.dequantize_int4``."""

    packed: torch.Tensor  # [..., N, K / 2] uint8, low nibble = even k
    scale: torch.Tensor  # [..., N, groups] float32
    zeros: torch.Tensor | None  # [..., N, groups] uint8; None: codes in two's complement


class CompressedTensorsInt4(NamedTuple):
    """The tensors of one pack-quantized weight; field names are the checkpoint's suffixes."""

    weight_packed: torch.Tensor  # [..., N, ceil(K / 8)] int32
    weight_scale: torch.Tensor  # [..., N, groups]
    weight_shape: torch.Tensor  # [2] int64: N, K
    weight_zero_point: torch.Tensor | None  # [..., ceil(N / 8), groups] int32; None: symmetric


class MsModelSlimInt4(NamedTuple):
    """The tensors of one W4A8_DYNAMIC weight; field names are the checkpoint's suffixes."""

    weight: torch.Tensor  # [..., N / 2, K] int8
    weight_scale: torch.Tensor  # [..., N, 1] float32
    weight_offset: torch.Tensor  # [..., N, 1] float32, zeros
    scale_bias: torch.Tensor  # [..., N, parts] float32


# ---- compressed-tensors ----


def from_compressed_tensors(stored: CompressedTensorsInt4) -> Int4Weight:
    """The canonical form of a pack-quantized weight.

    Raises:
        ValueError: dtypes or shapes do not match, K is odd or no multiple of the groups, or padding is not zero.
    """
    packed, scale, shape, zero_point = stored
    _want("weight_packed", packed, torch.int32, 2)
    if shape.numel() != 2:
        raise ValueError(f"weight_shape has shape {[*shape.shape]}, want [2]: N and K")
    rows, columns = shape.tolist()
    if tuple(packed.shape[-2:]) != (rows, -(-columns // 8)):
        raise ValueError(f"weight_packed has shape {[*packed.shape]}, want [..., {rows}, {-(-columns // 8)}] (weight_shape)")
    _want_scale("weight_scale", scale, packed.shape[:-1], columns)
    nibbles = packed.flatten().view(torch.uint8).view(*packed.shape[:-1], 4 * packed.shape[-1])
    codes, padding = nibbles[..., : columns // 2], nibbles[..., columns // 2 :]
    if padding.any():
        raise ValueError(f"weight_packed holds codes beyond K = {columns}")
    if zero_point is None:
        return Int4Weight((codes ^ 0x88).contiguous(), scale.float().contiguous(), None)
    zeros = _unpack_rows(zero_point, scale)
    return Int4Weight(codes.contiguous(), scale.float().contiguous(), zeros)


def to_compressed_tensors(weight: Int4Weight, scale_dtype: torch.dtype = torch.bfloat16) -> CompressedTensorsInt4:
    """The pack-quantized form of a canonical weight.

    Raises:
        ValueError: dtypes or shapes do not match, a scale is not exact in ``scale_dtype``, or a zero point is above 15.
    """
    packed, scale, zeros = weight
    _want_canonical(weight)
    narrow = scale.to(scale_dtype)
    if not torch.equal(narrow.float().nan_to_num(), scale.nan_to_num()):
        raise ValueError(f"scale has values that are not exact in {scale_dtype}; give a wider scale_dtype")
    codes = packed ^ 0x88 if zeros is None else packed
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 4))
    rows, columns = packed.shape[-2], 2 * packed.shape[-1]
    return CompressedTensorsInt4(
        codes.flatten().view(torch.int32).view(*codes.shape[:-1], codes.shape[-1] // 4),
        narrow.contiguous(),
        torch.tensor([rows, columns]),
        None if zeros is None else _pack_rows(zeros),
    )


def _unpack_rows(zero_point: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[..., ceil(N / 8), groups] int32 -> [..., N, groups] uint8."""
    _want("weight_zero_point", zero_point, torch.int32, 2)
    rows, groups = scale.shape[-2:]
    if zero_point.shape != (*scale.shape[:-2], -(-rows // 8), groups):
        raise ValueError(
            f"weight_zero_point has shape {[*zero_point.shape]}, want [..., {-(-rows // 8)}, {groups}] (weight_scale's)"
        )
    eight = torch.arange(0, 32, 4, dtype=torch.int32)[:, None]
    zeros = (zero_point[..., None, :] >> eight & 15).to(torch.uint8).flatten(-3, -2)
    if zeros[..., rows:, :].any():
        raise ValueError(f"weight_zero_point holds zero points beyond N = {rows}")
    return zeros[..., :rows, :].contiguous()


def _pack_rows(zeros: torch.Tensor) -> torch.Tensor:
    """[..., N, groups] uint8 -> [..., ceil(N / 8), groups] int32."""
    if (zeros > 15).any():
        raise ValueError("zeros has values above 15")
    padded = torch.nn.functional.pad(zeros, (0, 0, 0, -zeros.shape[-2] % 8))
    eight = padded.unflatten(-2, (padded.shape[-2] // 8, 8)).long()
    return (eight << torch.arange(0, 32, 4)[:, None]).sum(-2).to(torch.int32)  # the upper half falls off


# ---- msModelSlim ----


def from_msmodelslim(stored: MsModelSlimInt4) -> Int4Weight:
    """The canonical form of a W4A8_DYNAMIC weight, each row one group. ``scale_bias`` follows from it and is checked.

    Raises:
        ValueError: dtypes or shapes do not match, K is odd, weight_offset is not zero, or scale_bias is not that of the
            codes.
    """
    weight, scale, offset, bias = stored
    _want("weight", weight, torch.int8, 2)
    rows, columns = 2 * weight.shape[-2], weight.shape[-1]
    if columns % 2:
        raise ValueError(f"weight has shape {[*weight.shape]}, want an even last dimension (two codes a byte)")
    for name, value in (("weight_scale", scale), ("weight_offset", offset)):
        _want(name, value, torch.float32, 2)
        if value.shape != (*weight.shape[:-2], rows, 1):
            raise ValueError(f"{name} has shape {[*value.shape]}, want [..., {rows}, 1] (two rows a byte of weight)")
    if offset.any():
        raise ValueError("weight_offset is not zero: only symmetric codes are read")
    pairs = weight.view(torch.uint8)
    codes = torch.stack([pairs & 15, pairs >> 4], -2).flatten(-3, -2)  # [..., N, K]
    canonical = Int4Weight(codes[..., 0::2] | codes[..., 1::2] << 4, scale.contiguous(), None)
    _check_scale_bias(bias, canonical)
    return canonical


def to_msmodelslim(weight: Int4Weight, parts: int = 1) -> MsModelSlimInt4:
    """The W4A8_DYNAMIC form of a canonical weight; ``parts`` is MSMODELSLIM_DOWN_PARTS for down_proj, else 1.

    Raises:
        ValueError: dtypes or shapes do not match, N is odd, there are zero points or several groups a row, or parts does not
            divide K.
    """
    packed, scale, zeros = weight
    _want_canonical(weight)
    if zeros is not None:
        raise ValueError("zeros is a tensor, want None: W4A8_DYNAMIC is symmetric")
    if scale.shape[-1] != 1:
        raise ValueError(f"scale has shape {[*scale.shape]}, want [..., N, 1]: W4A8_DYNAMIC has one scale a row")
    if packed.shape[-2] % 2:
        raise ValueError(f"packed has shape {[*packed.shape]}, want an even number of rows (two a byte)")
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    pairs = codes[..., 0::2, :] | codes[..., 1::2, :] << 4
    bias = _scale_bias(weight, parts)[0].float()
    return MsModelSlimInt4(pairs.contiguous().view(torch.int8), scale.contiguous(), torch.zeros_like(scale), bias)


def _scale_bias(weight: Int4Weight, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """8 * (codes * scale) summed over each of ``parts`` parts of K, in float64, and the same of magnitudes:
    [..., N, parts]."""
    columns = 2 * weight.packed.shape[-1]
    if parts < 1 or columns % parts:
        raise ValueError(f"scale_bias has {parts} parts, want a divisor of K = {columns}")
    nibbles = torch.stack([weight.packed & 15, weight.packed >> 4], -1).flatten(-2).to(torch.int16)
    codes = ((nibbles ^ 8) - 8).unflatten(-1, (parts, columns // parts))
    eight = 8 * weight.scale.double()
    return codes.sum(-1) * eight, codes.abs().sum(-1) * eight.abs()


def _check_scale_bias(bias: torch.Tensor, weight: Int4Weight) -> None:
    _want("scale_bias", bias, torch.float32, 2)
    if bias.shape[:-1] != weight.scale.shape[:-1]:
        raise ValueError(
            f"scale_bias has shape {[*bias.shape]}, want [..., {weight.scale.shape[-2]}, parts] (two rows a byte)"
        )
    want, size = _scale_bias(weight, bias.shape[-1])
    wrong = ~((bias.double() - want).abs() <= 1e-5 * size)  # a float32 sum in any order
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"scale_bias{list(at)} is {bias[at].item():g}, want {want[at].item():g}, "
            "the sum over K of 8 * codes * weight_scale"
        )


# ---- checks ----


def _want(name: str, value: torch.Tensor, dtype: torch.dtype, dims: int) -> None:
    if value.dtype != dtype:
        raise ValueError(f"{name} has dtype {value.dtype}, want {dtype}")
    if value.dim() < dims:
        raise ValueError(f"{name} has shape {[*value.shape]}, want at least {dims} dimensions")


def _want_scale(name: str, scale: torch.Tensor, rows: torch.Size, columns: int) -> None:
    if not scale.is_floating_point() or scale.dtype == torch.float64:
        raise ValueError(f"{name} has dtype {scale.dtype}, want one that float32 holds")
    if scale.dim() < 2 or scale.shape[:-1] != rows:
        raise ValueError(f"{name} has shape {[*scale.shape]}, want {[*rows]} and the groups")
    groups = scale.shape[-1]
    if columns % 2 or groups == 0 or columns % (2 * groups):
        raise ValueError(f"{name} has shape {[*scale.shape]}, want groups of equal, even size for K = {columns}")


def _want_canonical(weight: Int4Weight) -> None:
    packed, scale, zeros = weight
    _want("packed", packed, torch.uint8, 2)
    _want("scale", scale, torch.float32, 2)
    _want_scale("scale", scale, packed.shape[:-1], 2 * packed.shape[-1])
    if zeros is not None:
        _want("zeros", zeros, torch.uint8, 2)
        if zeros.shape != scale.shape:
            raise ValueError(f"zeros has shape {[*zeros.shape]}, want that of scale, {[*scale.shape]}")
