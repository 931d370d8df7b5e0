"""Quantisation to FP8, int8 and int4, as specified.

Everything here is float32 arithmetic, one rounding an operation, whatever the input's dtype: codes and scales are equal on
every backend, bit for bit. A NaN has one form: 0x7f in e4m3, the positive quiet NaN in a float. Where a ratio is NaN an
integer code is 0; the block's scale is NaN or inf then, so that the block comes back as NaN.
"""

import torch

LARGEST_E4M3 = 448.0


def quantize_fp8(
    x: torch.Tensor, block: tuple[int, int] = (1, 128), power_of_two: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., M, K] -> (e4m3 [..., M, K], float32 scale [..., ceil(M/bm), ceil(K/bk)]): scale = max(amax, 1e-4) / 448 of a
    block bm x bk, rounded up to a power of two if asked; code = x / scale, to nearest even."""
    x = x.float()
    scale = _one_nan(_block_amax(x, block).clamp_min(1e-4) / LARGEST_E4M3)
    if power_of_two:
        scale = _up_to_power_of_two(scale)
    ratio = (x / _spread(scale, block, x.shape)).clamp(-LARGEST_E4M3, LARGEST_E4M3)
    return _one_nan(ratio).to(torch.float8_e4m3fn), scale


def dequantize_fp8(
    q: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] = (1, 128), out_dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """q [..., M, K], scale [..., ceil(M/bm), ceil(K/bk)] -> q * scale [..., M, K], the float32 product rounded once."""
    return _one_nan((q.float() * _spread(scale.float(), block, q.shape)).to(out_dtype))


def quantize_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] -> (int8 [..., K], float32 scale [...]): scale = max(amax, 1e-10) / 127, code = rint(x / scale)."""
    x = x.float()
    scale = _one_nan(_amax(x, -1).clamp_min(1e-10) / 127)
    return _integers(x / scale[..., None]).clamp(-127, 127).to(torch.int8), scale


def quantize_int4(
    w: torch.Tensor, group_size: int = 128, symmetric: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """w [..., N, K] -> (packed uint8 [..., N, K/2], low nibble = even k, float32 scale [..., N, groups], zeros).

    Symmetric: scale = amax / 7, code = rint(w / scale) in two's complement, zeros None. Else, with lo and hi the least and
    greatest of the group and 0: scale = (hi/2 - lo/2) / 7.5, zero = rint(-lo / scale), code = rint(w / scale) + zero in
    0..15, zeros uint8 [..., N, groups]. Where the scale is 0 so are codes and zeros. group_size -1: the row is one group.
    """
    groups = 1 if group_size == -1 else w.shape[-1] // group_size
    w = w.float().unflatten(-1, (groups, group_size if group_size != -1 else w.shape[-1]))
    if symmetric:
        scale = _one_nan(_amax(w, -1) / 7)
        codes, zeros = _integers(_ratio(w, scale[..., None])).clamp(-8, 7), None
    else:
        nothing = w.new_zeros((*w.shape[:-1], 1))
        bounds = torch.cat([w, nothing], -1)
        lo, hi = bounds.amin(-1), bounds.amax(-1)
        scale = _one_nan((hi * 0.5 - lo * 0.5) / 7.5)
        zeros = _integers(_ratio(-lo, scale)).clamp(0, 15)
        codes = (_integers(_ratio(w, scale[..., None])) + zeros[..., None]).clamp(0, 15)
        zeros = zeros.to(torch.uint8)
    nibbles = codes.flatten(-2).to(torch.int32) & 15
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).to(torch.uint8), scale, zeros


def dequantize_int4(
    packed: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """packed [..., N, K/2], scale [..., N, groups], zeros None or [..., N, groups] -> (code - zero) * scale [..., N, K], the
    float32 product rounded once. Codes are in two's complement without zeros, else 0..15."""
    packed = packed.to(torch.int32)
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    groups = scale.shape[-1]
    codes = codes.unflatten(-1, (groups, codes.shape[-1] // max(groups, 1)))
    codes = (codes ^ 8) - 8 if zeros is None else codes - zeros[..., None].to(torch.int32)
    return _one_nan((codes.float() * scale[..., None].float()).to(out_dtype)).flatten(-2)


def fake_quantize_int4(x: torch.Tensor, group_size: int = 128, symmetric: bool = True) -> torch.Tensor:
    """x [..., N, K] -> x quantised and dequantised, in x's dtype; its gradient is handed on unchanged."""
    return _StraightThrough.apply(x, group_size, symmetric)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group_size, symmetric):
        return dequantize_int4(*quantize_int4(x, group_size, symmetric), out_dtype=x.dtype)

    @staticmethod
    def backward(ctx, dy):
        return dy, None, None


def _amax(x: torch.Tensor, dim) -> torch.Tensor:
    """The largest magnitude, 0 of nothing, NaN if there is one."""
    if x.numel() == 0:
        return x.sum(dim)
    return x.abs().amax(dim)


def _block_amax(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """x [..., M, K] -> largest magnitude of each block, those at the edges being cut off."""
    rows, columns = block
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % columns, 0, -x.shape[-2] % rows))
    row_blocks, column_blocks = padded.shape[-2] // rows, padded.shape[-1] // columns
    return _amax(padded.unflatten(-1, (column_blocks, columns)).unflatten(-3, (row_blocks, rows)), (-3, -1))


def _spread(scale: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """One scale a block -> one an element of ``shape``."""
    rows, columns = block
    return scale.repeat_interleave(rows, -2)[..., : shape[-2], :].repeat_interleave(columns, -1)[..., : shape[-1]]


def _up_to_power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """The least power of two that is not below a normal, positive float32; inf and NaN stay."""
    bits = (scale.view(torch.int32) + 0x7FFFFF) & ~0x7FFFFF
    return torch.where(scale.isfinite(), bits.view(torch.float32), scale)


def _ratio(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x / scale, 0 where the scale is 0."""
    return torch.where(scale == 0, 0.0, x / scale)


def _integers(ratio: torch.Tensor) -> torch.Tensor:
    """To the nearest integer, ties to even, NaN to 0."""
    return torch.where(ratio.isnan(), 0.0, ratio.round())


def _one_nan(x: torch.Tensor) -> torch.Tensor:
    """x with every NaN the positive quiet one."""
    return torch.where(x.isnan(), torch.nan, x)
