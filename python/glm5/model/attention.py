"""Multi-head latent attention with the lightning indexer: the dense form, the sparse form, and the indexer's training loss.

Dense attention expands the latent rows to per-head keys and values (``mla_attention``); sparse attention works on the latent
rows themselves (``sparse_mla``), so that one selected row serves all heads. Which of the two runs is the stage's choice.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from glm5 import ops
from glm5.model.cache import LatentCache
from glm5.model.config import Glm5Config
from glm5.model.layers import LayerNorm, Linear, RMSNorm, at_least_float32, few_rows
from glm5.ops import _decoder

# Both latent norms and the indexer's use this, whatever rms_norm_eps says (Transformers 5.23 does the same).
LATENT_EPS = 1e-6


# How many (row, head) pairs of queries are in latent form at once where no gradient is wanted: 75 MB at 576 in float32.
_PAIRS = 32768


def latent_attention(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    indices: torch.Tensor,
    kv_b_weight: torch.Tensor,
    scale: float,
    whole: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Sparse attention with the key and value up-projections absorbed into query and output (DeepSeek-V2, section 2.1.2).

    Args:
        q_nope, q_rope: [T, heads, nope], [T, heads, rope]: the queries, the second rotated.
        latent: [Tk, kv_lora + rope]: normed latent rows beside rotated keys.
        indices: int32 [T, topk], ascending, -1 padded.
        kv_b_weight: [heads * (nope + v), kv_lora].
        scale: on the scores.
        whole: whether to return more than ``out``. Where that and gradients are not wanted, rows are taken in parts, which
            changes no bit and keeps the wide latent queries small.

    Returns:
        out [T, heads, v]; and, if ``whole``, the latent queries [T, heads, kv_lora + rope] and lse [T, heads], else None.
    """
    rows, heads, nope = q_nope.shape
    kv_lora = kv_b_weight.shape[1]
    up = kv_b_weight.view(heads, -1, kv_lora)
    w_uk, w_uv = up[:, :nope].transpose(1, 2), up[:, nope:]

    def attend(q_nope, q_rope, indices):
        q = torch.cat([ops.batched_linear(q_nope, w_uk), q_rope], -1)
        out, lse = ops.sparse_mla(q, latent, indices, scale, kv_lora)
        return ops.batched_linear(out, w_uv), q, lse

    if whole:
        return attend(q_nope, q_rope, indices)
    step = max(_PAIRS // heads, 1)
    if rows <= step or torch.is_grad_enabled():
        return attend(q_nope, q_rope, indices)[0], None, None
    out = q_nope.new_empty(rows, heads, w_uv.shape[1])
    for first in range(0, rows, step):
        part = slice(first, first + step)
        out[part] = attend(q_nope[part], q_rope[part], indices[part])[0]
    return out, None, None


@dataclass
class Selection:
    """What one layer selected, seen from outside: for evaluation, and for overriding it.

    Attributes:
        layer: the layer's number (the MTP layer's is num_hidden_layers).
        indices: int32 [T, topk], ascending, -1 padded: the indexer's own choice.
        ks, ke: int32 [T]: the keys each row may see.
        topk: how many it may select.
    """

    layer: int
    indices: torch.Tensor
    ks: torch.Tensor
    ke: torch.Tensor
    topk: int
    _dense: Callable[[], tuple] = field(repr=False)

    def attention_target(self) -> torch.Tensor:
        """Dense attention's head-averaged probabilities [T, Tk], float32: what the indexer should rank by. Holds [T, Tk]."""
        with torch.no_grad():
            q, k, v, scale = self._dense()
            _, lse = ops.mla_attention(q, k, v, self.ks, self.ke, scale)
            return ops.mla_attn_target(q, k, lse, self.ks, self.ke, scale)


@dataclass
class Pass:
    """One forward over a flat batch: what every layer reads, and what the layers leave behind."""

    positions: torch.Tensor  # int32 [T]
    ks: torch.Tensor  # int32 [T]
    ke: torch.Tensor  # int32 [T]
    cos: torch.Tensor  # [positions, rope / 2]
    sin: torch.Tensor
    attention: str  # "dense" | "sparse"
    indexer: str = "none"  # "none" | "warmup" | "sparse": which KL the indexers are trained on
    grad: bool = False  # whether the indexers' KL may build a graph
    cache: LatentCache | None = None
    select: Callable[[Selection], torch.Tensor] | None = None
    collect: bool = False
    reuse_indices: bool = False  # a later MTP iteration that shares the first one's indices
    plain: bool = False  # nothing but the output is wanted of sparse attention, and no gradient
    recompute: bool = False  # whether layers forget their activations and compute them again in the backward
    sequence_length: int | None = None  # tokens a sequence where the losses of the routers are wanted
    # left behind
    hidden: list[torch.Tensor] | None = None  # [T, H] before each layer, where wanted
    indices: torch.Tensor | None = None  # of the last full layer
    indexed: tuple | None = None  # (q, k, weights) of the last full layer's indexer
    kl: list[torch.Tensor] = field(default_factory=list)  # [T] a layer
    router_losses: list[tuple[int, tuple]] = field(default_factory=list)  # (layer, its (balance, z))
    selections: list[Selection] = field(default_factory=list)
    group_ends: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> [E], summed over what it was given in parts

    def rope(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, ..., rope], rotated in interleaved pairs."""
        return ops.rope(x, self.cos, self.sin, self.positions, True)


class Indexer(nn.Module):
    """The lightning indexer: which keys a query should attend to (DeepSeek-V3.2, eq. 1)."""

    def __init__(self, config: Glm5Config):
        super().__init__()
        self.config = config
        self.wq_b = Linear(config.q_lora_rank, config.index_n_heads * config.index_head_dim)
        self.wk = Linear(config.hidden_size, config.index_head_dim)
        self.k_norm = LayerNorm(config.index_head_dim, LATENT_EPS)
        self.weights_proj = Linear(config.hidden_size, config.index_n_heads)

    def forward(self, x: torch.Tensor, q_latent: torch.Tensor, run: Pass) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [T, H], q_latent [T, q_lora] -> q [T, heads, dim], k [T, dim], weights [T, heads] with the scales folded in."""
        c = self.config
        q = self._rotate(self.wq_b(q_latent).view(-1, c.index_n_heads, c.index_head_dim), run)
        k = self._rotate(self.k_norm(self.wk(x)), run)
        # A checkpoint may hold this weight in float32 beside bf16 ones.
        weights = self.weights_proj(x.to(self.weights_proj.weight.dtype), at_least_float32(x))
        return q, k, weights * (c.index_head_dim**-0.5 * c.index_n_heads**-0.5)

    def _rotate(self, x: torch.Tensor, run: Pass) -> torch.Tensor:
        """The first rope dimensions turn with the position, the others do not."""
        rope = self.config.qk_rope_head_dim
        turning, still = x.split([rope, x.shape[-1] - rope], -1)
        return torch.cat([run.rope(turning), still], -1)


class MLA(nn.Module):
    """Latent attention over a flat batch: x [T, H] -> [T, H]. ``indexer`` is absent on a shared layer."""

    def __init__(self, config: Glm5Config, layer: int, has_indexer: bool):
        super().__init__()
        c, heads, bias = config, config.num_attention_heads, config.attention_bias
        self.config, self.layer = config, layer
        self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank, bias)
        self.q_a_layernorm = RMSNorm(c.q_lora_rank, LATENT_EPS)
        self.q_b_proj = Linear(c.q_lora_rank, heads * c.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, c.latent_dim, bias)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, LATENT_EPS)
        self.kv_b_proj = Linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.o_proj = Linear(heads * c.v_head_dim, c.hidden_size, bias)
        self.indexer = Indexer(config) if has_indexer else None
        self.scale = c.softmax_scale

    def forward(self, x: torch.Tensor, run: Pass) -> torch.Tensor:
        if run.plain and few_rows(x):
            out = self._forward_few(x, run)
            if out is not None:
                return out
        c, heads = self.config, self.config.num_attention_heads
        q_latent = self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_b_proj(q_latent).view(-1, heads, c.qk_head_dim)
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        q_rope = run.rope(q_rope)
        compressed, k_rope = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        latent = torch.cat([self.kv_a_layernorm(compressed), run.rope(k_rope)], -1)
        if run.cache is not None:
            latent = run.cache.append_latent(self.layer, latent)

        self._index(x, q_latent, q_nope, q_rope, latent, run)
        attend = self._attend_sparse if run.attention == "sparse" else self._attend_dense
        out = attend(q_nope, q_rope, latent, run)
        return self.o_proj(out.reshape(-1, heads * c.v_head_dim))

    def _forward_few(self, x: torch.Tensor, run: Pass) -> torch.Tensor | None:
        """``forward`` for sparse attention alone, in few calls; the same bits. None where a projection is not a ``Linear``
        or has weights of another dtype."""
        c, indexer = self.config, None if run.reuse_indices else self.indexer
        q_a, q_b, kv_a, kv_b = self.q_a_proj, self.q_b_proj, self.kv_a_proj_with_mqa, self.kv_b_proj
        projections, o = [q_a, q_b, kv_a, kv_b, self.o_proj], self.o_proj
        index = [None] * 5
        if indexer is not None:
            projections += [indexer.wq_b, indexer.wk, indexer.weights_proj]
        for projection in projections:
            if type(projection) is not Linear or projection.weight.dtype != x.dtype:
                return None
        if indexer is not None:
            norm = indexer.k_norm
            index = [indexer.wq_b.weight, indexer.wk.weight, norm.weight, norm.bias, indexer.weights_proj.weight]
        up, nope = kv_b.weight, c.qk_nope_head_dim
        q, latent, *indexed = _decoder.decoder_inputs(
            *(x, q_a.weight, q_a.bias, self.q_a_layernorm.weight, q_b.weight),
            *(kv_a.weight, kv_a.bias, self.kv_a_layernorm.weight, up),
            *(c.num_attention_heads, nope, LATENT_EPS, run.cos, run.sin, run.positions),
            *(*index, c.index_head_dim**-0.5 * c.index_n_heads**-0.5),
        )
        if run.cache is not None:
            latent = run.cache.append_latent(self.layer, latent)
        if indexer is not None:
            index_q, index_k, weights = indexed
            if run.cache is not None:
                index_k = run.cache.append_indexer_key(self.layer, index_k)
            run.indexed = (index_q, index_k, weights)
            run.indices, _ = ops.lightning_indexer_topk(index_q, index_k, None, weights, run.ks, run.ke, c.index_topk)
        out, _ = ops.sparse_mla(q, latent, run.indices, self.scale, c.kv_lora_rank)
        return _decoder.decoder_output(out, up, nope, o.weight, o.bias)

    def _attend_dense(self, q_nope, q_rope, latent, run):
        q, k, v = self._expanded(q_nope, q_rope, latent)
        out, lse = ops.mla_attention(q, k, v, run.ks, run.ke, self.scale)
        if run.indexer == "warmup":
            self._teach(q, k, lse, run, None)
        return out

    def _attend_sparse(self, q_nope, q_rope, latent, run):
        weight, learns = self.kv_b_proj.full_weight(), run.indexer == "sparse"
        out, q, lse = latent_attention(q_nope, q_rope, latent, run.indices, weight, self.scale, whole=learns)
        if learns:
            self._teach(q, latent, lse, run, run.indices)
        return out

    def _expanded(self, q_nope, q_rope, latent):
        """Per-head q [T, h, qk], k [Tk, h, qk], v [Tk, h, v] of the dense form."""
        c, heads = self.config, self.config.num_attention_heads
        compressed, k_rope = latent.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(compressed).view(-1, heads, c.qk_nope_head_dim + c.v_head_dim)
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        k = torch.cat([k_nope, k_rope[:, None].expand(-1, heads, -1)], -1)
        return torch.cat([q_nope, q_rope], -1), k, v.contiguous()

    def _index(self, x, q_latent, q_nope, q_rope, latent, run):
        """Leaves the layer's selected indices (and, for its loss, the indexer's outputs) in ``run``."""
        wants_indices = run.attention == "sparse" or run.collect
        if not wants_indices and run.indexer == "none":
            return
        if self.indexer is None or run.reuse_indices:
            if run.collect:
                run.selections.append(self._selection(q_nope, q_rope, latent, run))
            return

        with torch.set_grad_enabled(run.grad and run.indexer != "none"):
            q, k, weights = self.indexer(x.detach(), q_latent.detach(), run)
        if run.cache is not None:
            k = run.cache.append_indexer_key(self.layer, k)
        run.indexed = (q, k, weights)
        if not wants_indices:
            return
        run.indices, _ = ops.lightning_indexer_topk(
            q.detach(), k.detach(), None, weights.detach(), run.ks, run.ke, self.config.index_topk
        )
        if run.collect:
            run.selections.append(self._selection(q_nope, q_rope, latent, run))
        if run.select is not None:
            run.indices = run.select(self._selection(q_nope, q_rope, latent, run))

    def _selection(self, q_nope, q_rope, latent, run):
        def dense():
            return *self._expanded(q_nope.detach(), q_rope.detach(), latent.detach()), self.scale

        return Selection(self.layer, run.indices, run.ks, run.ke, self.config.index_topk, dense)

    def _teach(self, attn_q, attn_k, attn_lse, run, indices):
        """KL from this layer's attention to the indexer it uses.

        Averaged over the layers that an indexer serves it has the gradient of the KL from their average attention, which
        is what a shared indexer should learn (IndexCache, 2603.12201).
        """
        q, k, weights = run.indexed
        with torch.set_grad_enabled(run.grad):
            run.kl.append(
                ops.lightning_indexer_kl(
                    *(q, k, weights, run.ks, run.ke),
                    *(attn_q.detach(), attn_k.detach(), attn_lse.detach(), self.scale, indices),
                )
            )
