"""The decoder: blocks, the MTP layer, and the backbone that runs them over a flat batch of tokens.

A batch is one row of tokens, [T]; which keys a token may see is its range [ks, ke) of rows, so packed documents, a batch of
sequences and a prefill chunk are the same thing to every layer.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from glm5.model.attention import MLA, Pass
from glm5.model.config import Glm5Config
from glm5.model.layers import MLP, Linear, MoE, RMSNorm

# Rows that an MLP or a mixture of experts takes at once where no gradient is wanted.
_ROWS = 4096


def reaches(positions: torch.Tensor, ks: torch.Tensor, depth: int) -> torch.Tensor:
    """[T] bool: whether row t + d is in row t's document: its keys start at the same row and it stands d positions on."""
    same = torch.zeros_like(ks, dtype=torch.bool)
    reach = max(ks.shape[0] - depth, 0)
    same[:reach] = (ks[depth:] == ks[:reach]) & (positions[depth:] == positions[:reach] + depth)
    return same


class Embedding(nn.Module):
    """tokens [T] -> [T, H]."""

    def __init__(self, vocab_size: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(tokens, self.weight)


class DecoderLayer(nn.Module):
    """Pre-norm block: x [T, H] -> [T, H]."""

    def __init__(self, config: Glm5Config, layer: int, has_indexer: bool, dense: bool):
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config, layer, has_indexer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size) if dense else MoE(config)

    def forward(self, x: torch.Tensor, run: Pass) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), run)
        if torch.is_grad_enabled() or x.shape[0] <= _ROWS:
            return self._feed_forward(x, run)
        # A long prefill in parts: every row has the bits that it has alone, and the wide activations stay small.
        for first in range(0, x.shape[0], _ROWS):
            x[first : first + _ROWS] = self._feed_forward(x[first : first + _ROWS], run)
        return x

    def _feed_forward(self, x: torch.Tensor, run: Pass) -> torch.Tensor:
        normed = self.post_attention_layernorm(x)
        if not isinstance(self.mlp, MoE):
            return x + self.mlp(normed)
        update, ends, watched = self.mlp(normed, run.sequence_length)
        run.group_ends[self.layer] = run.group_ends[self.layer] + ends if self.layer in run.group_ends else ends
        if watched is not None:
            run.router_losses.append((self.layer, watched))
        return x + update


class MtpLayer(DecoderLayer):
    """The multi-token-prediction layer: one set of parameters, unrolled. Its number is num_hidden_layers."""

    def __init__(self, config: Glm5Config):
        super().__init__(config, config.num_hidden_layers, has_indexer=True, dense=False)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = nn.Module()
        self.shared_head.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def step(self, hidden: torch.Tensor, embedded: torch.Tensor, run: Pass) -> torch.Tensor:
        """hidden [T, H] of the step before, embedded [T, H] of the token it leads to -> hidden [T, H] of this step."""
        return self(self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], -1)), run)


def carry_out(layer: DecoderLayer, compute: Callable, run: Pass, *inputs: torch.Tensor) -> torch.Tensor:
    """``compute(*inputs, run)`` of a layer. With ``run.recompute`` its activations are forgotten and computed again in the
    backward: same ops, same bits. What the layer leaves behind in ``run`` is left there once."""
    if not run.recompute:
        return compute(*inputs, run)
    learning = torch.is_grad_enabled()
    given = replace(run)
    if layer.self_attn.indexer is not None and not run.reuse_indices:  # it reads nothing of the layers before
        given.indices = given.indexed = None

    def forward(*inputs):
        own = replace(given, kl=[], router_losses=[], group_ends={})
        with torch.set_grad_enabled(learning):
            return compute(*inputs, own), own

    with torch.enable_grad():  # where the model is frozen its indexers learn
        out, own = checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)
    run.indices, run.indexed = own.indices, own.indexed
    run.kl += own.kl
    run.router_losses += own.router_losses
    for number, ends in own.group_ends.items():
        run.group_ends[number] = run.group_ends[number] + ends if number in run.group_ends else ends
    return out


class Backbone(nn.Module):
    """Embedding, blocks, final norm; the MTP layer, when there is one, stands last in ``layers``."""

    def __init__(self, config: Glm5Config):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        layers = [
            DecoderLayer(config, i, has_indexer=indexer == "full", dense=mlp == "dense")
            for i, (indexer, mlp) in enumerate(zip(config.layer_indexers, config.layer_mlps, strict=True))
        ]
        self.layers = nn.ModuleList([*layers, MtpLayer(config)] if config.num_nextn_predict_layers else layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def mtp(self) -> MtpLayer | None:
        """The MTP layer."""
        return self.layers[self.config.num_hidden_layers] if self.config.num_nextn_predict_layers else None

    def forward(self, tokens: torch.Tensor, run: Pass) -> torch.Tensor:
        """tokens [T] -> hidden [T, H] after the final norm."""
        x = self.embed_tokens(tokens)
        for layer in self.layers[: self.config.num_hidden_layers]:
            if run.hidden is not None:
                run.hidden.append(x)
            x = carry_out(layer, layer, run, x)
        return self.norm(x)

    def unroll_mtp(self, tokens: torch.Tensor, hidden: torch.Tensor, run: Pass, depth: int):
        """Yields for d = 1 .. depth the hidden states [T, H] whose row t leads to token t + d + 1 through the shared head.

        Row t of step d reads tokens up to t + d of its document. Where that has no more, the row's own token stands in: such
        rows have no target, no row that has one attends to them, and no other document or pack changes what they compute.
        """
        for d in range(1, depth + 1):
            run.reuse_indices = d > 1 and self.config.index_share_for_mtp_iteration
            ahead = nn.functional.pad(tokens[d:], (0, min(d, tokens.shape[0])))
            following = torch.where(reaches(run.positions, run.ks, d), ahead, tokens)
            hidden = carry_out(self.mtp, self.mtp.step, run, hidden, self.embed_tokens(following))
            yield self.mtp.shared_head.norm(hidden)
