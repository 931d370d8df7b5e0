"""The lightning indexer of DeepSeek Sparse Attention, as specified (DeepSeek-V3.2, eq. 1)."""

import torch

from glm5.reference._precision import softmax_and_lse, wide, within
from glm5.reference.cache import indexer_rows, slots_of
from glm5.reference.topk_indices import topk_indices


def lightning_indexer_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor | None,
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
) -> torch.Tensor:
    """q [Tq, H, D], k [Tk, D], k_scale [Tk] or None, weights [Tq, H], ks and ke [Tq] int32 -> [Tq, Tk], at least float32.

    sum_h weights_h * relu(q_h . k) * k_scale inside [ks, ke), -inf outside. Other scales are folded into weights.
    """
    q_wide, k_wide, weights_wide = wide(q, k, weights)
    dots = torch.einsum("qhd,kd->qhk", q_wide, k_wide)
    logits = torch.einsum("qhk,qh->qk", torch.relu(dots), weights_wide)
    if k_scale is not None:
        logits = logits * k_scale.to(logits.dtype)
    return logits.masked_fill(~within(ks, ke, k.shape[0]), float("-inf"))


def lightning_indexer_topk(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor | None,
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    topk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``lightning_indexer_logits`` -> indices int32 [Tq, topk] of ``topk_indices``, lse [Tq] over all keys in range.

    lse is +inf where no key scores above -inf, NaN where a key in range scores NaN.
    """
    return choose(lightning_indexer_logits(q, k, k_scale, weights, ks, ke), ks, ke, topk)


def choose(logits: torch.Tensor, ks: torch.Tensor, ke: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``lightning_indexer_topk`` gives, of scores [Tq, Tk] however they were computed."""
    _, lse = softmax_and_lse(logits, within(ks, ke, logits.shape[1]))
    return topk_indices(logits, topk, ks, ke), lse


def lightning_indexer_topk_paged(
    q: torch.Tensor,
    weights: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    sequence: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    topk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``lightning_indexer_topk`` of each query over positions [ks, ke) of its sequence: keys as in ``indexer_cache_write``.

    block_table [sequences, pages] int32, sequence [Tq] int32 its rows -> indices int32 [Tq, topk], positions in the
    sequence, and lse [Tq].
    """
    indices = torch.full((q.shape[0], topk), -1, dtype=torch.int32)
    lse = torch.full((q.shape[0],), float("inf"), dtype=torch.promote_types(weights.dtype, torch.float32))
    for t in range(q.shape[0]):
        seen = torch.arange(ks[t], max(ke[t], ks[t]))
        if not len(seen):
            continue
        k, k_scale = indexer_rows(cache, slots_of(block_table, int(sequence[t]), seen, cache.shape[1]))
        whole = ks.new_tensor([0]), ks.new_tensor([len(seen)])
        chosen, lse[t : t + 1] = lightning_indexer_topk(q[t : t + 1], k, k_scale, weights[t : t + 1], *whole, topk)
        indices[t] = torch.where(chosen >= 0, chosen + ks[t], -1)
    return indices, lse
