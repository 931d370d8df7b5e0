"""Rotary tables: cos and sin of every position, in float32, the same bits on every machine shape."""

import torch

# Rows are computed in whole blocks of this many positions, always, so that no row's bits depend on how many are asked for.
_BLOCK = 1024


class RotaryTable:
    """cos and sin, [max_positions, dim / 2] each; built on first use, kept per device. Not a parameter, not saved."""

    def __init__(self, dim: int, theta: float, max_positions: int):
        self.dim, self.theta, self.max_positions = dim, theta, max_positions
        self._tables: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def on(self, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) on ``device``, float32 or float64."""
        key = (device, dtype)
        if key not in self._tables:
            frequencies = self.theta ** (-torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim)
            blocks = range(0, self.max_positions, _BLOCK)
            angles = [torch.arange(b, b + _BLOCK, dtype=torch.float64)[:, None] * frequencies for b in blocks]
            self._tables[key] = tuple(
                torch.cat([f(a) for a in angles])[: self.max_positions].to(device, dtype) for f in (torch.cos, torch.sin)
            )
        return self._tables[key]
