"""The lightning indexer on int8 queries and keys, as specified (DeepSeek-V3.2, eq. 1; dot products exact in int32)."""

import torch

from glm5.reference._precision import softmax_and_lse, wide, within
from glm5.reference.topk_indices import topk_indices


def lightning_indexer_logits_int8(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
) -> torch.Tensor:
    """q int8 [Tq, H, D], k int8 [Tk, D], k_scale [Tk], weights [Tq, H], ks and ke [Tq] int32 -> [Tq, Tk], at least float32.

    sum_h weights_h * relu(q_h . k) * k_scale inside [ks, ke), -inf outside. Heads are added in order; the ops round once a
    head, being one fma each.
    """
    dots = torch.einsum("qhd,kd->qhk", q.double(), k.double())  # exact
    (weights_wide,) = wide(weights)
    terms = torch.relu(dots).to(weights_wide.dtype) * weights_wide[..., None]
    logits = torch.zeros_like(terms[:, 0]) if q.shape[1] else terms.sum(1)
    for head in range(q.shape[1]):
        logits = logits + terms[:, head]
    logits = logits * k_scale.to(logits.dtype)
    return logits.masked_fill(~within(ks, ke, k.shape[0]), float("-inf"))


def lightning_indexer_topk_int8(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    topk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``lightning_indexer_logits_int8`` -> indices int32 [Tq, topk] of ``topk_indices``, lse [Tq] over all keys in range.

    lse is +inf where no key scores above -inf, NaN where a key in range scores NaN.
    """
    logits = lightning_indexer_logits_int8(q, k, k_scale, weights, ks, ke)
    _, lse = softmax_and_lse(logits, within(ks, ke, k.shape[0]))
    return topk_indices(logits, topk, ks, ke), lse
