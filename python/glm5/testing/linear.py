"""Specs of the matrix products."""

import torch

from glm5.testing.spec import OpSpec, register

# Around the vector widths, the register tiles and the 512-element blocks of the sum; 0 is a size like any other.
_SIZES = [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 48, 64, 100, 192]
_LONG = [*_SIZES, 511, 512, 513, 1025, 1536]
_ROWS = [0, 1, 2, 3, 5, 8, 11, 12, 13, 23, 24, 25, 37, 130]


def _scale(draw):
    return draw.choice([1e-2, 1.0, 30.0])


def _draw_linear(draw, dtype):
    rows, out, inner = draw.choice(_ROWS), draw.choice(_SIZES), draw.choice(_LONG)
    return {
        "x": draw.tensor(rows, inner, dtype=dtype, scale=_scale(draw)),
        "w": draw.tensor(out, inner, dtype=dtype),
        "bias": draw.tensor(out, dtype=dtype) if draw.integer(0, 1) else None,
    }


def _draw_batched(draw, dtype):
    rows, heads, out, inner = draw.choice(_ROWS), draw.choice([1, 2, 3, 5]), draw.choice(_SIZES), draw.choice(_LONG)
    return {
        "x": draw.tensor(rows, heads, inner, dtype=dtype, scale=_scale(draw)),
        "w": draw.tensor(heads, out, inner, dtype=dtype),
    }


def _draw_grouped(draw, dtype):
    rows, groups, out, inner = draw.choice(_ROWS), draw.choice([1, 2, 3, 8]), draw.choice(_SIZES), draw.choice(_LONG)
    # Sorted cuts: empty groups happen, and so do rows past the last group.
    ends = sorted(draw.integer(0, rows) for _ in range(groups))
    return {
        "x": draw.tensor(rows, inner, dtype=dtype, scale=_scale(draw)),
        "w": draw.tensor(groups, out, inner, dtype=dtype),
        "group_ends": torch.tensor(ends, dtype=torch.int32),
    }


register(OpSpec("linear", _draw_linear, differentiable=("x", "w", "bias"), rows=("x",), outputs=("rows",)))
register(OpSpec("batched_linear", _draw_batched, differentiable=("x", "w"), rows=("x",), outputs=("rows",)))


def select_grouped_rows(arguments: dict, rows: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """The call for some rows of ``x``, which stay sorted by group."""
    rows = rows.sort().values
    ends = torch.searchsorted(rows, arguments["group_ends"].long()).to(torch.int32)
    return {**arguments, "x": arguments["x"][rows], "group_ends": ends}, rows


register(
    OpSpec(
        "grouped_linear",
        _draw_grouped,
        differentiable=("x", "w"),
        rows=("x",),
        outputs=("rows",),
        select_rows=select_grouped_rows,
    )
)
