"""Block-scaled FP8 weights: e4m3 with one scale for every 128 x 128 block (DeepSeek-V3, 2412.19437, section 3.3.2).

In a checkpoint a weight [N, K] comes as ``weight`` (float8_e4m3fn) and ``weight_scale_inv`` (float32, or narrower: bfloat16,
or the powers of two of float8_e8m0fnu; [ceil(N/128), ceil(K/128)]); its value is weight * weight_scale_inv, block by block.
"""

import warnings

import torch
from torch import nn

from glm5 import ops
from glm5.model.config import Glm5Config

BLOCK = 128
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)
_told = False


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of weights [..., N, K]."""
    return *shape[:-2], -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK)


def dequantize_fp8(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """weight [..., N, K] float8_e4m3fn, scale [..., ceil(N/128), ceil(K/128)] in one of SCALE_DTYPES -> [..., N, K]: the
    float32 product, rounded once to ``dtype``."""
    through = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    return ops.dequantize_fp8(weight, scale.float(), (BLOCK, BLOCK), through).to(dtype)


def quantize_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [..., N, K] -> (float8_e4m3fn [..., N, K], float32 scales [..., ceil(N/128), ceil(K/128)])."""
    return ops.quantize_fp8(weight if weight.dtype == torch.bfloat16 else weight.float(), (BLOCK, BLOCK))


def _tell_once() -> None:
    global _told
    if not _told:
        _told = True
        warnings.warn(
            "FP8 weights are dequantised on every use, which saves memory, not time; load with fp8='dequantize' for speed",
            stacklevel=3,
        )


class Fp8Linear(nn.Module):
    """``Linear`` on block-scaled FP8 weights. They take no gradient; the input does."""

    def __init__(self, in_features: int, out_features: int, bias: torch.Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype  # of the model: what the weights become before they are used
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn))
        self.register_buffer("weight_scale_inv", torch.empty(scale_shape((out_features, in_features))))
        self.bias = bias

    def _apply(self, fn, recurse=True):
        return _apply_keeping_fp8(self, super()._apply, fn)

    def full_weight(self) -> torch.Tensor:
        """[out, in] in the model's dtype."""
        _tell_once()
        return dequantize_fp8(self.weight, self.weight_scale_inv, self.dtype)

    def forward(self, x: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        return ops.linear(x, self.full_weight(), self.bias, out_dtype)


class Fp8Experts(nn.Module):
    """``Experts`` on block-scaled FP8 weights, gate and up apart because each has blocks of its own."""

    def __init__(self, config: Glm5Config, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        for name, shape in (("gate_proj", (width, hidden)), ("up_proj", (width, hidden)), ("down_proj", (hidden, width))):
            self.register_buffer(name, torch.empty(experts, *shape, dtype=torch.float8_e4m3fn))
            self.register_buffer(f"{name}_scale_inv", torch.empty(experts, *scale_shape(shape)))

    def _apply(self, fn, recurse=True):
        return _apply_keeping_fp8(self, super()._apply, fn)

    def _full(self, name: str) -> torch.Tensor:
        return dequantize_fp8(getattr(self, name), getattr(self, f"{name}_scale_inv"), self.dtype)

    def forward(self, x: torch.Tensor, group_ends: torch.Tensor) -> torch.Tensor:
        """x [S, H] sorted by expert, group_ends [E] -> [S, H]."""
        _tell_once()
        gate_up = torch.cat([self._full("gate_proj"), self._full("up_proj")], 1)
        h = ops.silu_mul(ops.grouped_linear(x, gate_up, group_ends))
        return ops.grouped_linear(h, self._full("down_proj"), group_ends)


def _apply_keeping_fp8(module: nn.Module, apply, fn) -> nn.Module:
    """``_apply`` that moves the buffers but leaves their dtypes: casting the model changes what they are turned into."""
    before = dict(module.named_buffers(recurse=False))
    apply(fn)
    for name, old in before.items():
        new = getattr(module, name)
        if new.dtype != old.dtype:
            module.dtype = new.dtype
            setattr(module, name, old.to(new.device) if not new.is_meta else torch.empty_like(old, device="meta"))
    return module
