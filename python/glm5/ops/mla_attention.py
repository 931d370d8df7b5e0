"""Dense multi-head latent attention, un-absorbed, on the compiled kernels, its backward, and the indexer's dense teacher.

Projecting latents to per-head keys and values is the model's business; the sparse form is ``sparse_mla``.
"""

import torch

from glm5 import _native  # noqa: F401  (registers the ops)
from glm5.ops._checks import want_integers, want_tensors
from glm5.ops._pages import latent_pool, want_latent_rows
from glm5.ops._register import accumulator, compiled, differentiable_once, fake, not_differentiable, want_finite, want_that

_mla_attention_paged = compiled("mla_attention_paged")


def mla_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ks: torch.Tensor, ke: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query to the keys in its range: MLA in its multi-head form (GLM-5: 64 heads, 256 and 256 dims).

    ``out[t, h] = sum_s softmax_s(scale * q[t, h] . k[s, h]) * v[s, h]`` over ``ks[t] <= s < ke[t]``
    (DeepSeek-V2, arXiv 2405.04434, eq. 9 to 19; GLM-5, arXiv 2602.15763, section 2.1).

    Args:
        q: [Tq, H, Dk], bfloat16, float32 or float64; any H and Dk from 1.
        k: [Tk, H, Dk], dtype of q.
        v: [Tk, H, Dv], dtype of q.
        ks, ke: int32 [Tq], each query's half-open range of keys, within [0, Tk]; empty where ks >= ke. Causal masks, packed
            documents and chunked prefill are all such ranges. Keys are processed in blocks counted from ks.
        scale: factor of the scores, finite.

    Returns:
        out [Tq, H, Dv] in q's dtype and lse [Tq, H], the natural log of the sum of exponentials, in float32 (float64 for
        float64). An empty range, or one whose scores are all -inf, gives out = 0 and lse = +inf; a NaN score makes the
        head's lse and out NaN. A row depends on its own q and on the keys and values of its range alone, bit for bit.
        Differentiable in q, k and v, from out and from lse. A NaN or infinity in a row's q or gradient touches the
        gradients of that row and of its keys; one in a key's k or v those of the rows that see it and of their keys.
        Under CPU autocast q, k and v are cast to its dtype.

    Raises:
        TypeError: q, k, v, ks or ke is not a tensor.
        ValueError: wrong dtype, shape or device; scale not finite; a non-empty range that leaves [0, Tk].
    """
    want_tensors("mla_attention", q=q, k=k, v=v, ks=ks, ke=ke)
    return torch.ops.glm5.mla_attention(q, k, v, ks, ke, scale)


def mla_attention_paged(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    sequence: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    scale: float,
    d_v: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention over latent rows in pages, in the absorbed form: decoding where the context is short, or dense.

    The bits of ``mla_attention(q, k, k[..., :d_v], ks, ke, scale)``, k being the sequence's latent rows given to every head.
    Position s of a sequence lies in place s % page_size of page ``block_table[sequence, s // page_size]``. Working memory:
    the latent rows that neighbouring queries see, up to 65,536 at a time or those of one sequence.

    Args:
        q: [Tq, H, Dk], absorbed queries, bfloat16, float32 or float64; bfloat16 alone for FP8 pages. Queries of one
            sequence should be neighbours.
        cache: pages of latent rows as ``latent_cache_write`` fills them, [pages, page_size, Dk] in q's dtype, contiguous
            (else it is copied first); or uint8 for FP8 (656 bytes a row of 512 + 64 dims), whose rows are read as bfloat16.
        block_table: int32 [sequences, n], pages in the order of a sequence's positions. Entries of positions that no query
            sees may hold anything; so may the pages and places that none sees. Sequences may share pages.
        sequence: int32 [Tq], each query's row of block_table.
        ks, ke: int32 [Tq], the positions [ks, ke) of its sequence that each query sees; empty where ks >= ke.
        scale: factor of the scores, finite.
        d_v: dims of the value, 1 to Dk.

    Returns:
        out [Tq, H, d_v] and lse [Tq, H] as in ``mla_attention``. No gradient.

    Raises:
        TypeError: an argument is not a tensor, d_v not an integer.
        ValueError: wrong dtype, shape or device; d_v out of range; scale not finite; a
            sequence that is no row of block_table; a range that leaves its positions; a page that a query sees and that is
            not in cache.
    """
    want_tensors(
        "mla_attention_paged", q=q, cache=cache, block_table=block_table, sequence=sequence, ks=ks, ke=ke
    )  # fmt: skip
    want_integers("mla_attention_paged", d_v=d_v)
    return _mla_attention_paged(q, cache, block_table, sequence, ks, ke, scale, d_v)


def mla_attn_target(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, ks: torch.Tensor, ke: torch.Tensor, scale: float
) -> torch.Tensor:
    """What the dense attention attended to, the indexer's teacher in the warm-up stage (DeepSeek-V3.2, eq. 3).

    ``target[t, s]`` is the probability of key s summed over heads, divided by the sum over s. The result is [Tq, Tk]:
    training uses ``lightning_indexer_kl``, which never holds it.

    Args:
        q, k, ks, ke, scale: as given to ``mla_attention``.
        lse: [Tq, H] as returned by it.

    Returns:
        [Tq, Tk], float32 (float64 for float64); 0 outside a query's range. Takes part in no gradient.

    Raises:
        TypeError: q, k, lse, ks or ke is not a tensor.
        ValueError: wrong dtype, shape or device; scale not finite; a non-empty range that leaves [0, Tk].
    """
    want_tensors("mla_attn_target", q=q, k=k, lse=lse, ks=ks, ke=ke)
    return torch.ops.glm5.mla_attn_target(q, k, lse, ks, ke, scale)


_SCORED = {"q": "float [Tq, H+, Dk+]", "k": "q [Tk, H, Dk]", "ks": "int32 [Tq]", "ke": "int32 [Tq]"}
_INPUTS = _SCORED | {"v": "q [Tk, H, Dv+]"}


@fake("mla_attention", **_INPUTS)
def _(q, k, v, ks, ke, scale):
    want_finite("mla_attention", "scale", scale)
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2]), q.new_empty(q.shape[0], q.shape[1], dtype=accumulator(q))


@fake(
    "mla_attention_paged",
    q=lambda arguments: f"{'bfloat16' if arguments['cache'].dtype == torch.uint8 else 'float'} [Tq, H+, Dk+]",
    cache=latent_pool("q", "Dk"),
    block_table="int32 [sequences, n]",
    **{name: "int32 [Tq]" for name in ("sequence", "ks", "ke")},
)
def _(q, cache, block_table, sequence, ks, ke, scale, d_v):
    op = "mla_attention_paged"
    want_finite(op, "scale", scale)
    want_latent_rows(op, cache, q.shape[2])
    for bound in (d_v >= 1, d_v <= q.shape[2]):
        want_that(bound, op, "d_v is", d_v, f"1 to {q.shape[2]} (the dim of q and cache)")
    return q.new_empty(q.shape[0], q.shape[1], d_v), q.new_empty(q.shape[0], q.shape[1], dtype=accumulator(q))


@fake("mla_attention_backward", **_INPUTS, lse="sum(q) [Tq, H]", dlse="sum(q) [Tq, H]", dout="q [Tq, H, Dv]")
def _(dout, dlse, q, k, v, lse, ks, ke, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@fake("mla_attn_target", **_SCORED, lse="sum(q) [Tq, H]")
def _(q, k, lse, ks, ke, scale):
    want_finite("mla_attn_target", "scale", scale)
    return q.new_empty(q.shape[0], k.shape[0], dtype=accumulator(q))


def _setup_context(ctx, inputs, output):
    q, k, v, ks, ke, scale = inputs
    ctx.save_for_backward(q, k, v, output[1], ks, ke)
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    q, k, v, lse, ks, ke = ctx.saved_tensors
    if dout is None and dlse is None:
        return None, None, None, None, None, None
    if dout is None:
        dout = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    dq, dk, dv = torch.ops.glm5.mla_attention_backward(dout, dlse, q, k, v, lse, ks, ke, ctx.scale)
    return dq, dk, dv, None, None, None


torch.library.register_autograd("glm5::mla_attention", _backward, setup_context=_setup_context)
differentiable_once("mla_attention_backward")
not_differentiable("mla_attn_target", "mla_attention_paged")
torch.library.register_autocast("glm5::mla_attention", "cpu", torch.bfloat16)
