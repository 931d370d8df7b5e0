"""Specs of int4 weights times int8 activations. What is moved is equal bit for bit; products are held to the dequantised
float64 reference."""

import torch

from glm5 import reference
from glm5.testing.spec import OpSpec, as_tuple, register

# Around blocks of 16 columns and pairs of them, and tiles of rows; 0 is a size like any other.
_COLUMNS = [33, 1, 16, 48, 7, 31, 70, 0]
_ROWS = [3, 1, 0, 2, 5, 8, 9, 13, 17, 33, 40]
_GROUPS = [(128, 2), (32, 3), (64, 2), (32, 8), (128, 5), (64, 1), (32, 0)]
# One group a row: any even k.
_INNER = [100, 2, 32, 6, 120, 250, 1000, 3332, 0]


def draw_weight(draw, *before: int) -> dict:
    """packed, scale and, half of the time, zeros of a random int4 weight [*before, N, K]."""
    n = draw.choice(_COLUMNS)
    size, groups = (draw.choice(_INNER), 1) if draw.integer(0, 2) == 0 else draw.choice(_GROUPS)
    kind = draw.choice(["any", "lowest", "highest"])
    generator = torch.Generator().manual_seed(draw.integer(0, 2**31 - 1))
    packed = torch.randint(0, 256, (*before, n, groups * size // 2), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (*before, n, groups), generator=generator, dtype=torch.uint8)
    symmetric = draw.integer(0, 1) == 0
    if kind != "any":  # -8 and 7, or codes and zero points as far apart as they can be
        packed.fill_((0x88 if symmetric else 0x00) if kind == "lowest" else (0x77 if symmetric else 0xFF))
        zeros.fill_(15 if kind == "lowest" else 0)
    scale = draw.tensor(*before, n, groups, scale=draw.choice([0.01, 1.0])).abs() + 1e-6
    return {"packed": packed, "scale": scale} | ({} if symmetric else {"zeros": zeros})


def _draw_prepack(draw, dtype):
    return draw_weight(draw, *draw.choice([(), (2,), (0,), (2, 3), (3,)]))


def _prepacked(draw, *before):
    return reference.w4a8_prepack(**draw_weight(draw, *before))


def _unpacked(outputs, arguments):
    """packed, scale and zeros: rows, which columns of a prepacked weight are not. Of a batch, the matrices."""
    return as_tuple(reference.w4a8_unpack(outputs[0]))


def _select_packed_rows(arguments, rows):
    """Some columns, or matrices of a batch, prepacked as if there were no others."""
    unpacked = as_tuple(reference.w4a8_unpack(arguments["w"]))
    return {"w": reference.w4a8_prepack(*(t[rows] for t in unpacked))}, rows


def _draw_unpack(draw, dtype):
    return {"w": _prepacked(draw, *draw.choice([(), (2,), (0,), (2, 3), (3,)]))}


def _inner(w):
    rest = w.shape[-1] - (5 if w.dtype == torch.uint8 else 4)
    return w.shape[-2] * (rest // 4 * 8 - rest % 4 * 2)


def _draw_rows(draw, rows, w):
    kind = draw.choice(["any", "lowest", "highest", "few"])
    generator = torch.Generator().manual_seed(draw.integer(0, 2**31 - 1))
    x = torch.randint(-128, 128, (rows, _inner(w)), generator=generator, dtype=torch.int8)
    if kind in ("lowest", "highest"):
        x.fill_(-128 if kind == "lowest" else 127)
    elif kind == "few":
        x[torch.rand(x.shape, generator=generator) < 0.9] = 0
    return {"x": x, "x_scale": draw.tensor(rows, scale=0.01).abs() + 1e-6}


def _draw_gemm(draw, dtype):
    w = _prepacked(draw)
    return {**_draw_rows(draw, draw.choice(_ROWS), w), "w": w, "out_dtype": dtype}


def _draw_grouped(draw, dtype):
    rows, groups = draw.choice(_ROWS), draw.choice([3, 1, 2, 8, 0])
    w = _prepacked(draw, groups)
    # Sorted cuts: empty groups happen, and so do rows past the last group.
    ends = sorted(draw.integer(0, rows) for _ in range(groups))
    group_ends = torch.tensor(ends, dtype=torch.int32)
    return {**_draw_rows(draw, rows, w), "w": w, "group_ends": group_ends, "out_dtype": dtype}


def _select_grouped_rows(arguments, rows):
    rows = rows.sort().values
    ends = torch.searchsorted(rows, arguments["group_ends"].long()).to(torch.int32)
    return {**arguments, "x": arguments["x"][rows], "x_scale": arguments["x_scale"][rows], "group_ends": ends}, rows


_ROWS_OF = {"rows": ("x", "x_scale"), "outputs": ("rows",), "budget": "quantized"}
_PACKING = {"dtypes": (torch.float32,), "bitwise": True, "outputs": ("rows", "rows", "rows")}
register(OpSpec("w4a8_prepack", _draw_prepack, rows=("packed", "scale", "zeros"), in_rows=_unpacked, **_PACKING))
register(OpSpec("w4a8_unpack", _draw_unpack, rows=("w",), select_rows=_select_packed_rows, poisons=(), **_PACKING))
register(OpSpec("w4a8_gemm", _draw_gemm, **_ROWS_OF))
register(OpSpec("w4a8_grouped_gemm", _draw_grouped, select_rows=_select_grouped_rows, **_ROWS_OF))
