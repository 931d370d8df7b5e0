"""Spec of the rope family."""

import torch

from glm5.testing.spec import OpSpec, register


def _draw_rope(draw, dtype):
    tokens, half, positions = draw.integer(0, 70), draw.choice([1, 3, 8, 16, 32, 37]), draw.choice([1, 50, 4096])
    heads = draw.choice([None, 1, 3, 64])
    shape = (tokens, 2 * half) if heads is None else (tokens, heads, 2 * half)
    frequencies = 1e4 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    table = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(draw.integer(0, 2**31 - 1))
    return {
        "x": draw.tensor(*shape, dtype=dtype),
        "cos": angles.cos().to(table),
        "sin": angles.sin().to(table),
        "positions": torch.randint(positions, (tokens,), generator=generator, dtype=draw.choice([torch.int32, torch.int64])),
        "interleaved": draw.choice([True, False]),
    }


register(OpSpec("rope", _draw_rope, differentiable=("x",), rows=("x", "positions"), outputs=("rows",)))
