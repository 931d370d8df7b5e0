"""Spec of token_logprobs."""

import torch

from glm5.testing.spec import OpSpec, register


def _draw(draw, dtype):
    tokens, dim = draw.choice([0, 1, 2, 5, 13, 40, 245]), draw.choice([1, 3, 16, 64, 100, 520])
    vocab = draw.choice([1, 2, 7, 16, 65, 255, 256, 257, 600, 2100])
    generator = torch.Generator().manual_seed(draw.integer(0, 2**31 - 1))
    return {
        "hidden": draw.tensor(tokens, dim, dtype=dtype),
        "lm_head": draw.tensor(vocab, dim, dtype=dtype, scale=draw.choice([0.02, 0.3]) / dim**0.5 * 8),
        "targets": torch.randint(0, vocab, (tokens,), generator=generator),
        "temperature": 0.3 + 2 * torch.rand(tokens, generator=generator),
    }


register(
    OpSpec(
        "token_logprobs",
        _draw,
        differentiable=("hidden", "lm_head"),
        budget="softmax",
        rows=("hidden", "targets", "temperature"),
        outputs=("rows", "rows"),
        poisons=("hidden",),
    )
)
