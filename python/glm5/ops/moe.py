"""Mixture-of-experts routing and token movement on the compiled kernels, with their backwards.

The experts themselves are ``grouped_linear`` and ``silu_mul``.
"""

import torch

from glm5 import _native  # noqa: F401  (registers the ops)
from glm5.ops._checks import want_integers, want_tensors
from glm5.ops._register import compiled, differentiable_once, fake, not_differentiable, want_that

_moe_router = compiled("moe_router")
_moe_permute = compiled("moe_permute")
_moe_unpermute = compiled("moe_unpermute")
_moe_dispatch_layout = compiled("moe_dispatch_layout")


def moe_router(
    logits: torch.Tensor,
    bias: torch.Tensor,
    topk: int,
    num_groups: int = 1,
    topk_groups: int = 1,
    renormalize: bool = True,
    scaling: float = 1.0,
    replay: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sigmoid router of DeepSeek-V3 (arXiv 2412.19437, eq. 12 to 16) and GLM-5: ``bias`` moves the choice alone.

    The ``topk`` experts of largest ``sigmoid(logits) + bias`` are chosen, ties to the lower expert, NaN and -inf never. With
    several groups only experts of the ``topk_groups`` best compete, a group scoring the sum of its two largest. A weight is
    the chosen expert's sigmoid, over their sum + 1e-20 when ``renormalize``, times ``scaling``. Scores are float64 inside:
    every instruction set makes the same choice.

    Args:
        logits: [T, E] float32 (or float64).
        bias: [E], dtype of logits.
        topk: experts a token goes to.
        num_groups: groups of consecutive experts; divides E.
        topk_groups: groups that compete.
        renormalize: weights of a token sum to ``scaling``.
        scaling: factor on the weights.
        replay: [T, topk] int32, a choice made earlier, used as ``ids`` unchanged (-1: no expert); no choice is made then.

    Returns:
        weights [T, topk], dtype of logits, and ids [T, topk] int32: ascending expert ids, padded with -1 (weight 0) where
        fewer than ``topk`` experts can be chosen. Differentiable in logits, through the chosen sigmoids.

    Raises:
        TypeError: logits, bias or replay is not a tensor, topk, num_groups or topk_groups not an integer.
        ValueError: wrong dtypes or shapes, num_groups does not divide E, topk_groups outside [1, num_groups], topk outside
            [1, experts that compete], a replayed id outside [-1, E) or twice in one token, a tensor not on the CPU.
    """
    want_tensors("moe_router", logits=logits, bias=bias, **({} if replay is None else {"replay": replay}))
    want_integers("moe_router", topk=topk, num_groups=num_groups, topk_groups=topk_groups)
    return _moe_router(logits, bias, topk, num_groups, topk_groups, renormalize, scaling, replay)


@fake("moe_router", logits="float32/float64 [T, E]", bias="logits [E]", replay="int32 [T, topk]")
def _(logits, bias, topk, num_groups, topk_groups, renormalize, scaling, replay):
    op, (tokens, experts) = "moe_router", logits.shape
    divides = f"a divisor of the {experts} experts"
    want_that(num_groups >= 1, op, "num_groups is", num_groups, divides)
    want_that(experts % num_groups == 0, op, "num_groups is", num_groups, divides)
    for bound in (topk_groups >= 1, topk_groups <= num_groups):
        want_that(bound, op, "topk_groups is", topk_groups, f"1 <= topk_groups <= num_groups = {num_groups}")
    eligible = experts // num_groups * topk_groups
    for bound in (topk >= 1, topk <= eligible):
        want_that(bound, op, "topk is", topk, f"1 <= topk <= {eligible} (the experts of topk_groups groups)")
    return logits.new_empty(tokens, topk), logits.new_empty(tokens, topk, dtype=torch.int32)


@fake("moe_router_backward", logits="float32/float64 [T, E]", ids="int32 [T, topk]", dweights="logits [T, topk]")
def _(dweights, logits, ids, renormalize, scaling):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _router_setup_context(ctx, inputs, output):
    logits, _, _, _, _, ctx.renormalize, ctx.scaling, _ = inputs
    ctx.save_for_backward(logits, output[1])


def _router_backward(ctx, dweights, _dids):
    dlogits = torch.ops.glm5.moe_router_backward(dweights, *ctx.saved_tensors, ctx.renormalize, ctx.scaling)
    return dlogits, None, None, None, None, None, None, None


torch.library.register_autograd("glm5::moe_router", _router_backward, setup_context=_router_setup_context)
differentiable_once("moe_router_backward")


def moe_permute(
    x: torch.Tensor, ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copies each row of x once for every expert it goes to, sorted by (expert, token): the input of ``grouped_linear``.

    Args:
        x: [T, D], bfloat16, float32 or float64.
        ids: [T, topk] int32 in [0, num_experts), in any order; -1 takes no slot.
        num_experts: E.

    Returns:
        xp [T * topk, D], dtype of x; row_of_slot [T * topk] int32, the row of x in each slot; slot_of_row [T, topk] int32,
        the slot of each choice (-1 for none); group_ends [E] int32, where each expert's slots end. Slots left over by -1s
        stand at the end, with row_of_slot -1 and xp 0. Differentiable in x: the copies' gradients are summed in slot order.

    Raises:
        TypeError: x or ids is not a tensor, num_experts not an integer.
        ValueError: wrong dtypes or shapes, num_experts < 1, an id outside [-1, E), 2^31 slots or more, a tensor not on the
            CPU.
    """
    want_tensors("moe_permute", x=x, ids=ids)
    want_integers("moe_permute", num_experts=num_experts)
    return _moe_permute(x, ids, num_experts)


@fake("moe_permute", x="float [T, D]", ids="int32 [T, topk]")
def _(x, ids, num_experts):
    want_that(num_experts >= 1, "moe_permute", "num_experts is", num_experts, "at least 1")
    slots = ids.shape[0] * ids.shape[1]
    return x.new_empty(slots, x.shape[1]), ids.new_empty(slots), ids.new_empty(ids.shape), ids.new_empty(num_experts)


@fake("moe_permute_backward", dxp="float [S, D]", slot_of_row="int32 [T, topk]")
def _(dxp, slot_of_row):
    return dxp.new_empty(slot_of_row.shape[0], dxp.shape[1])


def _permute_setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[2])


def _permute_backward(ctx, dxp, *_):
    return torch.ops.glm5.moe_permute_backward(dxp, *ctx.saved_tensors), None, None


torch.library.register_autograd("glm5::moe_permute", _permute_backward, setup_context=_permute_setup_context)
differentiable_once("moe_permute_backward")


def moe_unpermute(y: torch.Tensor, slot_of_row: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Returns the experts' rows to their tokens: ``out[t] = sum_j weights[t, j] * y[slot_of_row[t, j]]``.

    The sum runs in float32 over ascending slots, which is expert order, and is rounded once: a token's bits depend on its
    own experts alone.

    Args:
        y: [S, D], bfloat16, float32 or float64; S = T * topk after ``moe_permute``.
        slot_of_row: [T, topk] int32 in [0, S), each slot at most once; -1 adds nothing.
        weights: [T, topk] float32 (float64 if y is).

    Returns:
        [T, D], dtype of y. Differentiable in y and weights.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: wrong dtypes or shapes, a slot outside [-1, S) or held twice, a tensor not on the CPU.
    """
    want_tensors("moe_unpermute", y=y, slot_of_row=slot_of_row, weights=weights)
    return _moe_unpermute(y, slot_of_row, weights)


_UNPERMUTED = {"y": "float [S, D]", "slot_of_row": "int32 [T, topk]", "weights": "sum(y) [T, topk]"}


@fake("moe_unpermute", **_UNPERMUTED)
def _(y, slot_of_row, weights):
    return y.new_empty(slot_of_row.shape[0], y.shape[1])


@fake("moe_unpermute_backward", **_UNPERMUTED, dout="y [T, D]")
def _(dout, y, slot_of_row, weights):
    return (
        torch.empty_like(y, memory_format=torch.contiguous_format),
        torch.empty_like(weights, memory_format=torch.contiguous_format),
    )


def _unpermute_setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _unpermute_backward(ctx, dout):
    dy, dweights = torch.ops.glm5.moe_unpermute_backward(dout, *ctx.saved_tensors)
    return dy, None, dweights


torch.library.register_autograd("glm5::moe_unpermute", _unpermute_backward, setup_context=_unpermute_setup_context)
differentiable_once("moe_unpermute_backward")


def moe_dispatch_layout(
    ids: torch.Tensor, num_experts: int, num_ranks: int, ranks_per_node: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What an expert all-to-all sends where (DeepEP's ``get_dispatch_layout``): to a node, and to a rank, a token goes once.

    Experts lie on ranks evenly and in order, ranks on nodes: expert e on rank ``e // (num_experts // num_ranks)``, rank r on
    node ``r // ranks_per_node``.

    Args:
        ids: [T, topk] int32 in [0, num_experts), in any order; -1 is no choice.
        num_experts: E.
        num_ranks: R; divides E.
        ranks_per_node: divides R.

    Returns:
        tokens_per_rank [R], tokens with at least one expert on the rank; tokens_per_node [R // ranks_per_node], the same for
        the node; tokens_per_expert [E], choices of the expert, the sizes of ``moe_permute``'s groups; all int32; and
        is_token_in_rank [T, R] bool. No gradient.

    Raises:
        TypeError: ids is not a tensor, num_experts, num_ranks or ranks_per_node not an integer.
        ValueError: wrong dtype or shape, an id outside [-1, E), num_ranks does not divide E, ranks_per_node does not divide
            num_ranks, 2^31 choices or more, a tensor not on the CPU.
    """
    want_tensors("moe_dispatch_layout", ids=ids)
    want_integers("moe_dispatch_layout", num_experts=num_experts, num_ranks=num_ranks, ranks_per_node=ranks_per_node)
    return _moe_dispatch_layout(ids, num_experts, num_ranks, ranks_per_node)


@fake("moe_dispatch_layout", ids="int32 [T, topk]")
def _(ids, num_experts, num_ranks, ranks_per_node):
    op = "moe_dispatch_layout"
    want_that(num_experts >= 1, op, "num_experts is", num_experts, "at least 1")
    for name, part, of, whole in (
        ("num_ranks", num_ranks, num_experts, "experts"),
        ("ranks_per_node", ranks_per_node, num_ranks, "ranks"),
    ):
        divides = f"a divisor of the {of} {whole}"
        want_that(part >= 1, op, f"{name} is", part, divides)
        want_that(of % part == 0, op, f"{name} is", part, divides)
    counts = (num_ranks, num_ranks // ranks_per_node, num_experts)
    in_rank = ids.new_empty(ids.shape[0], num_ranks, dtype=torch.bool)
    return *(ids.new_empty(count) for count in counts), in_rank


not_differentiable("moe_dispatch_layout")
