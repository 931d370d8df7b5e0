"""The expert activation, as specified."""

import torch

from glm5.reference._precision import wide


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """x [M, 2I], gate in the first half and up in the second -> silu(gate) * up [M, I], rounded to x's dtype once."""
    (x_wide,) = wide(x)
    gate, up = x_wide.chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)
