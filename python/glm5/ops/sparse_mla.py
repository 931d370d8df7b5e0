"""Sparse multi-head latent attention on the compiled kernels, its backward, and the indexer's teacher made from it.

Which rows a query attends to is given; choosing them is ``lightning_indexer_topk``'s business.
"""

import torch

from glm5 import _native  # noqa: F401  (registers the ops)
from glm5.ops._checks import want_integers, want_tensors
from glm5.ops._pages import latent_pool, want_latent_rows
from glm5.ops._register import accumulator, compiled, differentiable_once, fake, not_differentiable, want_finite, want_that

_sparse_mla = compiled("sparse_mla")
_sparse_mla_paged = compiled("sparse_mla_paged")


def sparse_mla(
    q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, scale: float, d_v: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every head to the latent rows that its query selected: MLA in its absorbed, multi-query form.

    ``out[t, h] = sum_j softmax_j(scale * q[t, h] . kv[indices[t, j]]) * kv[indices[t, j], :d_v]``
    (DeepSeek-V3.2, arXiv 2512.02556, section 2; GLM-5: 64 heads, 576 dims of which 512 are the value, 2048 rows a query).

    Args:
        q: [Tq, H, Dk], bfloat16, float32 or float64; any H and Dk from 1.
        kv: [Tk, Dk], dtype of q: one row a token, shared by all heads; its first ``d_v`` dims are the value.
        indices: int32 [Tq, topk]; -1 selects nothing. Rows are processed in list order, in blocks of 64 list positions.
        scale: factor of the scores, finite.
        d_v: dims of the value, 1 to Dk.

    Returns:
        out [Tq, H, d_v] in q's dtype and lse [Tq, H], the natural log of the sum of exponentials, in float32 (float64 for
        float64). Where nothing is selected out = 0 and lse = +inf; a NaN score makes the head's lse and out NaN. A row
        depends on its own q, list and selected rows alone, bit for bit; -1s at the end of a list change nothing.
        Differentiable in q and kv, from out and from lse. Under CPU autocast q and kv are cast to its dtype.

    Raises:
        TypeError: q, kv or indices is not a tensor, d_v not an integer.
        ValueError: wrong dtype, shape or device; d_v out of range; scale not finite; an index below -1 or >= Tk.
    """
    want_tensors("sparse_mla", q=q, kv=kv, indices=indices)
    want_integers("sparse_mla", d_v=d_v)
    return _sparse_mla(q, kv, indices, scale, d_v)


def sparse_mla_paged(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    sequence: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
    d_v: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``sparse_mla`` over latent rows in pages, bit for bit: decoding and chunked prefill of many sequences.

    Position s of a sequence lies in place s % page_size of page ``block_table[sequence, s // page_size]``. Working memory:
    the slots of the lists, and for FP8 pages the selected rows of a few queries.

    Args:
        q: [Tq, H, Dk], bfloat16, float32 or float64; bfloat16 alone for FP8 pages.
        cache: pages of latent rows as ``latent_cache_write`` fills them, [pages, page_size, Dk] in q's dtype, contiguous
            (else it is copied first); or uint8 for FP8 (656 bytes a row of 512 + 64 dims), whose rows are read as bfloat16.
        block_table: int32 [sequences, n], pages in the order of a sequence's positions. Entries of positions that no query
            sees may hold anything; so may the pages and places that none sees. Sequences may share pages.
        sequence: int32 [Tq], each query's row of block_table.
        indices: int32 [Tq, topk], positions of the query's sequence; -1 selects nothing. Rows are processed in list order.
        scale: factor of the scores, finite.
        d_v: dims of the value, 1 to Dk.

    Returns:
        out [Tq, H, d_v] and lse [Tq, H] as in ``sparse_mla``. No gradient.

    Raises:
        TypeError: an argument is not a tensor, d_v not an integer.
        ValueError: wrong dtype, shape or device; d_v out of range; scale not finite; a
            sequence that is no row of block_table; an index below -1 or beyond its positions; a page that a query selects
            from and that is not in cache.
    """
    want_tensors(
        "sparse_mla_paged", q=q, cache=cache, block_table=block_table, sequence=sequence, indices=indices
    )  # fmt: skip
    want_integers("sparse_mla_paged", d_v=d_v)
    return _sparse_mla_paged(q, cache, block_table, sequence, indices, scale, d_v)


def sparse_mla_attn_target(
    q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, lse: torch.Tensor, scale: float
) -> torch.Tensor:
    """What the attention attended to, the indexer's teacher in the sparse stage (DeepSeek-V3.2, eq. 3 to 5).

    ``target[t, j]`` is the probability of row ``indices[t, j]`` summed over heads, divided by the sum over j.

    Args:
        q, kv, indices, scale: as given to ``sparse_mla``.
        lse: [Tq, H] as returned by it.

    Returns:
        [Tq, topk], float32 (float64 for float64); 0 where the index is -1. Takes part in no gradient.

    Raises:
        TypeError: q, kv, indices or lse is not a tensor.
        ValueError: wrong dtype, shape or device; scale not finite; an index below -1 or >= Tk.
    """
    want_tensors("sparse_mla_attn_target", q=q, kv=kv, indices=indices, lse=lse)
    return torch.ops.glm5.sparse_mla_attn_target(q, kv, indices, lse, scale)


_INPUTS = {"q": "float [Tq, H+, Dk+]", "kv": "q [Tk, Dk]", "indices": "int32 [Tq, topk]"}


@fake("sparse_mla", **_INPUTS)
def _(q, kv, indices, scale, d_v):
    want_finite("sparse_mla", "scale", scale)
    for bound in (d_v >= 1, d_v <= q.shape[2]):
        want_that(bound, "sparse_mla", "d_v is", d_v, f"1 to {q.shape[2]} (the dim of q and kv)")
    return q.new_empty(q.shape[0], q.shape[1], d_v), q.new_empty(q.shape[0], q.shape[1], dtype=accumulator(q))


@fake(
    "sparse_mla_paged",
    q=lambda arguments: f"{'bfloat16' if arguments['cache'].dtype == torch.uint8 else 'float'} [Tq, H+, Dk+]",
    cache=latent_pool("q", "Dk"),
    indices="int32 [Tq, topk]",
    block_table="int32 [sequences, n]",
    sequence="int32 [Tq]",
)
def _(q, cache, block_table, sequence, indices, scale, d_v):
    op = "sparse_mla_paged"
    want_finite(op, "scale", scale)
    want_latent_rows(op, cache, q.shape[2])
    for bound in (d_v >= 1, d_v <= q.shape[2]):
        want_that(bound, op, "d_v is", d_v, f"1 to {q.shape[2]} (the dim of q and cache)")
    return q.new_empty(q.shape[0], q.shape[1], d_v), q.new_empty(q.shape[0], q.shape[1], dtype=accumulator(q))


@fake("sparse_mla_backward", **_INPUTS, lse="sum(q) [Tq, H]", dlse="sum(q) [Tq, H]", dout="q [Tq, H, d_v+]")
def _(dout, dlse, q, kv, indices, lse, scale):
    want_that(dout.shape[2] <= q.shape[2], "sparse_mla_backward", "dout has shape", dout.shape, "at most the columns of kv")
    return q.new_empty(q.shape), kv.new_empty(kv.shape)


@fake("sparse_mla_attn_target", **_INPUTS, lse="sum(q) [Tq, H]")
def _(q, kv, indices, lse, scale):
    want_finite("sparse_mla_attn_target", "scale", scale)
    return q.new_empty(indices.shape, dtype=accumulator(q))


def _setup_context(ctx, inputs, output):
    q, kv, indices, scale, d_v = inputs
    ctx.save_for_backward(q, kv, indices, output[1])
    ctx.scale, ctx.d_v = scale, d_v
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    q, kv, indices, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return None, None, None, None, None
    if dout is None:
        dout = q.new_zeros(q.shape[0], q.shape[1], ctx.d_v)
    dq, dkv = torch.ops.glm5.sparse_mla_backward(dout, dlse, q, kv, indices, lse, ctx.scale)
    return dq, dkv, None, None, None


torch.library.register_autograd("glm5::sparse_mla", _backward, setup_context=_setup_context)
differentiable_once("sparse_mla_backward")
not_differentiable("sparse_mla_attn_target", "sparse_mla_paged")
torch.library.register_autocast("glm5::sparse_mla", "cpu", torch.bfloat16)
