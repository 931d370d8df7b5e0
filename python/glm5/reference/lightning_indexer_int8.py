"""The lightning indexer on int8 queries and keys, as specified (DeepSeek-V3.2, eq. 1; dot products exact in int32)."""

import torch

from glm5.reference._precision import wide, within
from glm5.reference.lightning_indexer import choose


def lightning_indexer_logits_int8(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
) -> torch.Tensor:
    """``lightning_indexer_logits`` of int8 q [Tq, H, D] and k [Tk, D], k_scale always given -> [Tq, Tk], at least float32.

    Heads are added in order; the ops round once a head, being one fma each.
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
    """``lightning_indexer_topk`` of the scores of ``lightning_indexer_logits_int8``: indices int32 [Tq, topk], lse [Tq]."""
    return choose(lightning_indexer_logits_int8(q, k, k_scale, weights, ks, ke), ks, ke, topk)
