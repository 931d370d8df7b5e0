"""The parts of a block that know nothing of attention: projections, norms, the dense MLP and the mixture of experts.

Everything works on a flat batch of tokens, [T, ...]. Every number comes out of a glm5 op, so that a token's result does not
depend on its neighbours in the batch.
"""

import torch
from torch import nn

from glm5 import ops
from glm5.model.config import Glm5Config
from glm5.ops import _decoder

# Up to so many rows a layer is computed in few calls: what lies between calls then costs as much as some of them.
_FEW_ROWS = 64


class Linear(nn.Module):
    """x [T, in] -> [T, out]."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def full_weight(self) -> torch.Tensor:
        """[out, in]: for those who use the weight otherwise than by ``forward``."""
        return self.weight

    def forward(self, x: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        return ops.linear(x, self.weight, self.bias, out_dtype)


class RMSNorm(nn.Module):
    """x [..., dim] -> the same shape."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """x [..., dim] -> the same shape, with weight and bias."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


def at_least_float32(x: torch.Tensor) -> torch.dtype:
    """float32 for bf16 and float32 activations, float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def few_rows(x: torch.Tensor) -> bool:
    """Whether x [T, H] may go the way of few calls, which has no gradient, autocast or float64 and gives the same bits."""
    return (
        x.shape[0] <= _FEW_ROWS
        and not torch.is_grad_enabled()
        and x.dtype != torch.float64
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


class MLP(nn.Module):
    """SwiGLU: x [T, H] -> down(silu(gate(x)) * up(x)) [T, H]."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, width)
        self.up_proj = Linear(hidden_size, width)
        self.down_proj = Linear(width, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if few_rows(x) and type(gate) is type(up) is type(down) is Linear:
            return _decoder.decoder_mlp(x, gate.weight, up.weight, down.weight)
        return down(ops.silu_mul(torch.cat([gate(x), up(x)], -1)))


class Router(nn.Module):
    """Sigmoid router with a correction bias that decides the choice but not the weights (GLM-4.5 report, section 2)."""

    def __init__(self, config: Glm5Config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def _apply(self, fn, recurse=True):
        # Casting the model must not round the bias: steps of 0.001 vanish in bf16.
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if moved.dtype != torch.float32:
            kept = torch.empty_like(moved, dtype=torch.float32) if bias.is_meta else bias.to(moved.device)
            self.e_score_correction_bias = kept
        return self

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [T, H] -> weights [T, topk] float32, ids [T, topk] int32, and the logits [T, E] that they come from."""
        c = self.config
        # A checkpoint may hold this weight in float32 beside bf16 ones.
        logits = ops.linear(x.to(self.weight.dtype), self.weight, None, at_least_float32(x))
        bias = self.e_score_correction_bias
        if bias.dtype != logits.dtype:
            bias = bias.to(logits.dtype)
        weights, ids = ops.moe_router(
            logits, bias, c.num_experts_per_tok, c.n_group, c.topk_group, c.norm_topk_prob, c.routed_scaling_factor, None
        )
        return weights, ids, logits


def router_losses(logits: torch.Tensor, ids: torch.Tensor, sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a router may be asked to keep small, for training; plain torch on the float32 logits of the compiled router.

    The sequence-level balance loss of DeepSeek-V3 (2412.19437, eq. 17 to 20), kept by GLM-4.5: summed over the experts, the
    share of the sequence's choices that each one got, times its mean share of the sigmoids, times the number of experts: 1
    where both are even. The gradient goes through the sigmoids. And the z-loss of ST-MoE (2202.08906, eq. 5).

    Args:
        logits: [T, E], at least float32.
        ids: int32 [T, topk], each token's experts; -1 is none.
        sequence_length: tokens a sequence; divides T.

    Returns:
        balance, the mean over sequences, and z, the mean over tokens of log(sum(exp(logits)))^2; scalars.
    """
    tokens, experts = logits.shape
    scores = logits.sigmoid()
    share = scores / scores.sum(-1, keepdim=True)
    chosen = torch.zeros_like(logits, requires_grad=False).scatter_add_(1, ids.clamp(min=0).long(), (ids >= 0).to(logits))
    by_sequence = (tokens // sequence_length, sequence_length, experts)
    load = chosen.view(by_sequence).mean(1) * (experts / ids.shape[1])
    balance = (load * share.view(by_sequence).mean(1)).sum(-1).mean()
    return balance, logits.logsumexp(-1).square().mean()


class Experts(nn.Module):
    """The routed experts, fused: gate_up_proj [E, 2I, H] (gate first), down_proj [E, H, I].

    With ``int4_group_size`` they compute with int4 weights, one scale for so many inputs of an output (-1: for all).
    """

    def __init__(self, config: Glm5Config):
        super().__init__()
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.int4_group_size: int | None = None

    def forward(self, x: torch.Tensor, group_ends: torch.Tensor) -> torch.Tensor:
        """x [S, H] sorted by expert, group_ends [E] -> [S, H]."""
        gate_up, down = self.gate_up_proj, self.down_proj
        if self.int4_group_size is not None:
            gate_up, down = (ops.fake_quantize_int4(w, self.int4_group_size) for w in (gate_up, down))
        return ops.grouped_linear(ops.silu_mul(ops.grouped_linear(x, gate_up, group_ends)), down, group_ends)


class MoE(nn.Module):
    """Routed experts plus a shared one: x [T, H] -> [T, H].

    Beside it: where each expert's slots end [E] int32, and, with a ``sequence_length``, the ``router_losses``, else None.
    """

    def __init__(self, config: Glm5Config):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = (
            MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
            if config.n_shared_experts
            else None
        )

    def forward(
        self, x: torch.Tensor, sequence_length: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        weights, ids, logits = self.gate(x)
        watched = router_losses(logits, ids, sequence_length) if sequence_length else None
        slots, _, slot_of_row, group_ends = ops.moe_permute(x, ids, self.gate.config.n_routed_experts)
        routed = ops.moe_unpermute(self.experts(slots, group_ends), slot_of_row, weights)
        return (routed if self.shared_experts is None else routed + self.shared_experts(x)), group_ends, watched
