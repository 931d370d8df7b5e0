"""The indexer's loss: against float64, query by query, dense and selected, on every instruction set."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm5 import _native, ops
from glm5.testing import RandomDraw, relative_error, spec
from glm5.testing.indexer_kl import select
from tests.ops import properties

KL, LOSS = spec("lightning_indexer_kl"), spec("indexer_kl_loss")
DTYPES = pytest.mark.parametrize("dtype", KL.dtypes, ids=["bf16", "float32"])
STAGES = pytest.mark.parametrize("topk", [None, 70], ids=["dense", "selected"])
QUERY_ARGUMENTS = ("q", "weights", "ks", "ke", "attn_q", "attn_lse", "indices")
KEY_ARGUMENTS = ("k", "attn_k")


def case(queries=90, keys=600, topk=None, dtype=torch.float32, heads=4, dim=24, attn_heads=3, attn_dim=16, seed=0):
    """Causal queries over the last keys, with the attention's own lse."""
    draw, real = RandomDraw(seed), torch.promote_types(dtype, torch.float32)
    ke = torch.arange(keys - queries + 1, keys + 1, dtype=torch.int32)
    ks = torch.where(torch.arange(queries) < queries // 2, 0, min(130, keys // 2)).to(torch.int32)
    indices = None if topk is None else select(ks, ke, topk, seed)
    shape = (keys, attn_heads, attn_dim) if topk is None else (keys, attn_dim)
    attn_q, attn_k = draw.tensor(queries, attn_heads, attn_dim, dtype=dtype), draw.tensor(*shape, dtype=dtype)
    if topk is None:
        _, lse = ops.mla_attention(attn_q, attn_k, attn_k, ks, ke, 0.25)
    else:
        _, lse = ops.sparse_mla(attn_q, attn_k, indices, 0.25, 4)
    return {
        "q": draw.tensor(queries, heads, dim, dtype=dtype),
        "k": draw.tensor(keys, dim, dtype=dtype),
        "weights": draw.tensor(queries, heads, dtype=real, scale=0.1),
        "ks": ks,
        "ke": ke,
        "attn_q": attn_q,
        "attn_k": attn_k,
        "attn_lse": lse,
        "scale": 0.25,
        "indices": indices,
    }


def queries(arguments, rows):
    """The same call for some of its queries."""
    return {
        name: value[rows] if name in QUERY_ARGUMENTS and value is not None else value for name, value in arguments.items()
    }


@DTYPES
def test_keeps_its_promise(isa, dtype):
    given(st.data())(lambda data: properties.assert_keeps_promise(KL, data, dtype))()


def test_the_loss_keeps_its_promise(isa):
    given(st.data())(lambda data: properties.assert_keeps_promise(LOSS, data, torch.float32))()


@DTYPES
@STAGES
def test_thread_count_does_not_matter(isa, dtype, topk):
    # More tiles than parts of dk, so that every part sums several.
    arguments = case(queries=300, topk=topk, dtype=dtype)
    one = properties.run_with_gradients(KL, arguments)
    for count in (1, 2, 3):
        with properties.threads(count):
            again = properties.run_with_gradients(KL, arguments)
        assert all(properties.same_bits(a, b) for a, b in zip(one, again, strict=True)), f"{count} threads"


def test_the_loss_is_the_same_at_any_thread_count(isa):
    given(st.data())(lambda data: properties.assert_thread_count_does_not_matter(LOSS, data, torch.float32))()


@DTYPES
@STAGES
def test_a_query_depends_on_itself_and_its_keys_alone(isa, dtype, topk):
    arguments = case(topk=topk, dtype=dtype)
    whole, dq, _, dweights = properties.run_with_gradients(KL, arguments)
    assert (whole > 0).all()
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    for rows in (order, slice(0, 1), slice(44, 46), slice(63, 65), slice(20, 90)):
        assert properties.same_bits(whole[rows], ops.lightning_indexer_kl(**queries(arguments, rows)))
    # The gradients of q and weights too, once the upstream gradient is a query's own.
    leaves = [arguments[name].clone().requires_grad_() for name in ("q", "weights")]
    for rows in (slice(0, 90), slice(30, 77)):
        part = queries({**arguments, "q": leaves[0], "weights": leaves[1]}, rows)
        got = torch.autograd.grad(ops.lightning_indexer_kl(**part).sum(), leaves)
        if rows == slice(0, 90):
            want = got
        else:
            assert all(properties.same_bits(g[rows], w[rows]) for g, w in zip(got, want, strict=True))


@DTYPES
@STAGES
def test_where_the_document_lies_does_not_matter(isa, dtype, topk):
    """The same keys 37 places further on, poison around them: equal bits, and finite gradients."""
    arguments = case(topk=topk, dtype=dtype)
    want = properties.run_with_gradients(KL, arguments)
    poison = {name: torch.full_like(arguments[name][:37], float("nan")) for name in KEY_ARGUMENTS}
    moved = {
        **arguments,
        **{name: torch.cat([poison[name], arguments[name], poison[name]]) for name in KEY_ARGUMENTS},
        "ks": arguments["ks"] + 37,
        "ke": arguments["ke"] + 37,
    }
    if topk is not None:
        indices = arguments["indices"]
        moved["indices"] = torch.where(indices < 0, -1, indices + 37).to(torch.int32)
    kl, dq, dk, dweights = properties.run_with_gradients(KL, moved)
    assert all(properties.same_bits(g, w) for g, w in zip((kl, dq, dk[37:-37], dweights), want, strict=True))
    assert not dk[:37].any() and not dk[-37:].any()


@DTYPES
def test_later_keys_of_the_tile_do_not_leak(isa, dtype):
    """A query shares its tile with others that see more keys: a NaN among those is none of its business."""
    arguments = case(dtype=dtype)
    want, _, _, want_dw = properties.run_with_gradients(KL, arguments)
    for name in KEY_ARGUMENTS:
        arguments[name][-1] = float("nan")
    kl, _, _, dw = properties.run_with_gradients(KL, arguments)
    assert kl[-1].isnan()
    assert properties.same_bits(kl[:-1], want[:-1]) and properties.same_bits(dw[:-1], want_dw[:-1])


@DTYPES
def test_a_wider_list_changes_nothing(isa, dtype):
    arguments = case(topk=300, dtype=dtype)
    want = properties.run_with_gradients(KL, arguments)
    padding = torch.full((90, 29), -1, dtype=torch.int32)
    wider = {**arguments, "indices": torch.cat([arguments["indices"], padding], 1)}
    assert all(properties.same_bits(g, w) for g, w in zip(properties.run_with_gradients(KL, wider), want, strict=True))


@STAGES
def test_it_is_the_loss_of_its_parts(isa, topk):
    """The streamed op equals the ops that its definition names, one after the other."""
    a = case(topk=topk)
    logits = ops.lightning_indexer_logits(a["q"], a["k"], None, a["weights"], a["ks"], a["ke"])
    if topk is None:
        target = ops.mla_attn_target(a["attn_q"], a["attn_k"], a["attn_lse"], a["ks"], a["ke"], a["scale"])
    else:
        target = ops.sparse_mla_attn_target(a["attn_q"], a["attn_k"], a["indices"], a["attn_lse"], a["scale"])
    want = ops.indexer_kl_loss(logits, target, a["indices"])
    assert relative_error(ops.lightning_indexer_kl(**a), want) < 1e-5


def test_equal_distributions_have_no_loss(isa):
    logits = torch.randn(5, 700)
    logits[:, 650:] = float("-inf")
    kl = ops.indexer_kl_loss(logits, logits.softmax(-1))
    assert kl.abs().max() < 2e-6
    # One attention head whose scores are the indexer's: relu is the identity where all scores are positive.
    q, k = torch.rand(6, 1, 8, requires_grad=True), torch.rand(40, 8)
    ks, ke = torch.zeros(6, dtype=torch.int32), torch.full((6,), 40, dtype=torch.int32)
    lse = (q[:, 0] @ k.T).logsumexp(-1, keepdim=True).detach()
    kl = ops.lightning_indexer_kl(q, k, torch.ones(6, 1), ks, ke, q, k[:, None], lse, 1.0)
    kl.sum().backward()
    assert kl.abs().max() < 2e-6 and q.grad.abs().max() < 1e-6


@STAGES
def test_edges(isa, topk):
    # No key at all, one key (both distributions are sure of it), no query, no keys in the pack.
    a = case(queries=4, topk=topk)
    a["ks"] = torch.tensor([5, 9, 3, 600], dtype=torch.int32)
    a["ke"] = torch.tensor([5, 4, 4, 600], dtype=torch.int32)
    if topk is not None:
        a["indices"] = select(a["ks"], a["ke"], topk, 0)
    a["attn_lse"] = torch.full((4, 3), float("inf"))
    a["attn_lse"][2] = 0.0
    kl, *gradients = properties.run_with_gradients(KL, a)
    assert torch.equal(kl[[0, 1, 3]], torch.zeros(3)) and kl[2].abs() < 1e-6
    assert all(g.isfinite().all() for g in gradients) and not gradients[0][[0, 1, 3]].any()
    kl, *gradients = properties.run_with_gradients(KL, queries(a, slice(0, 0)))
    assert kl.shape == (0,) and not gradients[1].any()
    nothing = queries(case(topk=topk), slice(0, 3))
    nothing.update({name: nothing[name][:0] for name in KEY_ARGUMENTS})
    nothing.update(ks=torch.zeros(3, dtype=torch.int32), ke=torch.zeros(3, dtype=torch.int32))
    if topk is not None:
        nothing["indices"] = torch.full((3, topk), -1, dtype=torch.int32)
    assert torch.equal(ops.lightning_indexer_kl(**nothing), torch.zeros(3))


@DTYPES
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("topk", [None, 300], ids=["dense", "selected"])
def test_poison_reaches_the_gradients_of_those_who_see_it_alone(isa, dtype, value, topk):
    """Queries of a document are multiplied together: 0 * NaN may not carry a later key into an earlier query, nor a query
    into a key that only others see."""
    arguments = case(dtype=dtype, topk=topk, queries=70, keys=300)
    arguments["ke"][30] = arguments["ks"][30]
    if topk is not None:
        arguments["indices"][30] = -1
    position = torch.arange(300)
    seen = (position >= arguments["ks"][:, None]) & (position < arguments["ke"][:, None])

    def same(rows, got, want):
        return properties.same_bits(got[rows].contiguous(), want[rows].contiguous())

    want = properties.run_with_gradients(KL, arguments)
    for key in (5, 140, 255, 256, 262, 299):
        poisoned = dict(arguments, k=arguments["k"].clone())
        poisoned["k"][key] = value
        kl, dq, _, dweights = properties.run_with_gradients(KL, poisoned)
        blind = ~seen[:, key]
        assert same(blind, kl, want[0]) and same(blind, dq, want[1]) and same(blind, dweights, want[3]), f"key {key}"
        if value != value:
            assert dq[~blind].isnan().all() and dweights[~blind].isnan().all(), f"key {key} hides its NaN"
    for query in (0, 20, 30, 36, 50, 69):
        poisoned = dict(arguments, q=arguments["q"].clone())
        poisoned["q"][query] = value
        kl, dq, dk, dweights = properties.run_with_gradients(KL, poisoned)
        others = torch.arange(70) != query
        assert same(others, kl, want[0]) and same(others, dq, want[1]) and same(others, dweights, want[3]), f"query {query}"
        assert same(~seen[query], dk, want[2]), f"query {query}: keys that it does not see"
        if value != value:
            assert dk[seen[query]].isnan().all(), f"query {query} hides its NaN"


@DTYPES
def test_the_slow_path_has_the_bits_of_the_fast_one(isa, dtype):
    """A NaN in a query that sees nothing sends its tile down the slow path; nothing else of it may show."""
    arguments = case(dtype=dtype)
    arguments["ke"][[10, 60]] = arguments["ks"][[10, 60]]
    want = properties.run_with_gradients(KL, arguments)
    arguments["q"][[10, 60]] = float("nan")
    with _native.counted_paths() as counts:
        got = properties.run_with_gradients(KL, arguments)
    assert "indexer_kl dense not finite" in counts
    assert all(map(properties.same_bits, got, want))


def test_poison_stays_visible(isa):
    a = case()
    a["q"][7, 2, 3] = float("nan")
    kl, dq, _, _ = properties.run_with_gradients(KL, a)
    assert kl[7].isnan() and dq[7].isnan().any() and kl[:7].isfinite().all() and kl[8:].isfinite().all()


def test_the_attention_is_a_constant():
    a = case()
    for name in ("attn_q", "attn_k", "attn_lse", "q"):
        a[name] = a[name].clone().requires_grad_()
    ops.lightning_indexer_kl(**a).sum().backward()
    assert a["q"].grad is not None and all(a[name].grad is None for name in ("attn_q", "attn_k", "attn_lse"))


@STAGES
def test_autocast_casts_the_products_and_leaves_weights_and_lse(topk):
    a = case(topk=topk)
    products = ("q", "k", "attn_q", "attn_k")
    want = ops.lightning_indexer_kl(**{**a, **{name: a[name].bfloat16() for name in products}})
    leaves = [a[name].clone().requires_grad_() for name in KL.differentiable]
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.lightning_indexer_kl(**{**a, **dict(zip(KL.differentiable, leaves, strict=True))})
    assert properties.same_bits(got, want)
    for grad, leaf in zip(torch.autograd.grad(got.sum(), leaves), leaves, strict=True):
        assert grad.dtype == torch.float32 and grad.shape == leaf.shape and grad.abs().sum() > 0


@STAGES
def test_gradcheck(topk):
    a = case(queries=5, keys=9, topk=None if topk is None else 4, dtype=torch.float64, heads=2, dim=3, attn_dim=4)
    leaves = [a[name].clone().requires_grad_() for name in KL.differentiable]
    torch.autograd.gradcheck(
        lambda q, k, weights: ops.lightning_indexer_kl(**{**a, "q": q, "k": k, "weights": weights}), leaves
    )


@pytest.mark.parametrize("indices", [None, torch.tensor([[0, 2, 5], [1, 3, -1]], dtype=torch.int32)])
def test_gradcheck_of_the_loss(indices):
    logits = torch.randn(2, 6, dtype=torch.float64)
    target = torch.rand(2, 6 if indices is None else 3, dtype=torch.float64)
    target[1, -1] = 0
    torch.autograd.gradcheck(lambda x: ops.indexer_kl_loss(x, target, indices), (logits.requires_grad_(),))


@STAGES
def test_opcheck_compile_export(topk):
    a = case(queries=6, keys=20, topk=None if topk is None else 5)
    leaves = {name: a[name].clone().requires_grad_() for name in KL.differentiable}
    properties.assert_opcheck(KL, tuple({**a, **leaves}.values()))
    properties.assert_compiles(KL, a, case(queries=11, keys=31, topk=None if topk is None else 5))
    queries_dim, keys_dim = torch.export.Dim("queries"), torch.export.Dim("keys")
    dynamic = {name: {0: queries_dim} for name in QUERY_ARGUMENTS} | {name: {0: keys_dim} for name in KEY_ARGUMENTS}
    properties.assert_exports(KL, a, dynamic)


def test_opcheck_compile_export_of_the_loss():
    def arguments(rows):
        return {"logits": torch.randn(rows, 9), "target": torch.rand(rows, 9)}

    a = arguments(4)
    properties.assert_opcheck(LOSS, (a["logits"].clone().requires_grad_(), a["target"], None))
    properties.assert_compiles(LOSS, a, arguments(7))
    rows = torch.export.Dim("rows")
    properties.assert_exports(LOSS, a, {"logits": {0: rows}, "target": {0: rows}})


def test_every_path_runs(isa):
    wanted = {
        f"indexer_kl {path}" for path in ("dense block", "dense tail", "selected block", "selected tail", "signal tail")
    }
    with _native.counted_paths() as counts:
        properties.run_with_gradients(KL, case())
        properties.run_with_gradients(KL, case(topk=300))
    assert wanted <= set(counts)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"q": torch.ones(2, 4, 24, dtype=torch.float16)}, ValueError, "q has dtype"),
        ({"q": torch.ones(2, 24)}, ValueError, "q has shape"),
        ({"k": torch.ones(20, 23)}, ValueError, "k has shape"),
        ({"k": torch.ones(20, 24).bfloat16()}, ValueError, "k has dtype"),
        ({"weights": torch.ones(2, 3)}, ValueError, "weights has shape"),
        ({"weights": torch.ones(2, 4).bfloat16()}, ValueError, "weights has dtype"),
        ({"scale": float("nan")}, ValueError, "scale is nan"),
        ({"ks": ints(0, -1)}, ValueError, "ks is -1 for query 1"),
        ({"ke": ints(21, 3)}, ValueError, "ke is 21 for query 0"),
        ({"ke": torch.tensor([1, 2])}, ValueError, "ke has dtype"),
        ({"attn_q": torch.ones(2, 3, 16).double()}, ValueError, "attn_q has dtype"),
        ({"attn_k": torch.ones(20, 16)}, ValueError, "attn_k has shape"),
        ({"attn_k": torch.ones(20, 2, 16)}, ValueError, "attn_k has shape"),
        ({"attn_lse": torch.ones(2, 2)}, ValueError, "attn_lse has shape"),
        ({"attn_k": torch.ones(20, 16), "indices": ints([0, 20], [0, 1])}, ValueError, "indices holds 20 for query 0"),
        ({"attn_k": torch.ones(20, 16), "indices": ints([0, 3], [10, -2])}, ValueError, "indices holds -2 for query 1"),
        ({"attn_k": torch.ones(20, 16), "indices": ints([3, 3], [0, -1])}, ValueError, "ascending"),
        ({"attn_k": torch.ones(20, 16), "indices": ints([-1, 3], [0, -1])}, ValueError, "-1 at the end alone"),
        ({"attn_k": torch.ones(20, 16), "indices": torch.tensor([[0], [1]])}, ValueError, "indices has dtype"),
        ({"indices": ints([0], [1])}, ValueError, "attn_k has shape"),
        ({"attn_lse": None}, TypeError, "attn_lse is NoneType"),
        ({"indices": [[0]]}, TypeError, "indices is list"),
    ],
)
def test_bad_input(change, error, words):
    properties.assert_refused(error, words, ops.lightning_indexer_kl, **{**case(queries=2, keys=20), **change})


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"logits": torch.ones(2, 4).bfloat16()}, ValueError, "logits has dtype"),
        ({"target": torch.ones(2, 5)}, ValueError, "target has shape"),
        ({"target": torch.ones(2, 4).double()}, ValueError, "target has dtype"),
        ({"target": torch.ones(2, 1), "indices": ints([4], [0])}, ValueError, "indices holds 4 for query 0"),
        ({"indices": ints([3], [0])}, ValueError, "target has shape"),
        ({"target": 1.0}, TypeError, "target is float"),
    ],
)
def test_bad_input_of_the_loss(change, error, words):
    properties.assert_refused(
        error, words, ops.indexer_kl_loss, **{"logits": torch.ones(2, 4), "target": torch.ones(2, 4), **change}
    )
