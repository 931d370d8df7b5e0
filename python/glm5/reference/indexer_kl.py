"""The indexer's training loss, as specified: KL from the attention's distribution to the indexer's."""

import torch

from glm5.reference._precision import softmax_and_lse, wide
from glm5.reference.lightning_indexer import lightning_indexer_logits
from glm5.reference.mla_attention import mla_attn_target
from glm5.reference.sparse_mla import sparse_mla_attn_target


def indexer_kl_loss(logits: torch.Tensor, target: torch.Tensor, indices: torch.Tensor | None = None) -> torch.Tensor:
    """logits [Tq, Tk] (-inf where a key may not be seen), target [Tq, Tk] -> KL(target || softmax(logits)) [Tq].

    With indices int32 [Tq, topk] (-1 padded) the target is [Tq, topk] and the softmax is over the selected keys alone.
    In nats, at least float32; 0 * log 0 = 0; a row without keys gives 0. The target is a constant.
    """
    logits, target = wide(logits, target.detach())
    valid = logits != float("-inf")
    if indices is not None:
        chosen = indices.long().clamp(min=0)
        valid = valid.gather(1, chosen) & (indices != -1) if logits.shape[1] else indices != -1
        logits = logits.gather(1, chosen) if logits.shape[1] else logits.new_zeros(indices.shape)
    _, lse = softmax_and_lse(logits, valid)
    has_keys = valid.any(-1)
    held = target.masked_fill(~valid & (target == 0), 0)
    cross = torch.where(held == 0, 0, held * torch.where(held == 0, 0, logits)).sum(-1)
    kl = torch.xlogy(held, held).sum(-1) - cross + held.sum(-1) * lse.masked_fill(~has_keys, 0)
    return kl.masked_fill(~has_keys, 0)


def lightning_indexer_kl(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    attn_q: torch.Tensor,
    attn_k: torch.Tensor,
    attn_lse: torch.Tensor,
    scale: float,
    indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """KL from the attention's head-averaged distribution to the indexer's softmax, per query [Tq], at least float32.

    q [Tq, Hi, Di], k [Tk, Di], weights [Tq, Hi] are the indexer's and take the gradient. The teacher is a constant:
    without indices attn_q [Tq, H, D], attn_k [Tk, H, D] and attn_lse [Tq, H] of ``mla_attention`` over [ks, ke);
    with indices int32 [Tq, topk], attn_k [Tk, D] are the latent rows and attn_lse is that of ``sparse_mla``, and both
    distributions are over the selected keys alone.
    """
    logits = lightning_indexer_logits(q, k, None, weights, ks, ke)
    if indices is None:
        target = mla_attn_target(attn_q, attn_k, attn_lse, ks, ke, scale)
    else:
        target = sparse_mla_attn_target(attn_q, attn_k, indices, attn_lse, scale)
    return indexer_kl_loss(logits, target, indices)
