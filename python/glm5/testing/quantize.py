"""Specs of the quantize family. Codes, scales and values are those of the reference, bit for bit."""

import torch

from glm5.testing.spec import OpSpec, register

SPECIAL = (0.0, -0.0, float("nan"), float("inf"), float("-inf"), 1e-45, -1e-40, 3e38, 1e-4, -1e-4, 2.0**-20)


def draw_values(draw, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of many scales, whole rows of zeros among them, and sometimes a few of SPECIAL."""
    x = draw.tensor(*shape, dtype=torch.float32, scale=draw.choice([1.0, 1e-6, 300.0, 1e20]))
    if draw.integer(0, 2) == 0 and x.numel():
        for _ in range(draw.integer(1, 4)):
            x.view(-1)[draw.integer(0, x.numel() - 1)] = draw.choice(SPECIAL)
    if draw.integer(0, 3) == 0 and x.numel():
        x[..., draw.integer(0, shape[-2] - 1), :] = draw.choice([0.0, -0.0, 5e-5, 448.0])
    return x.to(dtype)


def draw_shape(draw, columns) -> tuple[int, ...]:
    """[M, K] or [B, M, K]."""
    batch = draw.choice([(), (), (1,), (2,), (0,), (2, 2), (3,)])
    return *batch, draw.choice([0, 1, 2, 5, 33, 130, 257]), draw.choice(columns)


# Blocks of 128, whole, cut off, next to none.
_COLUMNS = [0, 1, 3, 16, 31, 127, 128, 129, 384, 500, 1024 + 128, 1024 + 130]
_BLOCKS = [(1, 128), (128, 128)]


def _draw_quantize_fp8(draw, dtype):
    return {
        "x": draw_values(draw, *draw_shape(draw, _COLUMNS), dtype=dtype),
        "block": draw.choice(_BLOCKS),
        "power_of_two": draw.choice([False, True]),
    }


def _draw_dequantize_fp8(draw, dtype):
    shape, block = draw_shape(draw, _COLUMNS), draw.choice(_BLOCKS)
    generator = torch.Generator().manual_seed(draw.integer(0, 2**31 - 1))
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    scale = draw_values(draw, *shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]), dtype=torch.float32)
    return {"q": codes.view(torch.float8_e4m3fn), "scale": scale, "block": block, "out_dtype": dtype}


def _draw_quantize_int8(draw, dtype):
    return {"x": draw_values(draw, *draw_shape(draw, _COLUMNS), dtype=dtype)}


def _draw_groups(draw):
    group_size = draw.choice([32, 64, 128, -1])
    return group_size, [0, 128, 256, 1152] if group_size != -1 else [0, 2, 14, 16, 38, 130, 1154]


def _draw_quantize_int4(name):
    def draw_arguments(draw, dtype):
        group_size, columns = _draw_groups(draw)
        return {
            name: draw_values(draw, *draw_shape(draw, columns), dtype=dtype),
            "group_size": group_size,
            "symmetric": draw.choice([True, False]),
        }

    return draw_arguments


def _draw_dequantize_int4(draw, dtype):
    groups, size = draw.choice([1, 2, 3, 9]), draw.choice([2, 14, 16, 32, 38, 128])
    shape = draw_shape(draw, [groups * size])
    generator = torch.Generator().manual_seed(draw.integer(0, 2**31 - 1))
    packed = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (*shape[:-1], groups), generator=generator, dtype=torch.uint8)
    return {
        "packed": packed,
        "scale": draw_values(draw, *shape[:-1], groups, dtype=torch.float32),
        "zeros": draw.choice([None, zeros]),
        "out_dtype": dtype,
    }


def _no_block_spans_rows(arguments):
    """Rows are those of the first dimension: matrices of a batch, or rows of one matrix in blocks of 1 x 128."""
    return arguments["block"][0] == 1 or arguments.get("x", arguments.get("q")).dim() > 2


register(
    OpSpec(
        "quantize_fp8", _draw_quantize_fp8, bitwise=True, rows=("x",), outputs=("rows", "rows"),
        independent=_no_block_spans_rows,
    )
)  # fmt: skip
register(
    OpSpec(
        "dequantize_fp8", _draw_dequantize_fp8, bitwise=True, rows=("q", "scale"), outputs=("rows",),
        independent=_no_block_spans_rows,
    )
)  # fmt: skip
register(OpSpec("quantize_int8", _draw_quantize_int8, bitwise=True, rows=("x",), outputs=("rows", "rows")))
register(OpSpec("quantize_int4", _draw_quantize_int4("w"), bitwise=True, rows=("w",), outputs=("rows", "rows", "rows")))
register(
    OpSpec(
        "dequantize_int4", _draw_dequantize_int4, bitwise=True, rows=("packed", "scale", "zeros"), outputs=("rows",),
        poisons=("scale",),
    )
)  # fmt: skip
register(
    OpSpec(
        "fake_quantize_int4", _draw_quantize_int4("x"), differentiable=("x",), bitwise=True, rows=("x",), outputs=("rows",)
    )
)
