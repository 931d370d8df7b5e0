"""The lightning indexer of DeepSeek Sparse Attention on the compiled kernels: scores, their backward, the streamed top-k.

Projections, RoPE, the Hadamard rotation and quantisation are the caller's; so are all scales but ``k_scale``.
"""

import torch

from glm5 import _native  # noqa: F401  (registers the ops)
from glm5.ops._checks import want_integers, want_tensors
from glm5.ops._register import accumulator, compiled, differentiable_once, fake, not_differentiable, want_that

_topk_paged = compiled("lightning_indexer_topk_paged")


def lightning_indexer_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor | None,
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
) -> torch.Tensor:
    """``I[t,s] = k_scale[s] * sum_h weights[t,h] * relu(q[t,h] . k[s])`` (DeepSeek-V3.2, eq. 1), -inf outside [ks, ke).

    Args:
        q: [Tq, H, D], bfloat16, float32, float64 or float8_e4m3fn. Any H and D.
        k: [Tk, D], dtype of q; one key shared by all heads.
        k_scale: [Tk] float32 with float8_e4m3fn keys, or None (1). e4m3 values are computed with exactly, as bf16.
        weights: [Tq, H] float32 (float64 for float64); softmax scale, q's scale and the like are folded in by the caller.
        ks, ke: int32 [Tq], the keys [ks, ke) that each query sees, 0 <= ks and ke <= Tk. ke <= ks is an empty range.

    Returns:
        [Tq, Tk] float32 (float64 for float64). A score depends on its query and its key alone: the sums over D and H have
        a fixed order. Differentiable in q, k and weights (not for e4m3). Under CPU autocast q and k are cast to its dtype.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: wrong dtype, shape or device, k_scale with keys that are not e4m3, ks < 0, ke > Tk.
    """
    scale = {} if k_scale is None else {"k_scale": k_scale}
    want_tensors("lightning_indexer_logits", q=q, k=k, **scale, weights=weights, ks=ks, ke=ke)
    return torch.ops.glm5.lightning_indexer_logits(q, k, k_scale, weights, ks, ke)


def lightning_indexer_topk(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor | None,
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    topk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``topk_indices(lightning_indexer_logits(...), topk, ks, ke)``, bit for bit, without ever holding [Tq, Tk].

    Working memory: a strip of a few rows of scores for each thread.

    Args:
        q, k, k_scale, weights, ks, ke: as in ``lightning_indexer_logits``.
        topk: how many keys, >= 0; it may exceed Tk.

    Returns:
        indices, int32 [Tq, topk], ascending, padded with -1; and lse [Tq], float32 (float64 for float64): the natural log
        of the sum of exp(score) over all keys in [ks, ke), summed in an order counted from ks. lse is +inf where no key
        scores above -inf, NaN where a key scores NaN. Neither output carries a gradient: train the indexer through
        ``lightning_indexer_logits`` or ``lightning_indexer_kl``.

    Raises:
        TypeError: as ``lightning_indexer_logits``; topk is not an integer.
        ValueError: as ``lightning_indexer_logits``; topk < 0.
    """
    scale = {} if k_scale is None else {"k_scale": k_scale}
    want_tensors("lightning_indexer_topk", q=q, k=k, **scale, weights=weights, ks=ks, ke=ke)
    want_integers("lightning_indexer_topk", topk=topk)
    return torch.ops.glm5.lightning_indexer_topk(q, k, k_scale, weights, ks, ke, topk)


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
    """``lightning_indexer_topk`` over keys in pages, bit for bit: decoding and chunked prefill of many sequences.

    Key s of a sequence lies in place s % page_size of page ``block_table[sequence, s // page_size]``. Keys are multiplied
    where they lie; nothing is as large as the pool or as a sequence's keys.

    Args:
        q: [Tq, H, D], bfloat16, float32, float64 or float8_e4m3fn. Queries of one sequence should be neighbours.
        weights: [Tq, H] float32 (float64 for float64); softmax scale, q's scale and the like are folded in by the caller.
        cache: pages of keys as ``indexer_cache_write`` fills them, [pages, page_size, D] in q's dtype, contiguous
            (else it is copied first); uint8 [pages, page_size, D + 4] for float8_e4m3fn.
        block_table: int32 [sequences, n], pages in the order of a sequence's positions. Entries of positions that no query
            sees may hold anything; so may the pages and places that none sees. Sequences may share pages.
        sequence: int32 [Tq], each query's row of block_table.
        ks, ke: int32 [Tq], the positions [ks, ke) of its sequence that each query sees; empty where ks >= ke.
        topk: how many keys, >= 0; it may exceed the positions.

    Returns:
        indices, int32 [Tq, topk], positions in the query's sequence, ascending, padded with -1; and lse [Tq], as in
        ``lightning_indexer_topk``. No gradient.

    Raises:
        TypeError: an argument is not a tensor, topk not an integer.
        ValueError: wrong dtype, shape or device; topk < 0; a sequence that is no row of
            block_table; a range that leaves its positions; a page that a query sees and that is not in cache.
    """
    want_tensors(
        "lightning_indexer_topk_paged", q=q, weights=weights, cache=cache, block_table=block_table, sequence=sequence,
        ks=ks, ke=ke,
    )  # fmt: skip
    want_integers("lightning_indexer_topk_paged", topk=topk)
    return _topk_paged(q, weights, cache, block_table, sequence, ks, ke, topk)


_INPUTS = {"q": "float [Tq, H, D]", "k": "q [Tk, D]", "weights": "sum(q) [Tq, H]"}
_SCORED = _INPUTS | {"q": "float/e4m3 [Tq, H, D]", "k_scale": "float32 [Tk]", "ks": "int32 [Tq]", "ke": "int32 [Tq]"}


def _want_scale_where_quantised(op, k, k_scale):
    want_that(
        k_scale is None or k.dtype == torch.float8_e4m3fn, op, "k_scale is given with k of dtype", k.dtype,
        "None unless k is float8_e4m3fn",
    )  # fmt: skip


@fake("lightning_indexer_logits", **_SCORED)
def _(q, k, k_scale, weights, ks, ke):
    _want_scale_where_quantised("lightning_indexer_logits", k, k_scale)
    return q.new_empty((q.shape[0], k.shape[0]), dtype=accumulator(q))


@fake("lightning_indexer_selected_logits", **_INPUTS, indices="int32 [Tq, topk]")
def _(q, k, weights, indices):
    return q.new_empty(indices.shape, dtype=accumulator(q))


@fake("lightning_indexer_topk", **_SCORED)
def _(q, k, k_scale, weights, ks, ke, topk):
    want_that(topk >= 0, "lightning_indexer_topk", "topk is", topk, "a number >= 0")
    _want_scale_where_quantised("lightning_indexer_topk", k, k_scale)
    return q.new_empty((q.shape[0], topk), dtype=torch.int32), q.new_empty((q.shape[0],), dtype=accumulator(q))


@fake(
    "lightning_indexer_topk_paged",
    q="float/e4m3 [Tq, H, D]",
    cache=lambda arguments: "uint8 [P, S+, W]" if arguments["q"].dtype == torch.float8_e4m3fn else "q [P, S+, D]",
    weights="sum(q) [Tq, H]",
    block_table="int32 [sequences, n]",
    **{name: "int32 [Tq]" for name in ("sequence", "ks", "ke")},
)
def _(q, weights, cache, block_table, sequence, ks, ke, topk):
    op = "lightning_indexer_topk_paged"
    want_that(topk >= 0, op, "topk is", topk, "a number >= 0")
    if cache.dtype == torch.uint8:
        want_that(cache.shape[2] == q.shape[2] + 4, op, "cache has shape", cache.shape, "4 bytes more than the dims of q")
    return q.new_empty((q.shape[0], topk), dtype=torch.int32), q.new_empty((q.shape[0],), dtype=accumulator(q))


@fake(
    "lightning_indexer_logits_backward",
    **_INPUTS,
    ks="int32 [Tq]",
    ke="int32 [Tq]",
    indices="int32 [Tq, topk]",
    grad=lambda arguments: f"sum(q) [Tq, {'Tk' if arguments.get('indices') is None else 'topk'}]",
)
def _(grad, q, k, weights, ks, ke, indices=None):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, weights))


def _setup_context(ctx, inputs, output):
    q, k, k_scale, weights, ks, ke = inputs
    ctx.save_for_backward(q, k, weights, ks, ke)


def _backward(ctx, grad):
    q, k, weights, ks, ke = ctx.saved_tensors
    dq, dk, dweights = torch.ops.glm5.lightning_indexer_logits_backward(grad, q, k, weights, ks, ke)
    return dq, dk, None, dweights, None, None


torch.library.register_autograd("glm5::lightning_indexer_logits", _backward, setup_context=_setup_context)
differentiable_once("lightning_indexer_logits_backward")
not_differentiable("lightning_indexer_topk", "lightning_indexer_topk_paged", "lightning_indexer_selected_logits")


# Autocast casts q and k, the operands of the matrix product; weights stay as they are, so register_autocast, which casts
# every tensor, does not fit.
_library = torch.library.Library("glm5", "FRAGMENT")


def _register_autocast(name):
    op = getattr(torch.ops.glm5, name).default

    def autocast(q, k, *rest):
        if q.dtype == torch.float32 and k.dtype in (torch.float32, torch.bfloat16) or k.dtype == torch.float32:
            dtype = torch.get_autocast_dtype("cpu")
            q, k = q.to(dtype), k.to(dtype)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
            return op(q, k, *rest)

    _library.impl(name, autocast, "AutocastCPU")


for _name in ("lightning_indexer_logits", "lightning_indexer_topk"):
    _register_autocast(_name)
