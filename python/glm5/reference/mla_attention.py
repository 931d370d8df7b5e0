"""Dense multi-head latent attention, un-absorbed, and the indexer's dense teacher, as specified."""

import torch

from glm5.reference._precision import softmax_and_lse, wide, within
from glm5.reference.cache import latent_cache_read, slots_of
from glm5.reference.sparse_mla import normalised_head_sum


def mla_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ks: torch.Tensor, ke: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [Tq, H, D], k [Tk, H, D], v [Tk, H, Dv] -> out [Tq, H, Dv] in q's dtype, lse [Tq, H] at least float32.

    A query attends to the keys in [ks, ke). An empty range gives out = 0, lse = +inf.
    """
    q_wide, k_wide, v_wide = wide(q, k, v)
    valid = within(ks, ke, k.shape[0])[:, None, :]
    scores = torch.einsum("qhd,khd->qhk", q_wide, k_wide) * scale
    probabilities, lse = softmax_and_lse(scores, valid)
    # Each query's own keys alone: 0 * NaN of a foreign document must not leak in.
    values = v_wide.transpose(0, 1)
    if values.isfinite().all():
        return torch.einsum("qhk,hkd->qhd", probabilities, values).to(q.dtype), lse
    terms = (probabilities[..., None] * values[None]).masked_fill(~valid[..., None], 0)
    return terms.sum(2).to(q.dtype), lse


def mla_attention_paged(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    sequence: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    scale: float,
    d_v: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``mla_attention`` of each query over positions [ks, ke) of its sequence: every head's key is the latent row in a cache
    of ``latent_cache_write``, its value the first d_v dims.

    block_table [sequences, pages] int32, sequence [Tq] int32 its rows. FP8 rows are read as bfloat16.
    """
    out = q.new_zeros(*q.shape[:2], d_v)
    lse = torch.full(q.shape[:2], float("inf"), dtype=torch.promote_types(q.dtype, torch.float32))
    for t in range(q.shape[0]):
        seen = torch.arange(ks[t], max(ke[t], ks[t]))
        if not len(seen):
            continue
        rows = latent_cache_read(cache, slots_of(block_table, int(sequence[t]), seen, cache.shape[1]))
        k = rows[:, None].expand(-1, q.shape[1], -1)
        whole = ks.new_tensor([0]), ks.new_tensor([len(seen)])
        out[t : t + 1], lse[t : t + 1] = mla_attention(q[t : t + 1], k, k[..., :d_v], *whole, scale)
    return out, lse


def mla_attn_target(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, ks: torch.Tensor, ke: torch.Tensor, scale: float
) -> torch.Tensor:
    """The indexer's teacher: q, k, ranges and lse [Tq, H] as in ``mla_attention`` -> [Tq, Tk], at least float32.

    Attention probabilities summed over heads, then L1-normalised over the keys in range; 0 outside it.
    """
    q_wide, k_wide = wide(q.detach(), k.detach())
    scores = torch.einsum("qhd,khd->qhk", q_wide, k_wide) * scale
    return normalised_head_sum(scores, lse.detach().to(scores.dtype), within(ks, ke, k.shape[0])[:, None, :])
