"""Spec of the silu_mul family."""

import torch

from glm5 import reference
from glm5.testing.spec import OpSpec, register


def _draw_silu_mul(draw, dtype):
    rows, width = draw.integer(0, 40), draw.choice([1, 3, 16, 31, 64, 2048])
    return {"x": draw.tensor(rows, 2 * width, dtype=dtype, scale=draw.choice([1e-3, 1.0, 30.0]))}


register(OpSpec("silu_mul", _draw_silu_mul, differentiable=("x",), rows=("x",), outputs=("rows",)))


def _draw_silu_mul_quantize(draw, dtype):
    to = draw.choice([torch.float8_e4m3fn, torch.int8])
    rows, width = draw.integer(0, 40), draw.choice([0, 1, 3, 16, 127, 128, 300, 2048])
    return {
        "x": draw.tensor(rows, 2 * width, dtype=dtype, scale=draw.choice([1e-3, 1.0, 30.0])),
        "dtype": to,
        "power_of_two": to != torch.int8 and draw.choice([False, True]),
    }


def _compare_silu_mul_quantize(got, want, arguments, dtype):
    """Scales are those of the largest magnitude, and codes the nearest, up to the error of the activation itself."""
    codes, scale = got
    y = reference.silu_mul(arguments["x"].double())
    error = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
    if arguments["dtype"] == torch.int8:
        least, most = (reference.quantize_int8(y * factor)[1] for factor in (1 - error, 1 + error))
        spread, step = scale[:, None].double(), torch.ones(())
    else:
        least, most = (
            reference.quantize_fp8(y * factor, power_of_two=arguments["power_of_two"])[1]
            for factor in (1 - error, 1 + error)
        )
        spread = scale.double().repeat_interleave(128, 1)[:, : y.shape[1]]
        _, exponent = (y / spread).abs().frexp()  # of a number in [1/2, 1)
        step = 2.0 ** (exponent - 4).clamp_min(-9).double()
    found = [] if ((least <= scale) & (scale <= most)).all() else ["scales are not those of the largest magnitudes"]
    if not ((codes.double() * spread - y).abs() <= 0.5001 * step * spread + 2 * error * y.abs()).all():
        found.append("codes are not the nearest")
    return found


register(
    OpSpec(
        "silu_mul_quantize",
        _draw_silu_mul_quantize,
        rows=("x",),
        outputs=("rows", "rows"),
        compare=_compare_silu_mul_quantize,
    )
)
