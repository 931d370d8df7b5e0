"""Sparse multi-head latent attention in its absorbed form, as specified."""

import torch

from glm5.reference._precision import softmax_and_lse, wide
from glm5.reference.cache import latent_cache_read, slots_of


def _scores(q, kv, indices, scale):
    """Scores [Tq, H, topk], gathered rows [Tq, topk, Dk], validity [Tq, 1, topk]; -1 is padding."""
    q_wide, kv_wide = wide(q, kv)
    valid = (indices != -1)[:, None, :]
    if kv.shape[0] == 0:
        rows = kv_wide.new_zeros(*indices.shape, kv.shape[1])
    else:
        rows = kv_wide[indices.long().clamp(min=0)]
    rows = rows.masked_fill(~valid.transpose(1, 2), 0)
    return torch.einsum("qhd,qkd->qhk", q_wide, rows) * scale, rows, valid


def sparse_mla(
    q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, scale: float, d_v: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [Tq, H, Dk], kv [Tk, Dk], indices int32 [Tq, topk] -> out [Tq, H, d_v] in q's dtype, lse [Tq, H] at least float32.

    Softmax of q . kv[indices] * scale over the selected rows, times their first d_v dims. -1 selects nothing; a query with
    nothing selected gives out = 0, lse = +inf.
    """
    scores, rows, valid = _scores(q, kv, indices, scale)
    probabilities, lse = softmax_and_lse(scores, valid)
    return torch.einsum("qhk,qkd->qhd", probabilities, rows[..., :d_v]).to(q.dtype), lse


def sparse_mla_paged(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    sequence: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
    d_v: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``sparse_mla`` of each query on positions ``indices`` [Tq, topk] of its sequence in a cache of ``latent_cache_write``.

    block_table [sequences, pages] int32, sequence [Tq] int32 its rows. FP8 rows are read as bfloat16.
    """
    out = q.new_zeros(*q.shape[:2], d_v)
    lse = torch.full(q.shape[:2], float("inf"), dtype=torch.promote_types(q.dtype, torch.float32))
    for t in range(q.shape[0]):
        listed = indices[t][indices[t] != -1]
        if not len(listed):
            continue
        rows = latent_cache_read(cache, slots_of(block_table, int(sequence[t]), listed, cache.shape[1]))
        here = torch.arange(len(listed), dtype=torch.int32)[None]
        out[t : t + 1], lse[t : t + 1] = sparse_mla(q[t : t + 1], rows, here, scale, d_v)
    return out, lse


def sparse_mla_attn_target(
    q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, lse: torch.Tensor, scale: float
) -> torch.Tensor:
    """The indexer's teacher: q, kv, indices and lse [Tq, H] as in ``sparse_mla`` -> [Tq, topk], at least float32.

    Attention probabilities summed over heads, then L1-normalised over the selected keys; 0 where nothing is selected.
    """
    scores, _, valid = _scores(q.detach(), kv.detach(), indices, scale)
    return normalised_head_sum(scores, lse.detach().to(scores.dtype), valid)


def normalised_head_sum(scores: torch.Tensor, lse: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """scores [Tq, H, n], lse [Tq, H], valid [Tq, 1, n] -> [Tq, n]: sum_h exp(scores - lse), normalised (0 stays 0)."""
    mass = torch.exp(scores - lse[..., None]).masked_fill(~valid, 0).sum(1)
    total = mass.sum(-1, keepdim=True)
    return (mass / total.masked_fill(total == 0, 1)).masked_fill(~valid[:, 0], 0)
