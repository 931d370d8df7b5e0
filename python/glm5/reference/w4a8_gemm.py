"""int4 weights times int8 activations, as specified: the prepacked form in plain torch, products of dequantised values."""

import math

import torch


def w4a8_prepack(packed: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor | None = None) -> torch.Tensor:
    """packed uint8 [..., N, K/2] (low nibble = even k), scale float32 [..., N, groups], zeros uint8 like scale or None ->
    the CPU backend's form [..., N, groups, bytes], int8 without zeros, uint8 with them.

    Blocks of 16 columns, one after another; of a block, for each group: lines of 8 k (byte [column][j], j < 4: k = j in the
    low nibble, k = 4 + j in the high one; codes from 0), then scale [column]; after the groups zero [group][column].
    """
    n, groups = scale.shape[-2:]
    size = packed.shape[-1] * 2 // groups if groups else 0
    lines = -(-size // 8)
    before = packed.shape[:-2]
    matrices = math.prod(before)
    codes = torch.stack([packed & 15, packed >> 4], -1).reshape(matrices, n, groups, size)
    if zeros is None:
        codes = codes ^ 8
    filling = 0 if zeros is not None else 8
    codes = torch.nn.functional.pad(codes, (0, 8 * lines - size), value=filling).view(matrices, n, groups, lines, 2, 4)
    nibbles = codes[..., 0, :] | codes[..., 1, :] << 4
    scales = scale.float().reshape(matrices, n, groups, 1).clone(memory_format=torch.contiguous_format).view(torch.uint8)
    pieces = [nibbles.new_zeros(0)]
    for i in range(matrices):
        for block in range(0, n, 16):
            last = min(block + 16, n)
            part = torch.cat(
                [nibbles[i, block:last], scales[i, block:last].unsqueeze(2)], 2
            )  # [columns, groups, lines + 1, 4]
            pieces.append(part.permute(1, 2, 0, 3).flatten())
            if zeros is not None:
                pieces.append(zeros.reshape(matrices, n, groups)[i, block:last].T.flatten())
            pieces.append(nibbles.new_zeros((last - block) * groups * (8 * lines - size) // 2))
    row_bytes = 4 * lines + (4 if zeros is None else 5) + (8 * lines - size) // 2
    w = torch.cat(pieces).view(torch.int8 if zeros is None else torch.uint8)
    return w.view(*before, n, groups, row_bytes)


def w4a8_unpack(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What ``w4a8_prepack`` made w of: packed, scale, zeros (None for an int8 w)."""
    *before, n, groups, row_bytes = w.shape
    has_zeros = w.dtype == torch.uint8
    rest = row_bytes - (5 if has_zeros else 4)
    lines, size = rest // 4, rest // 4 * 8 - rest % 4 * 2
    matrices = math.prod(before)
    flat = w.contiguous().view(torch.uint8).reshape(matrices, n * groups * row_bytes)
    packed = flat.new_zeros(matrices, n, groups * size // 2)
    scale = torch.zeros(matrices, n, groups)
    zeros = flat.new_zeros(matrices, n, groups)
    for block in range(0, n, 16):
        last = min(block + 16, n)
        columns, start = last - block, block * groups * row_bytes
        length = groups * (lines + 1) * columns * 4
        part = flat[:, start : start + length].reshape(matrices, groups, lines + 1, columns, 4).permute(0, 3, 1, 2, 4)
        scale[:, block:last] = (
            part[..., lines, :].clone(memory_format=torch.contiguous_format).view(torch.float32).squeeze(-1)
        )
        nibbles = part[..., :lines, :]
        codes = torch.stack([nibbles & 15, nibbles >> 4], -2).reshape(matrices, columns, groups, lines * 8)[..., :size]
        codes = codes.reshape(matrices, columns, groups * size)
        if has_zeros:
            here = flat[:, start + length : start + length + groups * columns]
            zeros[:, block:last] = here.reshape(matrices, groups, columns).transpose(1, 2)
        else:
            codes = codes ^ 8
        packed[:, block:last] = codes[..., ::2] | codes[..., 1::2] << 4
    packed, scale, zeros = (t.view(*before, *t.shape[1:]) for t in (packed, scale, zeros))
    return packed, scale, zeros if has_zeros else None


def _dequantised(w, dtype):
    packed, scale, zeros = w4a8_unpack(w)
    size = packed.shape[-1] * 2 // max(1, scale.shape[-1])
    codes = torch.stack([packed & 15, packed >> 4], -1).view(*scale.shape, size).to(dtype)
    codes = torch.where(codes > 7, codes - 16, codes) if zeros is None else codes - zeros.unsqueeze(-1).to(dtype)
    return (codes * scale.unsqueeze(-1).to(dtype)).flatten(-2)


def w4a8_gemm(
    x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, out_dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """x int8 [M, K], x_scale [M], w [N, groups, bytes] from ``w4a8_prepack`` -> [M, N] in out_dtype: the product of the
    dequantised values. Computed in x_scale's dtype, float32 or float64; a float64 result is not rounded to out_dtype."""
    y = x.to(x_scale.dtype) @ _dequantised(w, x_scale.dtype).T * x_scale[:, None]
    return y if y.dtype == torch.float64 else y.to(out_dtype)


def w4a8_grouped_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    group_ends: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """x int8 [M, K] sorted by group, x_scale [M], w [E, N, groups, bytes], group_ends [E] int32 -> [M, N].

    Rows [group_ends[e-1], group_ends[e]) take w[e]; rows from group_ends[E-1] on belong to no group and give 0.
    """
    ends = group_ends.tolist()
    parts = [
        w4a8_gemm(x[start:end], x_scale[start:end], w[e], out_dtype)
        for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]
    dtype = torch.float64 if x_scale.dtype == torch.float64 else out_dtype
    return torch.cat([*parts, x_scale.new_zeros(x.shape[0] - (ends[-1] if ends else 0), w.shape[1], dtype=dtype)])
