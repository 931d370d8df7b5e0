"""Specs of the norm family."""

from glm5.testing.spec import OpSpec, register


def _draw_rms_norm(draw, dtype):
    # dim 1 is left to an example test: there the gradient of x is pure cancellation.
    rows, dim = draw.integer(0, 130), draw.choice([3, 5, 16, 17, 64, 100, 576])
    return {
        "x": draw.tensor(rows, dim, dtype=dtype, scale=draw.choice([1e-3, 1.0, 50.0])),
        "weight": draw.tensor(dim, dtype=dtype),
        "eps": 1e-5,
    }


register(OpSpec("rms_norm", _draw_rms_norm, differentiable=("x", "weight"), rows=("x",), outputs=("rows",)))


def _draw_layer_norm(draw, dtype):
    # From dim 5 on: in fewer dimensions the gradient of x is mostly cancellation.
    rows, dim = draw.integer(0, 130), draw.choice([5, 16, 17, 64, 100, 128, 2100])
    return {
        "x": draw.tensor(rows, dim, dtype=dtype, scale=draw.choice([1e-2, 1.0, 50.0])),
        "weight": draw.tensor(dim, dtype=dtype),
        "bias": draw.tensor(dim, dtype=dtype),
        "eps": 1e-6,
    }


register(OpSpec("layer_norm", _draw_layer_norm, differentiable=("x", "weight", "bias"), rows=("x",), outputs=("rows",)))
