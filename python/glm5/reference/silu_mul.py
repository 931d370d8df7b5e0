"""The expert activation, as specified."""

import torch

from glm5.reference._precision import wide
from glm5.reference.quantize import quantize_fp8, quantize_int8


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """x [M, 2I], gate in the first half and up in the second -> silu(gate) * up [M, I], rounded to x's dtype once."""
    (x_wide,) = wide(x)
    gate, up = x_wide.chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


def silu_mul_quantize(
    x: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn, power_of_two: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, 2I] -> silu_mul(x), rounded to x's dtype, in FP8 (1 x 128 blocks) or int8 (rows): codes [M, I] and scales."""
    y = silu_mul(x)
    return quantize_int8(y) if dtype == torch.int8 else quantize_fp8(y, (1, 128), power_of_two)
