"""The int8 lightning indexer: exact sums, the same bits on every instruction set, row invariance, the streamed top-k."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm5 import _native, ops, reference
from glm5.testing import RandomDraw, check, same_bits, spec
from tests.ops import properties
from tests.ops.indexers import (
    assert_queries_may_share_any_block,
    assert_ranges_may_be_cut_anywhere,
    assert_rows_depend_on_their_query_and_keys_alone,
    assert_topk_is_that_of_the_scores,
    assert_topk_of_a_long_row,
)
from tests.ops.ranges import causal, everything, int32

LOGITS, TOPK = spec("lightning_indexer_logits_int8"), spec("lightning_indexer_topk_int8")
OPS = pytest.mark.parametrize("op", [LOGITS, TOPK], ids=lambda op: op.name)
INF, NAN = float("inf"), float("nan")


def draw_inputs(queries=37, keys=150, heads=6, dim=40, seed=0):
    """q, k, k_scale, weights; int8 values from -128 to 127."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randint(-128, 128, s, generator=generator).to(torch.int8) for s in ((queries, heads, dim), (keys, dim)))
    draw = RandomDraw(seed)
    return q, k, draw.tensor(keys).abs() + 0.1, draw.tensor(queries, heads, scale=1e-3)


@OPS
class TestBothOps:
    def test_passes_the_conformance_kit(self, isa, op):
        assert (report := check(op.name)).ok, report

    def test_keeps_its_promise(self, isa, op):
        given(st.data())(lambda data: properties.assert_keeps_promise(op, data, torch.int8))()

    def test_thread_count_does_not_matter(self, isa, op):
        given(st.data())(lambda data: properties.assert_thread_count_does_not_matter(op, data, torch.int8))()

    def test_every_instruction_set_gives_the_same_bits(self, op):
        def same(data):
            arguments = op.draw(properties.HypothesisDraw(data), torch.int8)
            results = []
            for name in _native.available_isas():
                with _native.using_cpu_isa(name):
                    results.append(properties.as_tuple(getattr(ops, op.name)(**arguments))[0])  # the lse's sum has lanes
            assert all(same_bits(results[0], other) for other in results[1:])

        given(st.data())(same)()

    def test_a_row_depends_on_its_query_and_keys_alone(self, isa, op):
        assert_rows_depend_on_their_query_and_keys_alone(op, draw_inputs)

    @pytest.mark.parametrize("dim", [40, 64])
    def test_any_layout_gives_the_same_bits(self, isa, op, dim):
        tensors = draw_inputs(dim=dim)
        extra = (*causal(37, 150), *(() if op is LOGITS else (20,)))
        want = properties.as_tuple(getattr(ops, op.name)(*tensors, *extra))
        strided = [t.unsqueeze(-1).expand(*t.shape, 2)[..., 0] for t in tensors]
        strided[1] = tensors[1].t().contiguous().t()
        unaligned = [torch.cat([torch.zeros(1, dtype=t.dtype), t.flatten()])[1:].view_as(t) for t in tensors]
        for inputs in (strided, unaligned):
            got = properties.as_tuple(getattr(ops, op.name)(*inputs, *extra))
            assert all(same_bits(w, g) for w, g in zip(want, got, strict=True))


@pytest.mark.parametrize("heads", [1, 3, 16, 17, 31, 64, 128])
def test_a_score_does_not_depend_on_which_queries_share_a_block(isa, heads):
    assert_queries_may_share_any_block(ops.lightning_indexer_logits_int8, draw_inputs(35, 70, heads, 33))


def test_a_score_does_not_depend_on_the_partition_of_the_range(isa):
    assert_ranges_may_be_cut_anywhere(ops.lightning_indexer_logits_int8, draw_inputs())


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 15, 31, 32, 33, 63, 64, 65, 127, 128, 200, 1024, 1500])
def test_dot_products_are_exact(isa, dim):
    """One head of weight 1 and -1: the score is the dot product, as long as float32 holds it."""
    q, k, _, _ = draw_inputs(5, 70, 1, dim, seed=dim)
    q[0], k[0], k[69] = -128, -128, 127  # the largest sums of either sign
    dots = q[:, 0].int() @ k.int().T
    for weight in (1.0, -1.0):
        got = ops.lightning_indexer_logits_int8(q, k, torch.ones(70), torch.full((5, 1), weight), *everything(5, 70))
        assert torch.equal(got, weight * dots.clamp(min=0).float())


def test_the_largest_dimension_does_not_overflow(isa):
    q, k = torch.full((1, 1, 131071), -128, dtype=torch.int8), torch.full((2, 131071), -128, dtype=torch.int8)
    k[1] = 127
    got = ops.lightning_indexer_logits_int8(q, k, torch.ones(2), torch.ones(1, 1), *everything(1, 2))
    assert got.tolist() == [[float(torch.tensor(131071 * 128 * 128).float()), 0.0]]


def test_heads_are_added_by_one_fma_each_in_order(isa):
    """The definition, in exact rational arithmetic rounded to float32 once a head."""
    q, k, k_scale, weights = draw_inputs(2, 20, 7, 64)
    got = ops.lightning_indexer_logits_int8(q, k, k_scale, weights, *everything(2, 20))
    dots = torch.einsum("qhd,kd->qhk", q.double(), k.double()).clamp(min=0)
    total = torch.zeros(2, 20)
    for head in range(7):  # 24 + 24 bits: the product is exact in float64; its sum with float32 is rounded to odd below
        product, start = weights[:, head, None].double() * dots[:, head], total.double()
        rounded = product + start
        back = rounded - product
        error = (product - (rounded - back)) + (start - back)
        odd = (rounded.view(torch.int64) & 1).bool()
        toward = torch.where((error > 0) == (rounded > 0), 1, -1)
        total = torch.where((error != 0) & ~odd, (rounded.view(torch.int64) + toward).view(torch.float64), rounded).float()
    assert same_bits(got, total * k_scale)


def test_topk_equals_topk_of_the_scores(isa):
    assert_topk_is_that_of_the_scores(ops.lightning_indexer_logits_int8, TOPK, torch.int8)


@pytest.mark.parametrize("queries", [1, 3, 40, 96])
def test_topk_of_a_long_row(isa, queries):
    inputs = draw_inputs(queries, 5000, 3, 16)
    assert_topk_of_a_long_row(ops.lightning_indexer_logits_int8, ops.lightning_indexer_topk_int8, inputs)


def test_every_microkernel_and_tail_runs(isa):
    """What each of these paths computes is compared with exact sums and with other batch splits above."""
    with _native.counted_paths() as paths:
        for queries, heads in [(2, 3), (9, 4), (2, 5)]:
            q, k, k_scale, weights = draw_inputs(queries, 200, heads, 8)
            ops.lightning_indexer_logits_int8(q, k, k_scale, weights, int32([0] * queries), int32([136] * queries))
            ops.lightning_indexer_logits_int8(q, k, k_scale, weights, int32([5] * queries), int32([200] * queries))
        q, k, k_scale, weights = draw_inputs(2, 200, 5, 40)
        whole = ops.lightning_indexer_logits_int8(q, k, k_scale, weights, *everything(2, 200))
        part = ops.lightning_indexer_logits_int8(q, k[130:147], k_scale[130:147], weights, *everything(2, 17))
        assert same_bits(whole[:, 130:147], part)
    names = [f"lightning_indexer_int8: {name}" for name in ("full register block", "single vector of keys", "single head")]
    if isa == "portable":
        names = ["lightning_indexer_int8: one key at a time"]
    if isa == "amx":
        names = ["whole tiles of rows", "overlapping tiles of rows", "less than a tile of rows"]
        names = [f"lightning_indexer: {name}" for name in (*names, "four vectors of keys", "single vectors of keys")]
    assert [name for name in names if not paths.get(name)] == []


@pytest.mark.parametrize("where", ["weights", "k_scale"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_poisoned_and_infinite_scores(isa, where, value):
    """One key's scale, or a query's weight, is `value`: NaN and -inf are never chosen; the lse shows the NaN."""
    q, k = torch.ones(2, 2, 4, dtype=torch.int8), torch.ones(70, 4, dtype=torch.int8)
    k_scale, weights = torch.ones(70), torch.ones(2, 2)
    if where == "weights":
        weights[0, 1] = value
    else:
        k_scale[5] = value
    ranges = everything(2, 70)
    scores = ops.lightning_indexer_logits_int8(q, k, k_scale, weights, *ranges)
    want = torch.full((2, 70), 8.0)
    want[(0, slice(None)) if where == "weights" else (slice(None), 5)] = value
    assert torch.equal(scores.nan_to_num(7), want.nan_to_num(7))
    indices, lse = ops.lightning_indexer_topk_int8(q, k, k_scale, weights, *ranges, 70)
    assert torch.equal(indices, reference.topk_indices(scores, 70))
    _, want_lse = reference.lightning_indexer_topk_int8(q, k, k_scale, weights, *ranges, 70)
    assert torch.allclose(lse, want_lse, equal_nan=True)


def test_nothing_to_choose_from(isa):
    q, k, k_scale, weights = draw_inputs(3, 9, 2, 4)
    weights[2] = -INF
    ks, ke = int32([4, 7, 0]), int32([4, 2, 9])
    q[2], k[:] = 1, 1
    assert (ops.lightning_indexer_logits_int8(q, k, k_scale, weights, ks, ke) == -INF).all()
    indices, lse = ops.lightning_indexer_topk_int8(q, k, k_scale, weights, ks, ke, 3)
    assert (indices == -1).all() and (lse == INF).all()
    for heads, dim in [(0, 4), (2, 0)]:  # no heads, or nothing to multiply: every score is 0
        zero = ops.lightning_indexer_logits_int8(
            q[:2, :heads, :dim], k[:, :dim], k_scale, weights[:2, :heads], *everything(2, 9)
        )
        assert (zero == 0).all()


def test_opcheck_compile_export():
    def arguments(queries, keys):
        q, k, k_scale, weights = draw_inputs(queries, keys, 3, 16)
        ks, ke = causal(queries, keys)
        return {"q": q, "k": k, "k_scale": k_scale, "weights": weights, "ks": ks, "ke": ke}

    queries, keys = torch.export.Dim("queries"), torch.export.Dim("keys")
    dynamic = {name: {0: queries} for name in ("q", "weights", "ks", "ke")} | {name: {0: keys} for name in ("k", "k_scale")}
    for op, extra in ((LOGITS, {}), (TOPK, {"topk": 5})):
        one, two = {**arguments(33, 50), **extra}, {**arguments(41, 70), **extra}
        properties.assert_compiles(op, one, two)
        properties.assert_exports(op, one, dynamic)
        properties.assert_opcheck(op, tuple(one.values()))


Q, K, S = torch.ones(2, 3, 4, dtype=torch.int8), torch.ones(5, 4, dtype=torch.int8), torch.ones(5)
W, ROW = torch.ones(2, 3), torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((Q[0], K, S, W, ROW, ROW), ValueError, "q has shape"),
        ((Q, Q, S, W, ROW, ROW), ValueError, "k has shape"),
        ((Q, K[:, :3], S, W, ROW, ROW), ValueError, "k has shape"),
        ((Q, K, S[:4], W, ROW, ROW), ValueError, "k_scale has shape"),
        ((Q, K, S.double(), W, ROW, ROW), ValueError, "k_scale has dtype"),
        ((Q, K, S, W[:1], ROW, ROW), ValueError, "weights has shape"),
        ((Q, K, S, W[:, :2], ROW, ROW), ValueError, "weights has shape"),
        ((Q, K, S, W.double(), ROW, ROW), ValueError, "weights has dtype"),
        ((Q, K, S, W, ROW[:1], ROW), ValueError, "ks has shape"),
        ((Q, K, S, W, ROW, ROW.long()), ValueError, "ke has dtype"),
        ((Q, K, S, W, ROW - 1, ROW), ValueError, "ks is -1 for query 0"),
        ((Q, K, S, W, ROW, ROW + 6), ValueError, "ke is 6 for query 0"),
        ((Q.to(torch.uint8), K, S, W, ROW, ROW), ValueError, "q has dtype Byte, want Char"),
        ((Q.float(), K, S, W, ROW, ROW), ValueError, "q has dtype Float"),
        ((Q, K.bfloat16(), S, W, ROW, ROW), ValueError, "k has dtype BFloat16"),
        ((Q, K, None, W, ROW, ROW), TypeError, "k_scale is NoneType"),
    ],
)
def test_bad_input(arguments, error, words):
    for op, extra in ((ops.lightning_indexer_logits_int8, ()), (ops.lightning_indexer_topk_int8, (3,))):
        properties.assert_refused(error, words, op, *arguments, *extra)


def test_more_bad_input():
    properties.assert_refused(ValueError, "topk is -1", ops.lightning_indexer_topk_int8, Q, K, S, W, ROW, ROW, -1)
    wide, long = torch.ones(1, 1, 131072, dtype=torch.int8), torch.ones(1, 131072, dtype=torch.int8)
    properties.assert_refused(
        ValueError, "q has shape", ops.lightning_indexer_logits_int8, wide, long, S[:1], W[:1, :1], ROW[:1], ROW[:1]
    )
