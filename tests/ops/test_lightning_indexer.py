"""The lightning indexer: scores against float64, gradients, row invariance, and the streamed top-k against the scores."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm5 import _native, ops, reference
from glm5.testing import RandomDraw, check, relative_error, spec
from tests.ops import properties
from tests.ops.indexers import (
    assert_queries_may_share_any_block,
    assert_ranges_may_be_cut_anywhere,
    assert_rows_depend_on_their_query_and_keys_alone,
    assert_topk_is_that_of_the_scores,
    assert_topk_of_a_long_row,
)
from tests.ops.paged import BAD_PAGES, KE, KS, PAGE_SIZES, SEQUENCE, changed, elsewhere, indexer_layout
from tests.ops.properties import same_bits
from tests.ops.ranges import causal, int32

LOGITS, TOPK = spec("lightning_indexer_logits"), spec("lightning_indexer_topk")
DTYPES = pytest.mark.parametrize("dtype", LOGITS.dtypes, ids=["bf16", "float32", "e4m3"])
FLOATS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "float32"])
INF, NAN = float("inf"), float("nan")


def draw_inputs(dtype, queries=37, keys=150, heads=6, dim=40, seed=0):
    draw = RandomDraw(seed)
    k_scale = draw.tensor(keys).abs() + 0.1 if dtype == torch.float8_e4m3fn else None
    real = torch.float64 if dtype == torch.float64 else torch.float32
    q, k = draw.tensor(queries, heads, dim, dtype=torch.float32), draw.tensor(keys, dim, dtype=torch.float32)
    return q.to(dtype), k.to(dtype), k_scale, draw.tensor(queries, heads, dtype=real)


@pytest.mark.parametrize("op", [LOGITS, TOPK], ids=lambda op: op.name)
def test_passes_the_conformance_kit(isa, op):
    check(op.name).raise_if_failed()


@DTYPES
@pytest.mark.parametrize("op", [LOGITS, TOPK], ids=lambda op: op.name)
class TestBothOps:
    def test_keeps_its_promise(self, isa, op, dtype):
        given(st.data())(lambda data: properties.assert_keeps_promise(op, data, dtype))()

    def test_thread_count_does_not_matter(self, isa, op, dtype):
        given(st.data())(lambda data: properties.assert_thread_count_does_not_matter(op, data, dtype))()

    def test_a_row_depends_on_its_query_and_keys_alone(self, isa, op, dtype):
        assert_rows_depend_on_their_query_and_keys_alone(op, partial(draw_inputs, dtype))

    def test_strided_inputs_give_the_same_bits(self, isa, op, dtype):
        q, k, k_scale, weights = draw_inputs(dtype)
        ranges = causal(37, 150)
        extra = () if op is LOGITS else (20,)
        want = getattr(ops, op.name)(q, k, k_scale, weights, *ranges, *extra)
        strided = [None if t is None else t.unsqueeze(-1).expand(*t.shape, 2)[..., 0] for t in (q, k, k_scale, weights)]
        strided[1] = k.t().contiguous().t()
        got = getattr(ops, op.name)(*strided, *ranges, *extra)
        for w, g in zip(properties.as_tuple(want), properties.as_tuple(got), strict=True):
            assert same_bits(w, g)

    def test_a_q_that_is_not_aligned_gives_the_same_bits(self, isa, op, dtype):
        q, k, k_scale, weights = draw_inputs(dtype)
        shifted = torch.cat([torch.zeros(1, dtype=dtype), q.flatten()])[1:].view_as(q)
        extra = () if op is LOGITS else (20,)
        run = getattr(ops, op.name)
        got, want = (run(x, k, k_scale, weights, *causal(37, 150), *extra) for x in (shifted, q))
        assert all(same_bits(w, g) for w, g in zip(properties.as_tuple(want), properties.as_tuple(got), strict=True))


@DTYPES
@pytest.mark.parametrize("heads", [1, 3, 16, 17, 31, 64, 128])
def test_a_score_does_not_depend_on_which_queries_share_a_block(isa, dtype, heads):
    for keys, dim in ((70, 33), (150, 64)):
        assert_queries_may_share_any_block(ops.lightning_indexer_logits, draw_inputs(dtype, 35, keys, heads, dim))


@DTYPES
def test_a_score_does_not_depend_on_the_partition_of_the_range(isa, dtype):
    assert_ranges_may_be_cut_anywhere(ops.lightning_indexer_logits, draw_inputs(dtype))


@DTYPES
def test_topk_equals_topk_of_the_scores(isa, dtype):
    assert_topk_is_that_of_the_scores(ops.lightning_indexer_logits, TOPK, dtype)


@DTYPES
@pytest.mark.parametrize("queries", [1, 3, 40, 96])
def test_topk_of_a_long_row(isa, dtype, queries):
    inputs = draw_inputs(dtype, queries, 5000, 3, 16)
    assert_topk_of_a_long_row(ops.lightning_indexer_logits, ops.lightning_indexer_topk, inputs)


def test_every_microkernel_and_tail_runs(isa):
    """What each of these paths computes is compared with float64 and with other batch splits above."""
    with _native.counted_paths() as paths:
        for dtype, queries, heads in [(torch.bfloat16, 2, 3), (torch.bfloat16, 9, 4), (torch.float32, 2, 5)]:
            q, k, k_scale, weights = draw_inputs(dtype, queries, 200, heads, 8)
            ops.lightning_indexer_logits(q, k, k_scale, weights, int32([0] * queries), int32([200 - 64] * queries))
            ops.lightning_indexer_logits(q, k, k_scale, weights, int32([5] * queries), int32([200] * queries))
        q, k, _, weights = draw_inputs(torch.bfloat16, 1, 200, 16, 32)
        ops.lightning_indexer_logits(q, k, None, weights, int32([0]), int32([200]))
        q, k, _, weights = draw_inputs(torch.float32, 2, 200, 5, 40)
        whole = ops.lightning_indexer_logits(q, k, None, weights, int32([0] * 2), int32([200] * 2))
        part = ops.lightning_indexer_logits(q, k[130:147], None, weights, int32([0] * 2), int32([17] * 2))
        assert same_bits(whole[:, 130:147], part)
    names = ["full register block", "single vector of keys", "single head"]
    names += ["keys packed in squares"] if isa != "portable" else []
    if isa == "amx":
        names += ["whole tiles of rows", "overlapping tiles of rows", "less than a tile of rows"]
        names += ["four vectors of keys", "single vectors of keys", "keys where they lie"]
    assert [name for name in names if not paths.get(f"lightning_indexer: {name}")] == []


@pytest.mark.parametrize("value, lse", [(NAN, NAN), (INF, INF), (-INF, None)])
def test_poisoned_and_infinite_scores(isa, value, lse):
    """One key scores `value`: NaN and -inf are never chosen; the lse shows the NaN."""
    q, k, _, weights = torch.ones(1, 2, 4), torch.ones(70, 4), None, torch.ones(1, 2)
    k[5] = abs(value)
    if value == -INF:
        weights[:] = -1
    indices, got = ops.lightning_indexer_topk(q, k, None, weights, int32([0]), int32([70]), 70)
    scores = ops.lightning_indexer_logits(q, k, None, weights, int32([0]), int32([70]))
    assert scores[0, 5].isnan() if value != value else scores[0, 5] == value
    assert (5 in indices[0].tolist()) == (value == INF)
    others = scores[0, scores[0].isfinite()].double().logsumexp(0)
    want = torch.tensor([others.item() if lse is None else lse])
    assert torch.allclose(got, want, equal_nan=True)
    beyond = ops.lightning_indexer_topk(q, k, None, weights, int32([6]), int32([70]), 3)
    assert beyond[0].tolist() == [[6, 7, 8]] and beyond[1].isfinite().all()


def test_nothing_to_choose_from(isa):
    q, k, weights = torch.ones(3, 2, 4), torch.ones(9, 4), torch.ones(3, 2)
    weights[2] = -INF
    ks, ke = int32([4, 7, 0]), int32([4, 2, 9])
    scores = ops.lightning_indexer_logits(q, k, None, weights, ks, ke)
    assert (scores == -INF).all()
    indices, lse = ops.lightning_indexer_topk(q, k, None, weights, ks, ke, 3)
    assert (indices == -1).all() and (lse == INF).all()
    for heads, dim in [(0, 4), (2, 0)]:  # no heads, or nothing to multiply: every score is 0
        zero = ops.lightning_indexer_logits(q[:, :heads, :dim], k[:, :dim], None, weights[:, :heads], ks * 0, ke * 0 + 9)
        assert (zero[:2] == 0).all()


def test_every_finite_e4m3_value_is_exact(isa):
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    value = every.float()
    q, weights = torch.ones(1, 1, 1).to(torch.float8_e4m3fn), torch.ones(1, 1)
    ranges = int32([0]), int32([256])
    up = ops.lightning_indexer_logits(q, every[:, None], None, weights, *ranges)[0]
    assert torch.equal(up.nan_to_num(7), value.clamp(min=0).nan_to_num(7))
    as_query = ops.lightning_indexer_logits(
        every[:, None, None], q[0], None, weights.expand(256, 1), ranges[0].expand(256), int32([1] * 256)
    )
    assert torch.equal(as_query[:, 0].nan_to_num(7), value.clamp(min=0).nan_to_num(7))


@FLOATS
@pytest.mark.parametrize("heads, dim", [(1, 5), (3, 33), (8, 64)])
def test_selected_keys_equal_the_dense_form(isa, dtype, heads, dim):
    q, k, _, weights = draw_inputs(dtype, 37, 300, heads, dim)
    ks, ke = causal(37, 300)
    ke[5:20] = 300
    scores = ops.lightning_indexer_logits(q, k, None, weights, ks, ke)
    indices = ops.topk_indices(torch.rand(37, 300).masked_fill(scores == -INF, -INF), 70)
    chosen, there = indices.clamp(min=0).long(), indices >= 0
    selected = torch.ops.glm5.lightning_indexer_selected_logits(q, k, weights, indices)
    assert same_bits(selected, scores.gather(1, chosen).masked_fill(~there, -INF))

    grad = torch.randn(37, 70)
    scattered = torch.zeros(37, 300).scatter_add(1, chosen, grad * there)
    backward = torch.ops.glm5.lightning_indexer_logits_backward
    got = backward(grad, q, k, weights, ks, ke, indices)
    wide = [t.double().requires_grad_() for t in (q, k, weights)]
    dense = reference.lightning_indexer_logits(wide[0], wide[1], None, wide[2], ks, ke)
    want = torch.autograd.grad(dense, wide, scattered.double())
    for name, g, w in zip(("q", "k", "weights"), got, want, strict=True):
        assert relative_error(g, w) < (5e-3 if dtype == torch.bfloat16 else 1e-6), name

    wider = torch.nn.functional.pad(indices, (0, 13), value=-1)
    padded = torch.nn.functional.pad(grad, (0, 13), value=NAN)  # what stands beside a -1 is not read
    with properties.threads(3):
        assert all(map(same_bits, got, backward(padded, q, k, weights, ks, ke, wider)))


@FLOATS
def test_gradients_ignore_what_is_not_seen(isa, dtype):
    q, k, _, weights = draw_inputs(dtype)
    ks, ke = causal(37, 150)
    grad = torch.randn(37, 150)
    backward = torch.ops.glm5.lightning_indexer_logits_backward
    unseen = ~reference.lightning_indexer_logits(q, k, None, weights, ks, ke).isfinite()
    clean, poisoned = (backward(grad.masked_fill(unseen, value), q, k, weights, ks, ke) for value in (0.0, NAN))
    assert all(map(same_bits, clean, poisoned))
    assert (clean[1][38:] == 0).all()


@FLOATS
@pytest.mark.parametrize("value", [NAN, INF], ids=["nan", "inf"])
@pytest.mark.parametrize("selected", [False, True], ids=["dense", "selected"])
def test_poison_reaches_the_gradients_of_those_who_see_it_alone(isa, dtype, value, selected):
    """Keys share tiles, and queries blocks, with others that they do not see: 0 * NaN may not carry one into the other."""
    q, k, _, weights = draw_inputs(dtype)
    ks, ke = causal(37, 150)
    ke[20:24], ke[33] = 90, 0  # a second tile; a query that sees nothing
    seen = reference.lightning_indexer_logits(q, k, None, weights, ks, ke).isfinite()
    indices, grad = None, RandomDraw(3).tensor(37, 150)
    if selected:
        indices = ops.topk_indices(RandomDraw(4).tensor(37, 150).masked_fill(~seen, -INF), 70)
        seen &= torch.zeros(37, 151).scatter(1, torch.where(indices < 0, 150, indices).long(), 1)[:, :150].bool()
        grad = grad[:, :70].contiguous()

    def run(name=None, row=None):
        inputs = {"grad": grad, "q": q, "k": k, "weights": weights}
        if name:
            inputs[name] = inputs[name].clone()
            inputs[name][row] = value
        return torch.ops.glm5.lightning_indexer_logits_backward(*inputs.values(), ks, ke, indices)

    def same(rows, got, want):
        return same_bits(got[rows].contiguous(), want[rows].contiguous())

    dq, dk, dweights = run()
    for key in (0, 7, 27, 30, 36, 63, 64, 80, 149):
        got = run("k", key)
        blind, others = ~seen[:, key], torch.arange(150) != key
        assert same(blind, got[0], dq) and same(blind, got[2], dweights), f"key {key}: a query that does not see it"
        assert same(others, got[1], dk), f"key {key}: the other keys"
        if value != value:
            assert got[0][~blind].isnan().all() and got[2][~blind].isnan().all(), f"key {key} hides its NaN"
    for name in ("q", "grad", "weights"):
        for query in (0, 11, 22, 30, 33, 36):
            got = run(name, query)
            others = torch.arange(37) != query
            assert same(others, got[0], dq) and same(others, got[2], dweights), f"{name}, query {query}: the others"
            assert same(~seen[query], got[1], dk), f"{name}, query {query}: keys that it does not see"
            if name == "q" and value != value:
                assert got[1][seen[query]].isnan().all(), f"query {query} hides its NaN"


@pytest.mark.parametrize("heads, dim", [(1, 3), (3, 4), (5, 2)])
def test_gradcheck(heads, dim):
    draw = RandomDraw(heads)
    q, k, weights = (
        draw.tensor(*shape, dtype=torch.float64).requires_grad_() for shape in [(4, heads, dim), (6, dim), (4, heads)]
    )
    ks, ke = int32([0, 1, 3, 5]), int32([6, 4, 3, 6])

    def visible_scores(q, k, weights):
        scores = ops.lightning_indexer_logits(q, k, None, weights, ks, ke)
        return scores[scores > -INF]

    torch.autograd.gradcheck(visible_scores, (q, k, weights))


def test_the_streamed_topk_carries_no_gradient():
    q, k, _, weights = (t if t is None else t.requires_grad_() for t in draw_inputs(torch.float32))
    indices, lse = ops.lightning_indexer_topk(q, k, None, weights, *causal(37, 150), 8)
    assert not indices.requires_grad and not lse.requires_grad


def test_opcheck_compile_export():
    def arguments(queries, keys):
        q, k, k_scale, weights = draw_inputs(torch.float32, queries, keys, 3, 16)
        ks, ke = causal(queries, keys)
        return {"q": q, "k": k, "k_scale": k_scale, "weights": weights, "ks": ks, "ke": ke}

    queries, keys = torch.export.Dim("queries"), torch.export.Dim("keys")
    dynamic = {"q": {0: queries}, "k": {0: keys}, "weights": {0: queries}, "ks": {0: queries}, "ke": {0: queries}}
    for op, extra in ((LOGITS, {}), (TOPK, {"topk": 5})):
        one, two = {**arguments(33, 50), **extra}, {**arguments(41, 70), **extra}
        properties.assert_compiles(op, one, two)
        properties.assert_exports(op, one, dynamic)
        leaves = [v.requires_grad_() if op is LOGITS and k in LOGITS.differentiable else v for k, v in one.items()]
        properties.assert_opcheck(op, tuple(leaves))
    q, k, _, weights = draw_inputs(torch.float32, 5, 20, 3, 16)
    ranges, indices = causal(5, 20), int32([[0, 2, -1]] * 5)
    torch.library.opcheck(torch.ops.glm5.lightning_indexer_selected_logits.default, (q, k, weights, indices))
    for grad, chosen in ((torch.randn(5, 20), None), (torch.randn(5, 3), indices)):
        torch.library.opcheck(
            torch.ops.glm5.lightning_indexer_logits_backward.default, (grad, q, k, weights, *ranges, chosen)
        )


def test_autocast_casts_q_and_k_and_leaves_the_weights():
    q, k, _, weights = draw_inputs(torch.float32)
    leaves = [t.clone().requires_grad_() for t in (q, k, weights)]
    ranges = causal(37, 150)
    want = ops.lightning_indexer_logits(q.bfloat16(), k.bfloat16(), None, weights, *ranges)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.lightning_indexer_logits(leaves[0], leaves[1], None, leaves[2], *ranges)
        indices, _ = ops.lightning_indexer_topk(q, k.bfloat16(), None, weights, *ranges, 9)
    assert same_bits(got, want)
    assert torch.equal(indices, ops.topk_indices(want, 9))
    for grad, leaf in zip(torch.autograd.grad(got[got > -INF].sum(), leaves), leaves, strict=True):
        assert grad.dtype == torch.float32 and grad.shape == leaf.shape and grad.abs().sum() > 0


Q, K, W, ROW = torch.ones(2, 3, 4), torch.ones(5, 4), torch.ones(2, 3), torch.zeros(2, dtype=torch.int32)
FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((Q[0], K, None, W, ROW, ROW), ValueError, "q has shape"),
        ((Q, Q, None, W, ROW, ROW), ValueError, "k has shape"),
        ((Q, K[:, :3], None, W, ROW, ROW), ValueError, "k has shape"),
        ((Q, K, None, W[:1], ROW, ROW), ValueError, "weights has shape"),
        ((Q, K, None, W[:, :2], ROW, ROW), ValueError, "weights has shape"),
        ((Q, K, None, W, ROW[:1], ROW), ValueError, "ks has shape"),
        ((Q, K, None, W, ROW, ROW.long()), ValueError, "ke has dtype"),
        ((Q, K, None, W, ROW - 1, ROW), ValueError, "ks is -1 for query 0"),
        ((Q, K, None, W, ROW, ROW + 6), ValueError, "ke is 6 for query 0"),
        ((Q.half(), K.half(), None, W, ROW, ROW), ValueError, "q has dtype Half"),
        ((Q, K.bfloat16(), None, W, ROW, ROW), ValueError, "k has dtype BFloat16"),
        ((Q.bfloat16(), K.bfloat16(), None, W.bfloat16(), ROW, ROW), ValueError, "weights has dtype"),
        ((Q, K, torch.ones(5), W, ROW, ROW), ValueError, "k_scale is given with k of dtype Float"),
        ((Q.to(FP8), K.to(FP8), torch.ones(4), W, ROW, ROW), ValueError, "k_scale has shape"),
        ((Q.to(FP8), K.to(FP8), torch.ones(5).double(), W, ROW, ROW), ValueError, "k_scale has dtype"),
        ((Q, K, None, None, ROW, ROW), TypeError, "weights is NoneType"),
    ],
)
def test_bad_input(arguments, error, words):
    for op, extra in ((ops.lightning_indexer_logits, ()), (ops.lightning_indexer_topk, (3,))):
        properties.assert_refused(error, words, op, *arguments, *extra)


def test_more_bad_input():
    properties.assert_refused(ValueError, "topk is -1", ops.lightning_indexer_topk, Q, K, None, W, ROW, ROW, -1)
    for indices, words in [
        ([[0, 5]] * 2, "indices holds 5 for query 0"),
        ([[0, -2]] * 2, "indices holds -2"),
        ([[0, 1], [2, 2]], "indices holds 2 after 2 for query 1"),
        ([[-1, 1]] * 2, "indices holds 1 after -1"),
        ([[0]], "indices has shape"),
    ]:
        properties.assert_refused(
            ValueError, words, torch.ops.glm5.lightning_indexer_selected_logits, Q, K, W, int32(indices)
        )
    for grad, indices in [(torch.ones(2, 4), None), (torch.ones(2, 5), int32([[0]] * 2))]:
        properties.assert_refused(
            ValueError, "grad has shape", torch.ops.glm5.lightning_indexer_logits_backward, grad, Q, K, W, ROW, ROW, indices
        )


PAGED = spec("lightning_indexer_topk_paged")
FORMS = {"bf16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64, "e4m3": torch.float8_e4m3fn}


def paged_arguments(page_size, form, heads=5, topk=20, **layout):
    layout = indexer_layout(page_size, form, **layout)
    draw = RandomDraw(1)
    real = torch.float64 if form == "float64" else torch.float32
    arguments = {
        "q": draw.tensor(8, heads, layout.dim).to(FORMS[form]),
        "weights": draw.tensor(8, heads, dtype=real),
        **layout.table,
        "sequence": SEQUENCE,
        "ks": KS,
        "ke": KE,
        "topk": topk,
    }
    return arguments, layout


@DTYPES
class TestPaged:
    def test_keeps_its_promise(self, isa, dtype):
        given(st.data())(lambda data: properties.assert_keeps_promise(PAGED, data, dtype))()

    def test_thread_count_does_not_matter(self, isa, dtype):
        given(st.data())(lambda data: properties.assert_thread_count_does_not_matter(PAGED, data, dtype))()


@PAGE_SIZES
@pytest.mark.parametrize("form", FORMS)
def test_pages_give_the_bits_of_keys_in_a_row(isa, form, page_size):
    for heads, dim in ((5, 40), (32, 64)) if form != "float64" else ((5, 40),):
        arguments, layout = paged_arguments(page_size, form, heads=heads, dim=dim)
        indices, lse = ops.lightning_indexer_topk_paged(**arguments)
        for t, s in enumerate(SEQUENCE.tolist()):
            k, k_scale = layout.keys(s)
            row = [arguments[name][t : t + 1] for name in ("q", "weights", "ks", "ke")]
            want = ops.lightning_indexer_topk(row[0], k, k_scale, *row[1:], 20)
            assert same_bits(indices[t : t + 1], want[0]) and same_bits(lse[t : t + 1], want[1]), t
        for seed, threads in ((1, 1), (2, 2), (3, 3)):
            with properties.threads(threads):
                moved = ops.lightning_indexer_topk_paged(**elsewhere(arguments, layout, seed))
            assert same_bits(moved[0], indices) and same_bits(moved[1], lse)
        order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
        rows = {name: arguments[name][order] for name in PAGED.rows}
        mixed = ops.lightning_indexer_topk_paged(**{**arguments, **rows})
        assert same_bits(mixed[0], indices[order]) and same_bits(mixed[1], lse[order])


@pytest.mark.parametrize("form", ["bf16", "e4m3"])
def test_many_queries_of_a_long_sequence_in_pages(isa, form):
    """Strips of queries, key blocks shared by threads, and more sequences than threads."""
    layout = indexer_layout(16, form, lengths=(5000, *[90] * 9))
    sequence = int32([0] * 70 + list(range(10)))
    ke = int32(torch.where(sequence == 0, 5000 - torch.arange(80), 90))
    ks = int32(torch.arange(80) % 3 * 7)
    q, weights = torch.randn(80, 4, 40).to(FORMS[form]), torch.randn(80, 4)
    k, k_scale = layout.keys(0)
    first = slice(0, 70)
    want = ops.lightning_indexer_topk(q[first], k, k_scale, weights[first], ks[first], ke[first], 300)
    for count in (1, 2, 3):
        with properties.threads(count):
            got = ops.lightning_indexer_topk_paged(q, weights, **layout.table, sequence=sequence, ks=ks, ke=ke, topk=300)
        assert all(same_bits(g[first], w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize(("page_size", "heads", "dim"), [(7, 4, 40), (16, 16, 64)])
def test_gaps_between_the_windows_of_neighbours_are_not_read(isa, page_size, heads, dim):
    """Two queries of one sequence see its ends; the pages between are gone."""
    layout = indexer_layout(page_size, "bf16", shared=0, dim=dim)
    k, _ = layout.keys(3)
    table = layout.pages.block_table
    gone = slice(2, 280 // page_size)
    table[3, gone] = int32(([-1, 2**31 - 1, -7] * 14)[gone])
    ks, ke = int32([0, 290]), int32([10, 300])
    q, weights = torch.randn(2, heads, dim).bfloat16(), torch.randn(2, heads)
    args = q, weights, layout.pages.cache, table, int32([3, 3])
    for count in (1, 2):
        with properties.threads(count):
            got = ops.lightning_indexer_topk_paged(*args, ks, ke, 30)
        assert all(map(same_bits, got, ops.lightning_indexer_topk(q, k, None, weights, ks, ke, 30)))


def test_paged_opcheck_compile_export():
    arguments, _ = paged_arguments(16, "bf16")  # torch's own checks cannot multiply e4m3
    properties.assert_opcheck(PAGED, tuple(arguments.values()))
    arguments, _ = paged_arguments(16, "e4m3")
    other = {**arguments, **{name: torch.cat([arguments[name]] * 2) for name in ("q", "weights", "sequence", "ks", "ke")}}
    properties.assert_compiles(PAGED, arguments, other)
    dynamic = dict.fromkeys(("q", "weights", "sequence", "ks", "ke"), {0: torch.export.Dim("tokens")})
    properties.assert_exports(PAGED, arguments, dynamic)


@pytest.mark.parametrize(
    "change, words",
    [
        *BAD_PAGES,
        ({"q": lambda q: q.half()}, "q has dtype"),
        ({"q": lambda q: q[0]}, "q has shape"),
        ({"weights": lambda w: w.double()}, "weights has dtype"),
        ({"weights": lambda w: w[:, 1:]}, "weights has shape"),
        ({"ks": lambda ks: ks[1:]}, "ks has shape"),
        ({"ke": lambda ke: ke.float()}, "ke has dtype"),
        ({"topk": lambda k: -1}, "topk is -1"),
        ({"ks": lambda ks: ks - 1}, "ks is -1 for query 0"),
        ({"ke": lambda ke: ke + 10**6}, "ke is 1000300 for query 0"),
        (
            {"block_table": lambda b: b.clone().index_fill_(1, torch.tensor(9), 99999)},
            r"block_table\[3, 9\] is 99999, want 0",
        ),
        ({"block_table": lambda b: b.clone().index_fill_(1, torch.tensor(9), -1)}, r"block_table\[3, 9\] is -1, want 0"),
    ],
)
@pytest.mark.parametrize("form", ["bf16", "e4m3"])
def test_paged_bad_input(change, words, form):
    arguments = changed(paged_arguments(16, form)[0], change)
    properties.assert_refused(
        ValueError, f"lightning_indexer_topk_paged: {words}", ops.lightning_indexer_topk_paged, **arguments
    )
