"""The lightning indexer of DeepSeek Sparse Attention, as specified (DeepSeek-V3.2, eq. 1)."""

import torch

from glm5.reference._precision import softmax_and_lse, wide, within
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
    logits = lightning_indexer_logits(q, k, k_scale, weights, ks, ke)
    _, lse = softmax_and_lse(logits, within(ks, ke, k.shape[0]))
    return topk_indices(logits, topk, ks, ke), lse
