"""glm5's kernels inside a Transformers ``GlmMoeDsa`` model.

``enable()`` replaces the forward of Transformers' attention and experts: the indexer's scores and its top-k in one op that
never holds [queries, keys], attention on the latent cache itself with the key and value up-projections absorbed, and grouped
experts. ``enable(model)`` does that to one model; ``disable()`` and ``disable(model)`` undo it. Weights, caches, checkpoints
and ``generate`` stay Transformers'; gradients are the same ones, the indexer has none.

Importing this module also registers ``attn_implementation="glm5"``, for those who want no forward replaced. It can save no
more than the attention itself: keys and values arrive expanded to every head, and the indexer's dense scores are there.

Needs ``transformers >= 5.23``.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

try:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as theirs
except ImportError as error:
    raise ImportError(
        f"glm5.integrations.transformers needs transformers with glm_moe_dsa: pip install 'transformers>=5.23' ({error})"
    ) from error

from glm5 import ops
from glm5.integrations.appending import append_indexer_keys, append_latent
from glm5.model.attention import latent_attention
from glm5.model.batches import padding

NAME = "glm5"


def enable(model: nn.Module | None = None) -> None:
    """Makes ``model``, or without one every GlmMoeDsa model that is or will be there, compute with glm5's kernels.

    Raises:
        ValueError: the model has no GlmMoeDsa layers, or its activation is not "silu".
    """
    for target, make in _targets(model):
        if "_glm5_before" not in vars(target):
            target._glm5_before = vars(target).get("forward")
            target.forward = make(target)


def disable(model: nn.Module | None = None) -> None:
    """Takes ``enable`` back, for the same argument. Does nothing where it was not enabled."""
    for target, _ in _targets(model):
        if "_glm5_before" in vars(target):
            before = target._glm5_before
            del target._glm5_before, target.forward
            if before is not None:
                target.forward = before


def _targets(model: nn.Module | None) -> list[tuple]:
    """(what gets another forward, how it is made) for classes, or for the modules of one model."""
    if model is None:
        return [(cls, lambda cls, forward=forward: _method(forward, cls.forward)) for cls, forward in _FORWARDS.items()]
    found = [
        (module, lambda module, forward=forward: partial(forward, module, original=module.forward))
        for module in model.modules()
        for cls, forward in _FORWARDS.items()
        if isinstance(module, cls)
    ]
    if not found:
        raise ValueError(f"glm5.integrations.transformers: {type(model).__name__} has no GlmMoeDsa layers")
    for module in model.modules():
        if isinstance(module, theirs.GlmMoeDsaExperts):
            _check_activation(module)
    return found


def _check_activation(experts: nn.Module) -> None:
    if experts.config.hidden_act != "silu":
        raise ValueError(f"glm5.integrations.transformers: hidden_act is {experts.config.hidden_act!r}, want 'silu'")


def _method(forward: Callable, original: Callable) -> Callable:
    def replaced(self, *args, **kwargs):
        return forward(self, *args, original=partial(original, self), **kwargs)

    return replaced


# ---- which keys a query may see


def key_ranges(
    attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, seen: int, batch: int, time: int, device
) -> torch.Tensor:
    """int32 [batch, time, 2]: [first, end) of the keys that a query may see, as columns of its sequence.

    Args:
        attention_mask: None, [batch, keys] with 0 for padding at the ends, or [batch, 1, time, keys], bool or additive.
        position_ids: [batch or 1, time]; without mask and cache a step other than +1 begins another document.
        seen: tokens in the cache.

    Raises:
        ValueError: a mask in which a query's keys are not one range.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return _ranges_of_dense_mask(attention_mask[:, 0])
    end = torch.arange(seen + 1, seen + time + 1, device=device).expand(batch, time)
    first = torch.zeros_like(end)
    if attention_mask is not None:
        mask = nn.functional.pad(attention_mask.to(device), (0, max(seen + time - attention_mask.shape[1], 0)), value=1)
        left, length = padding(mask[:, : seen + time], batch, seen + time, "glm5.integrations.transformers")
        first = left[:, None].expand(batch, time)
        end = torch.where((end > first) & (end <= (left + length)[:, None]), end, first)
    elif position_ids is not None and seen == 0 and time > 1:
        positions = position_ids.expand(batch, time)
        begins = nn.functional.pad(positions[:, 1:] != positions[:, :-1] + 1, (1, 0))
        first = torch.where(begins, end - 1, 0).cummax(1).values
    return torch.stack([first, end], -1).int()


def _are_ranges(mask: torch.Tensor | None) -> bool:
    return mask is not None and mask.dim() == 3


def _ranges_of_dense_mask(mask: torch.Tensor) -> torch.Tensor:
    """mask [batch, time, keys], bool or additive -> int32 [batch, time, 2]."""
    there = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    first = there.to(torch.uint8).argmax(-1)
    count = there.sum(-1)
    column = torch.arange(mask.shape[-1], device=mask.device)
    for row in range(mask.shape[1]):  # one row at a time: the comparison must not be as large as the mask
        inside = (column >= first[:, row, None]) & (column < (first + count)[:, row, None])
        if not torch.equal(inside, there[:, row]):
            raise ValueError(
                f"glm5.integrations.transformers: query {row}'s attention mask has holes, want one range of keys a query"
            )
    return torch.stack([first, first + count], -1).int()


# ---- the forwards


def _model_forward(
    self,
    input_ids=None,
    attention_mask=None,
    position_ids=None,
    past_key_values=None,
    inputs_embeds=None,
    *args,
    original: Callable,
    **kwargs,
):
    """GlmMoeDsaModel's, with ranges of keys in place of a [queries, keys] mask."""
    given = input_ids if input_ids is not None else inputs_embeds
    if given is not None:
        ranges = attention_mask["indexed_attention"] if isinstance(attention_mask, dict) else attention_mask
        if not _are_ranges(ranges):
            batch, time = given.shape[:2]
            seen = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
            use_cache = kwargs.get("use_cache")
            cached = past_key_values is not None or (self.config.use_cache if use_cache is None else use_cache)
            ranges = key_ranges(ranges, None if cached else position_ids, seen, batch, time, given.device)
        attention_mask = {"indexed_attention": ranges}
    return original(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, *args, **kwargs)


def _attention_forward(
    self,
    hidden_states,
    position_embeddings,
    attention_mask,
    past_key_values=None,
    position_ids=None,
    prev_topk_indices=None,
    *,
    original: Callable,
    **kwargs,
):
    """GlmMoeDsaAttention's, on the latent cache."""
    batch, time = hidden_states.shape[:2]
    if self.training and self.attention_dropout:
        raise ValueError(
            f"glm5.integrations.transformers: attention_dropout is {self.attention_dropout} and the model trains, want 0"
        )
    if attention_mask.dim() == 4:  # the layer alone, or a model whose forward is not ours
        attention_mask = _ranges_of_dense_mask(attention_mask[:, 0])
    weight = _plain_weight(self, "kv_b_proj")
    cos, sin = position_embeddings

    q_latent = self.q_a_layernorm(self.q_a_proj(hidden_states))
    q = self.q_b_proj(q_latent).view(batch, time, self.num_heads, self.qk_head_dim)
    q_nope, q_rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
    compressed, k_rope = self.kv_a_proj_with_mqa(hidden_states).split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
    compressed = self.kv_a_layernorm(compressed)
    q_rope, k_rope = theirs.apply_rotary_pos_emb_interleave(q_rope, k_rope.unsqueeze(2), cos, sin, unsqueeze_dim=2)
    k_rope = k_rope.squeeze(2)
    latent = None
    if past_key_values is not None:
        latent = append_latent(past_key_values, self.layer_idx, compressed, k_rope)
        if latent is None:
            compressed, k_rope = (
                x.squeeze(1) for x in past_key_values.update(compressed.unsqueeze(1), k_rope.unsqueeze(1), self.layer_idx)
            )
    if latent is None:
        latent = torch.cat([compressed, k_rope], -1).flatten(0, 1)
    keys = latent.shape[0] // batch

    # From here on the batch is one row of tokens, and a sequence's keys are a range of rows.
    start = torch.arange(batch, device=hidden_states.device, dtype=torch.int32)[:, None] * keys
    if self.indexer is not None:
        ks, ke = ((attention_mask[..., i] + start).reshape(-1) for i in (0, 1))
        indices = _select(self.indexer, hidden_states, q_latent, cos, sin, past_key_values, ks, ke)
    elif prev_topk_indices is None:
        raise ValueError("Shared DSA layers require top-k indices from a previous full indexer layer.")
    else:
        indices = prev_topk_indices.reshape(batch * time, -1)

    out, _, _ = latent_attention(q_nope.flatten(0, 1), q_rope.flatten(0, 1), latent, indices, weight, self.scaling)
    return self.o_proj(out.view(batch, time, -1)), None, indices.view(batch, time, -1)


@torch.no_grad()
def _select(indexer, hidden_states, q_latent, cos, sin, past_key_values, ks, ke) -> torch.Tensor:
    """The indexer's choice: int32 [rows, topk] of rows of the flattened keys."""
    batch, time = hidden_states.shape[:2]
    rope = indexer.qk_rope_head_dim
    q = indexer.wq_b(q_latent).view(batch, time, indexer.n_heads, indexer.head_dim)
    k = indexer.k_norm(indexer.wk(hidden_states)).unsqueeze(2)
    q_turned, k_turned = theirs.apply_rotary_pos_emb_interleave(q[..., :rope], k[..., :rope], cos, sin, unsqueeze_dim=2)
    q = torch.cat([q_turned, q[..., rope:]], -1).flatten(0, 1)
    k = torch.cat([k_turned, k[..., rope:]], -1).squeeze(2)
    if past_key_values is not None:
        cached = append_indexer_keys(past_key_values, indexer.layer_idx, k)
        k = past_key_values.update_indexer(k, indexer.layer_idx) if cached is None else cached
    weights = indexer.weights_proj(hidden_states.to(indexer.weights_proj.weight.dtype)).flatten(0, 1).float()
    weights = weights * (indexer.n_heads**-0.5 * indexer.softmax_scale)
    return ops.lightning_indexer_topk(q, k.flatten(0, 1), None, weights, ks, ke, indexer.index_topk)[0]


def _experts_forward(self, hidden_states, top_k_index, top_k_weights, *, original: Callable):
    """GlmMoeDsaExperts': tokens sorted by expert, two grouped products, weighted sum."""
    _check_activation(self)
    slots, _, slot_of_row, group_ends = ops.moe_permute(hidden_states, top_k_index.int(), self.num_experts)
    hidden = ops.silu_mul(ops.grouped_linear(slots, self.gate_up_proj, group_ends))
    return ops.moe_unpermute(ops.grouped_linear(hidden, self.down_proj, group_ends), slot_of_row, top_k_weights.float())


def _plain_weight(module: nn.Module, name: str) -> torch.Tensor:
    linear = getattr(module, name)
    if type(linear) is not nn.Linear:
        raise ValueError(
            f"glm5.integrations.transformers: {name} is a {type(linear).__name__}, and absorbing it into the query needs "
            "the plain weight of an nn.Linear: merge the adapter, or dequantise it"
        )
    return linear.weight


_FORWARDS = {
    theirs.GlmMoeDsaModel: _model_forward,
    theirs.GlmMoeDsaAttention: _attention_forward,
    theirs.GlmMoeDsaExperts: _experts_forward,
}


# ---- attn_implementation="glm5"


def attention_interface(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    indices: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention over the selected keys alone, for ``attn_implementation="glm5"``.

    Args:
        query, key: [B, heads, S, qk], [B, heads, T, qk]; value: [B, heads, T, v].
        attention_mask: bool [B, 1, S, T].
        indices: int [B, S, k], any order; those that the mask forbids are left out.
        dropout: must be 0.

    Returns:
        ([B, S, heads, v], None)

    Raises:
        ValueError: dropout, or no indices.
    """
    if dropout:
        raise ValueError(f"attn_implementation='glm5': attention dropout is {dropout}, want 0")
    if indices is None:
        raise ValueError("attn_implementation='glm5' is for GlmMoeDsa layers, which pass the indexer's indices")
    width = value.shape[-1]
    allowed = attention_mask[:, 0].gather(-1, indices.long())
    kept = torch.where(allowed, indices, torch.iinfo(torch.int32).max).sort(-1).values.int()
    kept = torch.where(kept == torch.iinfo(torch.int32).max, -1, kept)
    # sparse_mla takes values from the first columns of the keys: they stand there, and the query is 0 on them.
    rows = torch.cat([value, key], -1)
    q = nn.functional.pad(query, (width, 0))
    out = [
        torch.stack(
            [
                ops.sparse_mla(q[b, h].unsqueeze(1), rows[b, h], kept[b], scaling, width)[0].squeeze(1)
                for h in range(query.shape[1])
            ],
            1,
        )
        for b in range(query.shape[0])
    ]
    return torch.stack(out), None


AttentionInterface.register(NAME, attention_interface)
AttentionMaskInterface.register(NAME, sdpa_mask)
