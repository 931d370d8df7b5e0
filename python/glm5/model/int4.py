"""int4 weights of a model: which modules have them, and what they are. The op that fakes them in training decides the bits.

The routed experts are quantised and nothing else, as in GLM-5 on Ascend (W4A8 experts) and Kimi-K2: they are nine tenths of
the weights. How int4 weights are stored is the business of ``int4_formats.py``.
"""

import torch

from glm5 import ops
from glm5.model.config import Glm5Config
from glm5.model.int4_formats import Int4Weight
from glm5.model.layers import Experts


def want_group_size(config: Glm5Config, size: int) -> None:
    """Raises ValueError unless groups of `size` inputs (-1: all) make up the rows of every expert's weights."""
    for name in ("hidden_size", "moe_intermediate_size"):
        width = getattr(config, name)
        if size not in (32, 64, 128, -1) or width % max(size, 2):
            raise ValueError(f"int4_group_size is {size!r}, want 32, 64, 128 or -1 (a row) that divides {name}, {width}")


def quantized_experts(model, group_size: int) -> dict[str, Int4Weight]:
    """Codes and scales of every routed expert's projection: ``model.layers.3.mlp.experts.0.gate_proj`` -> [N, K] as int4.

    ``ops.dequantize_int4`` of one is bit for bit what the experts compute with under ``model.int4_group_size = group_size``,
    and ``ops.w4a8_prepack`` takes it as it is. Computed as it is asked for: a view of the model's weights is read.

    Raises:
        ValueError: group_size is none of 32, 64, 128 and -1, or does not divide a width.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            gate, up = module.gate_up_proj.detach().chunk(2, 1)
            for projection, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", module.down_proj.detach())):
                for k, one in enumerate(weight):
                    found[f"{name}.{k}.{projection}"] = quantized(one, group_size)
    return found


def quantized(weight: torch.Tensor, group_size: int) -> Int4Weight:
    """weight [N, K] -> its symmetric int4 form."""
    return Int4Weight(*ops.quantize_int4(weight, group_size))
