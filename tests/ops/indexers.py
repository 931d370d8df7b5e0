"""What the lightning indexers on floats and on int8 are tested for in the same words.

``logits`` and ``topk`` are the ops, ``inputs`` their q, k, k_scale (or None) and weights, ``draw(keys=...)`` makes some.
"""

import torch
from hypothesis import given
from hypothesis import strategies as st

from glm5 import ops, reference
from glm5.testing import OpSpec, relative_error, same_bits
from tests.ops import properties
from tests.ops.ranges import causal, everything, int32


def assert_rows_depend_on_their_query_and_keys_alone(op: OpSpec, draw) -> None:
    """37 queries in another order, in parts, and with the keys further on in the pack, behind others, have the same bits."""
    q, k, k_scale, weights = draw()
    ks, ke = causal(37, 150)
    chooses = "topk" in op.name
    extra = (20,) if chooses else ()

    def run(rows, k=k, k_scale=k_scale, shift=0):
        outputs = getattr(ops, op.name)(q[rows], k, k_scale, weights[rows], ks[rows] + shift, ke[rows] + shift, *extra)
        return properties.as_tuple(outputs)

    whole = run(slice(None))
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    assert all(same_bits(w[order], g) for w, g in zip(whole, run(order), strict=True)), "row order"
    for rows in (slice(0, 1), slice(1, 3), slice(15, 18), slice(16, 37), slice(36, 37)):
        assert all(same_bits(w[rows], g) for w, g in zip(whole, run(rows), strict=True)), f"batch split {rows}"
    for shift in (1, 16, 63, 64, 77):
        padded = torch.cat([draw(keys=shift, seed=9)[1], k])
        scales = None if k_scale is None else torch.cat([torch.ones(shift), k_scale])
        shifted = run(slice(None), padded, scales, shift)
        if chooses:
            moved = torch.where(whole[0] >= 0, whole[0] + shift, whole[0])
            assert same_bits(moved, shifted[0]) and same_bits(whole[1], shifted[1]), f"document shifted by {shift}"
        else:
            assert same_bits(whole[0], shifted[0][:, shift:].contiguous()), f"document shifted by {shift}"


def assert_queries_may_share_any_block(logits, inputs) -> None:
    """Register blocks, tiles of rows and their overlaps all give the same bits: 35 queries, cut anywhere."""
    q, k, k_scale, weights = inputs
    ks, ke = everything(35, len(k))
    whole = logits(q, k, k_scale, weights, ks, ke)
    for cut in (1, 2, 5, 15, 31, 32, 33):
        parts = [logits(q[r], k, k_scale, weights[r], ks[r], ke[r]) for r in (slice(0, cut), slice(cut, 35))]
        assert same_bits(torch.cat(parts), whole), f"cut at {cut}"


def assert_ranges_may_be_cut_anywhere(logits, inputs) -> None:
    """The scores of [0, cut) and [cut, 150) are those of [0, 150), -inf where the range ends."""
    queries = len(inputs[0])
    whole = logits(*inputs, *everything(queries, 150))
    for cut in (0, 1, 16, 40, 64, 100, 149, 150):
        left = logits(*inputs, *everything(queries, cut))
        right = logits(*inputs, int32([cut] * queries), int32([150] * queries))
        assert same_bits(torch.cat([left[:, :cut], right[:, cut:]], 1), whole)
        assert (left[:, cut:] == float("-inf")).all() and (right[:, :cut] == float("-inf")).all()


def assert_topk_is_that_of_the_scores(logits, op: OpSpec, dtype: torch.dtype) -> None:
    """The keys chosen are ``topk_indices`` of the scores, to the last tie."""

    def equals(data):
        arguments = op.draw(properties.HypothesisDraw(data), dtype)
        indices, _ = getattr(ops, op.name)(**arguments)
        topk = arguments.pop("topk")
        assert torch.equal(indices, ops.topk_indices(logits(**arguments), topk, arguments["ks"], arguments["ke"]))

    given(st.data())(equals)()


def assert_topk_of_a_long_row(logits, topk, inputs) -> None:
    """5000 keys: sampled thresholds, several key blocks and strips, more than one block of the lse's sum."""
    q, k, k_scale, weights = inputs
    queries = len(q)
    ks, ke = int32(torch.arange(queries) * 7), int32(5000 - torch.arange(queries))
    scores = logits(q, k, k_scale, weights, ks, ke)
    indices, lse = topk(q, k, k_scale, weights, ks, ke, 300)
    assert torch.equal(indices, reference.topk_indices(scores, 300, ks, ke))
    assert relative_error(lse, scores.double().logsumexp(1)) < 1e-6
    for threads in (1, 2, 3):
        with properties.threads(threads):
            again = topk(q, k, k_scale, weights, ks, ke, 300)
        assert same_bits(again[0], indices) and same_bits(again[1], lse)
    alone = topk(q[:1], k, k_scale, weights[:1], ks[:1], ke[:1], 300)
    assert same_bits(alone[0], indices[:1]) and same_bits(alone[1], lse[:1])
