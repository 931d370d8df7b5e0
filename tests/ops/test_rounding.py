"""bfloat16 outputs are the float32 results rounded to nearest even, subnormals included: what torch's .bfloat16() gives."""

import pytest
import torch

from glm5 import ops

LOWER_HALVES = (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)


def floats(lower: int) -> torch.Tensor:
    """Every sign, exponent and upper mantissa, with one lower half of the mantissa."""
    upper = torch.arange(1 << 16, dtype=torch.int64) << 16
    return (upper | lower).to(torch.uint32).view(torch.float32)


def assert_rounded(got: torch.Tensor, exact: torch.Tensor) -> None:
    """Equal to torch's rounding bit by bit; NaN is NaN."""
    want = exact.bfloat16()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.view(torch.int16)[~got.isnan()], want.view(torch.int16)[~want.isnan()])


@pytest.mark.parametrize("width", [1, 21])
def test_every_upper_half(isa, width):
    """A token's weight times a row of ones."""
    ones = torch.ones(1 << 16, width).bfloat16()
    slots = torch.arange(1 << 16, dtype=torch.int32)[:, None]
    for lower in LOWER_HALVES:
        exact = floats(lower)[:, None]
        # A sum begins with +0, which takes the sign from -0.
        assert_rounded(ops.moe_unpermute(ones, slots, exact), (exact + 0.0).expand(-1, width).contiguous())


@pytest.mark.parametrize("tokens", [1, 1 << 14])
def test_matrix_products_of_normal_numbers(isa, tokens):
    """The three parts of a float32's mantissa are bfloat16s; a product with ones adds them up again."""
    for lower in LOWER_HALVES:
        exact = floats(lower)
        exponent = exact.view(torch.int32) >> 23 & 0xFF
        exact = exact[(exponent > 24) & (exponent < 255)]
        exact = exact[:: 4 if tokens > 1 else 997]
        bits = exact.view(torch.int32)
        first, second = ((bits & mask).view(torch.float32) for mask in (~0xFFFF, ~0xFF))
        x = torch.stack([first, second - first, exact - second], 1)
        assert torch.equal(x, x.bfloat16().float())
        for some in x.bfloat16().split(tokens):
            got = ops.linear(some, torch.ones(33, 3).bfloat16())
            assert_rounded(got, some.float().sum(1, keepdim=True).expand(-1, 33).contiguous())


@pytest.mark.parametrize("rows, cols, dim", [(1, 33, 1), (16, 64, 40), (70, 33, 96), (300, 512, 64), (600, 96, 64)])
def test_a_subnormal_sum_with_a_bias(isa, rows, cols, dim):
    x, w = torch.zeros(rows, dim), torch.zeros(cols, dim)
    x[:, 0], w[:, 0] = 1.25 * 2.0**-126, 1
    bias = torch.full((cols,), -(2.0**-126))
    got = ops.linear(x.bfloat16(), w.bfloat16(), bias.bfloat16())
    assert_rounded(got, torch.full((rows, cols), 2.0**-128))
