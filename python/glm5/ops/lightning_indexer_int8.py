"""The lightning indexer on int8 queries and keys: an option of its own, which chooses nearly the keys of the bfloat16 form.

Quantising is the caller's (``quantize_int8``, a row at a time); so is folding q's scales into the weights.
"""

import torch

from glm5 import _native  # noqa: F401  (registers the ops)
from glm5.ops._checks import want_integers, want_tensors
from glm5.ops._register import fake, not_differentiable, want_that


def lightning_indexer_logits_int8(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
) -> torch.Tensor:
    """``I[t,s] = k_scale[s] * sum_h weights[t,h] * relu(q[t,h] . k[s])`` (DeepSeek-V3.2, eq. 1), -inf outside [ks, ke).

    For bfloat16 ``x`` and ``y``, ``q, q_scale = quantize_int8(x)``, ``k, k_scale = quantize_int8(y)`` and
    ``weights * q_scale`` give about the scores of ``lightning_indexer_logits(x, y, None, weights, ...)``; how near the two
    selections are, and when this form pays, is in docs/int8-indexer.md.

    Args:
        q: [Tq, H, D] int8. Any H; D <= 131071, so that no sum leaves int32.
        k: [Tk, D] int8; one key shared by all heads.
        k_scale: [Tk] float32.
        weights: [Tq, H] float32, into which the caller has also folded q's scales.
        ks, ke: int32 [Tq], as in ``lightning_indexer_logits``.

    Returns:
        [Tq, Tk] float32. A dot product is exact, then rounded to float32; heads are added in order, by one fma each, and the
        sum is multiplied by k_scale: the same bits on every instruction set. Not differentiable.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: wrong dtype, shape or device, D > 131071, ks < 0, ke > Tk.
    """
    want_tensors("lightning_indexer_logits_int8", q=q, k=k, k_scale=k_scale, weights=weights, ks=ks, ke=ke)
    return torch.ops.glm5.lightning_indexer_logits_int8(q, k, k_scale, weights, ks, ke)


def lightning_indexer_topk_int8(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    topk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``lightning_indexer_topk`` of the scores of ``lightning_indexer_logits_int8``, without ever holding [Tq, Tk].

    Args:
        q, k, k_scale, weights, ks, ke: as in ``lightning_indexer_logits_int8``.
        topk: how many keys, >= 0; it may exceed Tk.

    Returns:
        indices int32 [Tq, topk], the same on every instruction set, and lse [Tq] float32, as ``lightning_indexer_topk``.
        Neither is differentiable.

    Raises:
        TypeError: as ``lightning_indexer_logits_int8``; topk is not an integer.
        ValueError: as ``lightning_indexer_logits_int8``; topk < 0.
    """
    want_tensors("lightning_indexer_topk_int8", q=q, k=k, k_scale=k_scale, weights=weights, ks=ks, ke=ke)
    want_integers("lightning_indexer_topk_int8", topk=topk)
    return torch.ops.glm5.lightning_indexer_topk_int8(q, k, k_scale, weights, ks, ke, topk)


_SCORED = {
    "q": "int8 [Tq, H, D]",
    "k": "int8 [Tk, D]",
    "weights": "float32 [Tq, H]",
    "k_scale": "float32 [Tk]",
    "ks": "int32 [Tq]",
    "ke": "int32 [Tq]",
}


def _want_sums_within_int32(op, q):
    want_that(q.shape[2] <= 131071, op, "q has shape", q.shape, "at most 131071 in dimension 2, so that sums fit int32")


@fake("lightning_indexer_logits_int8", **_SCORED)
def _(q, k, k_scale, weights, ks, ke):
    _want_sums_within_int32("lightning_indexer_logits_int8", q)
    return q.new_empty((q.shape[0], k.shape[0]), dtype=torch.float32)


@fake("lightning_indexer_topk_int8", **_SCORED)
def _(q, k, k_scale, weights, ks, ke, topk):
    want_that(topk >= 0, "lightning_indexer_topk_int8", "topk is", topk, "a number >= 0")
    _want_sums_within_int32("lightning_indexer_topk_int8", q)
    return q.new_empty((q.shape[0], topk), dtype=torch.int32), q.new_empty((q.shape[0],), dtype=torch.float32)


not_differentiable("lightning_indexer_logits_int8", "lightning_indexer_topk_int8")
