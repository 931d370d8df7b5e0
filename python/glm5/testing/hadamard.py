"""Spec of the Hadamard rotation."""

from glm5.testing.spec import OpSpec, register


def _draw_rotate_hadamard(draw, dtype):
    rows, dim = draw.choice([5, 1, 0, 40]), 2 ** draw.integer(0, 9)
    return {"x": draw.tensor(rows, dim, dtype=dtype, scale=draw.choice([1e-3, 1.0, 50.0]))}


register(OpSpec("rotate_hadamard", _draw_rotate_hadamard, differentiable=("x",), rows=("x",), outputs=("rows",)))
