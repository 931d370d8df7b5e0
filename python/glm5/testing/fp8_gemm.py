"""Specs of the FP8 products. ``dtype`` is that of the output."""

import torch

from glm5.testing.spec import OpSpec, register

# Around the vector widths, the register tiles, the stripes of 64 columns and the blocks of 128; 0 is a size like any other.
_COLUMNS = [0, 1, 2, 7, 16, 17, 33, 64, 65, 100, 128, 129, 192, 260]
_INNER = [0, 1, 3, 31, 63, 64, 65, 127, 128, 129, 200, 256, 384, 500]
_ROWS = [0, 1, 2, 3, 5, 8, 12, 13, 15, 16, 17, 25, 33, 48, 63, 64, 65, 130]


def _blocks(size: int) -> int:
    return -(-size // 128)


def draw_codes(draw, *shape: int) -> torch.Tensor:
    """e4m3 codes as quantisation makes them (some scale, subnormals among them), or every code but NaN alike."""
    if draw.integer(0, 3) == 0:
        generator = torch.Generator().manual_seed(draw.integer(0, 2**31 - 1))
        codes = torch.randint(0, 127, shape, generator=generator) + 128 * torch.randint(0, 2, shape, generator=generator)
        return codes.to(torch.uint8).view(torch.float8_e4m3fn)
    x = draw.tensor(*shape, scale=draw.choice([1e-2, 1.0, 100.0]))
    return x.clamp(-448, 448).to(torch.float8_e4m3fn)


def draw_scales(draw, *shape: int) -> torch.Tensor:
    """Positive scales, some of them powers of two."""
    scale = draw.tensor(*shape, scale=draw.choice([1e-3, 1.0, 50.0])).abs()
    return torch.exp2(torch.log2(scale).ceil()).nan_to_num() if draw.integer(0, 2) == 0 else scale


def _draw_fp8_gemm(draw, dtype):
    rows, columns, inner = draw.choice(_ROWS), draw.choice(_COLUMNS), draw.choice(_INNER)
    return {
        "a": draw_codes(draw, rows, inner),
        "a_scale": draw_scales(draw, rows, _blocks(inner)),
        "b": draw_codes(draw, columns, inner),
        "b_scale": draw_scales(draw, _blocks(columns), _blocks(inner)),
        "out_dtype": dtype,
    }


def _draw_fp8_grouped_gemm(draw, dtype):
    rows, columns, inner = draw.choice(_ROWS), draw.choice(_COLUMNS), draw.choice(_INNER)
    groups = draw.choice([0, 1, 2, 3, 8])
    # Sorted cuts: empty groups happen, and so do rows past the last group.
    ends = sorted(draw.integer(0, rows) for _ in range(groups))
    return {
        "a": draw_codes(draw, rows, inner),
        "a_scale": draw_scales(draw, rows, _blocks(inner)),
        "b": draw_codes(draw, groups, columns, inner),
        "b_scale": draw_scales(draw, groups, _blocks(columns), _blocks(inner)),
        "group_ends": torch.tensor(ends, dtype=torch.int32),
        "out_dtype": dtype,
    }


def _select_grouped_rows(arguments: dict, rows: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """The call for some rows of ``a``, which stay sorted by group."""
    rows = rows.sort().values
    ends = torch.searchsorted(rows, arguments["group_ends"].long()).to(torch.int32)
    some = {k: arguments[k][rows] for k in ("a", "a_scale")}
    return {**arguments, **some, "group_ends": ends}, rows


register(
    OpSpec("fp8_gemm", _draw_fp8_gemm, budget="quantized", rows=("a", "a_scale"), outputs=("rows",), poisons=("a_scale",))
)
register(
    OpSpec(
        "fp8_grouped_gemm",
        _draw_fp8_grouped_gemm,
        budget="quantized",
        rows=("a", "a_scale"),
        outputs=("rows",),
        select_rows=_select_grouped_rows,
        poisons=("a_scale",),
    )
)
