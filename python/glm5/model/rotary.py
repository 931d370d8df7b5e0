"""Rotary tables: cos and sin of every position, in float32, the same bits on every machine shape."""

from math import ceil, floor, log, pi

import torch

from glm5.model.config import Glm5Config, yarn_mscale

# Rows are computed in whole blocks of this many positions, always, so that no row's bits depend on how many are asked for.
_BLOCK = 1024


def rope_frequencies(config: Glm5Config) -> tuple[torch.Tensor, float]:
    """(radians a position [rope / 2] float64, factor on cos and sin) for the config's ``rope_parameters``.

    default: theta^(-2i/d). linear: divided by factor. yarn (2309.00071, 3.2): a ramp between the two, from pairs that turn
    more than beta_fast times within the original length (left as they are) to those that turn less than beta_slow times.
    """
    rope, dim = config.rope_parameters, config.qk_rope_head_dim
    kind = rope.get("rope_type", "default")
    plain = config.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if kind == "default":
        return plain, 1.0
    factor = float(rope["factor"])
    if kind == "linear":
        return plain / factor, 1.0

    def pair_turning(times: float) -> float:
        return dim * log(rope["original_max_position_embeddings"] / (times * 2 * pi)) / (2 * log(config.rope_theta))

    low, high = pair_turning(rope.get("beta_fast") or 32), pair_turning(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = floor(low), ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low or 0.001)).clamp(0, 1)

    scale = rope.get("attention_factor")
    if scale is None:
        mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        scale = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim) if mscale and all_dim else yarn_mscale(factor)
    return plain / factor * ramp + plain * (1 - ramp), float(scale)


class RotaryTable:
    """cos and sin, [max_positions, dim / 2] each; built on first use, kept per device. Not a parameter, not saved."""

    def __init__(self, frequencies: torch.Tensor, scale: float, max_positions: int):
        self.frequencies, self.scale, self.max_positions = frequencies, scale, max_positions
        self._tables: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def on(self, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) on ``device``, float32 or float64."""
        key = (device, dtype)
        if key not in self._tables:
            blocks = range(0, self.max_positions, _BLOCK)
            angles = [torch.arange(b, b + _BLOCK, dtype=torch.float64)[:, None] * self.frequencies for b in blocks]
            self._tables[key] = tuple(
                torch.cat([(f(a) * self.scale).to(dtype) for a in angles])[: self.max_positions].to(device)
                for f in (torch.cos, torch.sin)
            )
        return self._tables[key]
