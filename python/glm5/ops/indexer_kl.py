"""The indexer's training loss on the compiled kernels: KL from the attention's distribution to the indexer's.

``lightning_indexer_kl`` is what training uses; ``indexer_kl_loss`` is the same from given logits and target.
"""

import torch

from glm5 import _native  # noqa: F401  (registers the ops)
from glm5.ops._checks import want_tensors
from glm5.ops._register import accumulator, differentiable_once, fake, want_finite


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
    """``KL(p[t] || softmax(I[t]))`` per query, in nats (DeepSeek-V3.2, eq. 3 and 4), never holding [Tq, Tk].

    I is ``lightning_indexer_logits``. p is the attention's distribution summed over heads, made to sum to one:
    ``p[t,s] ~ sum_h exp(scale * attn_q[t,h] . attn_k[s,h] - attn_lse[t,h])``. Without ``indices`` (the warm-up stage) both
    distributions are over the keys [ks, ke); with them (the sparse stage) over the selected keys alone. Scores are computed
    again in the backward; with indices the masses, [Tq, topk], are kept instead. Working memory: a block of 256 keys by a
    tile of queries for each thread, and in the backward 16 copies of dk in float32, fewer (4 at least) beyond 256 MiB.

    Args:
        q: [Tq, Hi, Di], the indexer's queries; bfloat16, float32 or float64.
        k: [Tk, Di], the indexer's keys, dtype of q.
        weights: [Tq, Hi] float32 (float64 for float64), all scales of I folded in.
        ks, ke: int32 [Tq], the keys [ks, ke) that each query sees, 0 <= ks and ke <= Tk.
        attn_q: [Tq, H, D], the attention's queries, dtype of q.
        attn_k: [Tk, H, D], a key per head, as in ``mla_attention``; with indices [Tk, D], latent rows as in ``sparse_mla``.
        attn_lse: [Tq, H] float32 (float64 for float64), the attention's lse over the same keys.
        scale: the attention's softmax scale.
        indices: int32 [Tq, topk], ascending, -1 padded, inside [ks, ke); or None.

    Returns:
        [Tq] float32 (float64 for float64); 0 for a query without keys. Sums are anchored at ks, or at position 0 of the
        index list: a query's loss depends on itself and its keys alone. Differentiable in q, k and weights; the attention
        is a constant. Under CPU autocast q, k, attn_q and attn_k are cast to its dtype.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: wrong dtype, shape or device, scale not finite, ks < 0, ke > Tk, indices outside [ks, ke), not ascending
            or with a -1 inside.
    """
    selected = {} if indices is None else {"indices": indices}
    attention = {"attn_q": attn_q, "attn_k": attn_k, "attn_lse": attn_lse}
    want_tensors("lightning_indexer_kl", q=q, k=k, weights=weights, ks=ks, ke=ke, **attention, **selected)
    return torch.ops.glm5.lightning_indexer_kl(q, k, weights, ks, ke, attn_q, attn_k, attn_lse, scale, indices)[0]


_KL_INPUTS = {
    "q": "float [Tq, Hi+, Di+]",
    "k": "q [Tk, Di]",
    "weights": "sum(q) [Tq, Hi]",
    "attn_q": "q [Tq, H+, D+]",
    "attn_k": lambda arguments: "q [Tk, H, D]" if arguments.get("indices") is None else "q [Tk, D]",
    "attn_lse": "sum(q) [Tq, H]",
    "ks": "int32 [Tq]",
    "ke": "int32 [Tq]",
    "indices": "int32 [Tq, topk]",
}


@fake("lightning_indexer_kl", **_KL_INPUTS)
def _(q, k, weights, ks, ke, attn_q, attn_k, attn_lse, scale, indices=None):
    want_finite("lightning_indexer_kl", "scale", scale)
    queries, topk = q.shape[0], 0 if indices is None else indices.shape[1]
    return (
        q.new_empty(queries, dtype=accumulator(q)),
        q.new_empty((queries, 2), dtype=torch.float64),
        q.new_empty((queries, topk), dtype=accumulator(q)),
    )


# Without indices mass is [Tq, 0].
@fake(
    "lightning_indexer_kl_backward",
    **_KL_INPUTS,
    dkl="sum(q) [Tq]",
    stats="float64 [Tq, 2]",
    mass=lambda arguments: f"sum(q) [Tq, {'0' if arguments['indices'] is None else 'topk'}]",
)
def _(dkl, stats, mass, q, k, weights, ks, ke, attn_q, attn_k, attn_lse, scale, indices):
    return q.new_empty(q.shape), k.new_empty(k.shape), weights.new_empty(weights.shape)


def _kl_setup_context(ctx, inputs, output):
    *tensors, ctx.scale, indices = inputs
    _, stats, mass = output
    ctx.mark_non_differentiable(stats, mass)
    ctx.save_for_backward(stats, mass, *tensors, indices)


def _kl_backward(ctx, dkl, _dstats, _dmass):
    *tensors, indices = ctx.saved_tensors
    dq, dk, dweights = torch.ops.glm5.lightning_indexer_kl_backward(dkl, *tensors, ctx.scale, indices)
    return dq, dk, dweights, None, None, None, None, None, None, None


torch.library.register_autograd("glm5::lightning_indexer_kl", _kl_backward, setup_context=_kl_setup_context)
differentiable_once("lightning_indexer_kl_backward")

# Autocast casts the operands of the matrix products. weights and lse stay float32, so register_autocast, which casts every
# tensor, does not fit.
_library = torch.library.Library("glm5", "FRAGMENT")


def _kl_autocast(q, k, weights, ks, ke, attn_q, attn_k, attn_lse, scale, indices=None):
    dtype = torch.get_autocast_dtype("cpu")
    q, k, attn_q, attn_k = (t.to(dtype) if t.dtype == torch.float32 else t for t in (q, k, attn_q, attn_k))
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
        return torch.ops.glm5.lightning_indexer_kl(q, k, weights, ks, ke, attn_q, attn_k, attn_lse, scale, indices)


_library.impl("lightning_indexer_kl", _kl_autocast, "AutocastCPU")


def indexer_kl_loss(logits: torch.Tensor, target: torch.Tensor, indices: torch.Tensor | None = None) -> torch.Tensor:
    """``KL(target || softmax(logits))`` per query, in nats, with 0 log 0 = 0 (DeepSeek-V3.2, eq. 3 and 4).

    What ``lightning_indexer_kl`` computes block by block, for logits and target that are at hand.

    Args:
        logits: [Tq, Tk] float32 or float64, -inf where a key may not be seen.
        target: the attention's distribution, dtype of logits: [Tq, Tk], or [Tq, topk] with indices. A constant.
        indices: int32 [Tq, topk], -1 selects nothing: the softmax is over the selected keys alone; or None.

    Returns:
        [Tq], dtype of logits; 0 for a query without keys. Sums start at the first key that may be seen. Differentiable in
        logits.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: wrong dtype, shape or device, an index outside [-1, Tk).
    """
    want_tensors("indexer_kl_loss", logits=logits, target=target, **({} if indices is None else {"indices": indices}))
    return torch.ops.glm5.indexer_kl_loss(logits, target, indices)


_LOSS_INPUTS = {
    "logits": "float32/float64 [Tq, Tk]",
    "indices": "int32 [Tq, topk]",
    "target": lambda arguments: f"logits [Tq, {'Tk' if arguments.get('indices') is None else 'topk'}]",
}


@fake("indexer_kl_loss", **_LOSS_INPUTS)
def _(logits, target, indices=None):
    return logits.new_empty(logits.shape[0])


@fake("indexer_kl_loss_backward", **_LOSS_INPUTS, dkl="logits [Tq]")
def _(dkl, logits, target, indices):
    return logits.new_empty(logits.shape)


def _loss_setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _loss_backward(ctx, dkl):
    return torch.ops.glm5.indexer_kl_loss_backward(dkl, *ctx.saved_tensors), None, None


torch.library.register_autograd("glm5::indexer_kl_loss", _loss_backward, setup_context=_loss_setup_context)
differentiable_once("indexer_kl_loss_backward")
