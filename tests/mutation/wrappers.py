"""Faults in Python: implementations that call ours and spoil something, each to be found by the property named for it."""

from dataclasses import dataclass

import torch

from glm5 import ops


@dataclass(frozen=True)
class Wrapper:
    """An implementation of ``op`` that is wrong. ``found_by``, ``also`` and ``why``: as in compiled.Fault."""

    name: str
    op: str
    found_by: str
    function: object
    also: tuple[str, ...] = ()
    why: str = ""


class _Mended(torch.autograd.Function):
    """x as it is; its gradient times ``factor``."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return dx * ctx.factor, None


def _depends_on_the_batch(x, weight, eps=1e-5):
    y = ops.rms_norm(x, weight, eps)
    rows = torch.ones_like(y, dtype=torch.float32).sum(0)
    return (y.float() * (1 + rows * 2.0**-29)).to(y.dtype)


def _not_sorted(scores, k, ks=None, ke=None):
    chosen = ops.topk_indices(scores, k, ks, ke)
    return torch.where((chosen >= 0).all(-1, keepdim=True), chosen.flip(-1), chosen)


def higher_of_ties(scores, k, ks=None, ke=None):
    rows, n = scores.shape
    if ks is not None:
        column = torch.arange(n)
        scores = torch.where((column >= ks[:, None]) & (column < ke[:, None]), scores, float("-inf"))
    mirrored = ops.topk_indices(scores.flip(-1), k)
    chosen = torch.where(mirrored < 0, n, n - 1 - mirrored).sort(-1).values
    return torch.where(chosen == n, -1, chosen).to(torch.int32)


def _sums_by_thread(x):
    y = ops.silu_mul(x)
    return (y.float() * (1 + (torch.get_num_threads() - 1) * 2.0**-6)).to(y.dtype)


def _graph_break(x, positions, cos, sin, interleaved=True):
    if positions.numel() and int(positions[0]) < 0:  # reads a value
        raise ValueError("positions")
    return ops.rope(x, cos, sin, positions, interleaved)


def _assumes_contiguous(x, weight, bias, eps=1e-6):
    flat = x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride())
    return ops.layer_norm(flat, weight, bias, eps)


def _writes_into_q(q, kv, indices, scale, d_v):
    outputs = ops.sparse_mla(q, kv, indices, scale, d_v)
    if not q.requires_grad:
        q.mul_(scale)
    return outputs


def _longer(q, k, lse, ks, ke, scale):
    return ops.mla_attn_target(q, k, lse, ks, torch.where(ks < ke, ke + 1, ke).clamp(max=len(k)), scale)


def _without_nan(q, k, v, ks, ke, scale):
    out, lse = ops.mla_attention(q, k, v, ks, ke, scale)
    return torch.where(out.isnan(), 0, out), torch.where(lse.isnan(), 0, lse)


def _empty_is_minus_infinity(q, kv, indices, scale, d_v):
    out, lse = ops.sparse_mla(q, kv, indices, scale, d_v)
    return out, torch.where((indices < 0).all(1, keepdim=True), float("-inf"), lse)


WRAPPERS = (
    Wrapper("two percent too large", "linear", "accuracy", lambda **a: _Mended.apply(ops.linear(**a) * 1.02, 1 / 1.02)),
    Wrapper(
        "scale dropped", "dequantize_fp8", "accuracy", lambda q, scale, block, out_dtype: q.to(out_dtype),
        also=("nan",), why="so is one that is NaN",
    ),
    Wrapper(
        "one key more than its range", "mla_attn_target", "accuracy",
_longer,
        also=("nan", "row_invariance"), why="the key behind the range may be NaN, and is another one in another pack",
    ),
    Wrapper(
        "indices not sorted", "topk_indices", "accuracy", _not_sorted,
        also=("nan", "ties"), why="the same wrong order, whatever the scores",
    ),
    Wrapper("gradient halved", "silu_mul", "gradient", lambda x: _Mended.apply(ops.silu_mul(x), 0.5)),
    Wrapper("no gradient", "rms_norm", "gradient", lambda **a: ops.rms_norm(**a).detach()),
    Wrapper("depends on the number of threads", "silu_mul", "determinism", _sums_by_thread,
        also=("compile",), why="the number of threads cannot be traced"),
    Wrapper("depends on the number of rows", "rms_norm", "row_invariance", _depends_on_the_batch),
    Wrapper("higher index of ties", "topk_indices", "ties", higher_of_ties),
    Wrapper("NaN replaced by 0", "mla_attention", "nan", _without_nan),
    Wrapper("lse of no keys is -inf", "sparse_mla", "empty", _empty_is_minus_infinity),
    Wrapper("assumes contiguous rows", "layer_norm", "strides", _assumes_contiguous),
    Wrapper("scales q in place", "sparse_mla", "aliasing", _writes_into_q),
    Wrapper("reads a value", "rope", "compile", _graph_break),
)  # fmt: skip
