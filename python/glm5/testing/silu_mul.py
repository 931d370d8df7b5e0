"""Spec of the silu_mul family."""

from glm5.testing.spec import OpSpec, register


def _draw_silu_mul(draw, dtype):
    rows, width = draw.integer(0, 40), draw.choice([1, 3, 16, 31, 64, 2048])
    return {"x": draw.tensor(rows, 2 * width, dtype=dtype, scale=draw.choice([1e-3, 1.0, 30.0]))}


register(OpSpec("silu_mul", _draw_silu_mul, differentiable=("x",), rows=("x",), outputs=("rows",)))
