"""Dense attention: against float64, row by row, document by document, on every instruction set."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm5 import _native, ops, reference
from glm5.testing import RandomDraw, same_bits, spec
from glm5.testing.judges import complaints
from tests.ops import properties
from tests.ops.paged import BAD_PAGES, KE, KS, PAGE_SIZES, SEQUENCE, changed, elsewhere, latent_layout

ATTENTION, TARGET = spec("mla_attention"), spec("mla_attn_target")
OPS = pytest.mark.parametrize("op", [ATTENTION, TARGET], ids=lambda op: op.name)
DTYPES = pytest.mark.parametrize("dtype", ATTENTION.dtypes, ids=["bf16", "float32"])
INF, NAN = float("inf"), float("nan")
ROWS_OF_QUERIES, ROWS_OF_KEYS = ("q", "ks", "ke"), ("k", "v")


def causal(queries, keys=None, ks=0):
    """Ranges of the last `queries` of `keys` tokens of a document that starts at token ks."""
    keys = queries if keys is None else keys
    ke = torch.arange(keys - queries + 1, keys + 1, dtype=torch.int32)
    return torch.full_like(ke, ks), ke


def example(queries, keys=None, ranges=None, heads=2, dk=40, dv=24, dtype=torch.float32, seed=0):
    """Arguments of mla_attention, causal unless `ranges` are given."""
    keys = queries if keys is None else keys
    ks, ke = causal(queries, keys) if ranges is None else (torch.as_tensor(r, dtype=torch.int32) for r in ranges)
    draw = RandomDraw(seed)
    return {
        "q": draw.tensor(queries, heads, dk, dtype=dtype),
        "k": draw.tensor(keys, heads, dk, dtype=dtype),
        "v": draw.tensor(keys, heads, dv, dtype=dtype),
        "ks": ks,
        "ke": ke,
        "scale": dk**-0.5,
    }


def packed(*documents):
    """Several examples as one batch, one behind the other."""
    starts, start = [], 0
    for document in documents:
        starts.append(start)
        start += document["k"].shape[0]
    return {
        **{n: torch.cat([d[n] for d in documents]) for n in ("q", "k", "v")},
        **{n: torch.cat([d[n] + s for d, s in zip(documents, starts, strict=True)]) for n in ("ks", "ke")},
        "scale": documents[0]["scale"],
    }


def target_arguments(arguments, lse):
    """The same as arguments of mla_attn_target."""
    return {**{n: v for n, v in arguments.items() if n != "v"}, "lse": lse}


def gradients(arguments):
    return properties.run_with_gradients(ATTENTION, arguments)[2:]


def all_same_bits(got, want):
    return all(properties.same_bits(g, w) for g, w in zip(got, want, strict=True))


@OPS
@DTYPES
class TestEveryOp:
    def test_keeps_its_promise(self, isa, op, dtype):
        given(st.data())(lambda data: properties.assert_keeps_promise(op, data, dtype))()

    def test_thread_count_does_not_matter(self, isa, op, dtype):
        given(st.data())(lambda data: properties.assert_thread_count_does_not_matter(op, data, dtype))()


@DTYPES
class TestARowIsAFunctionOfItsKeys:
    def test_any_batch_split_and_order(self, isa, dtype):
        a = example(300, dtype=dtype)
        out, lse = ops.mla_attention(**a)
        target = ops.mla_attn_target(**target_arguments(a, lse))
        order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
        for rows in (order, torch.arange(0, 137), torch.arange(137, 300), torch.tensor([299]), torch.tensor([0, 150])):
            part = {**a, **{n: a[n][rows] for n in ROWS_OF_QUERIES}}
            assert all_same_bits(ops.mla_attention(**part), (out[rows], lse[rows]))
            assert properties.same_bits(ops.mla_attn_target(**target_arguments(part, lse[rows])), target[rows])

    def test_a_document_shifted_in_its_pack(self, isa, dtype):
        a = example(290, dtype=dtype)
        out, lse = ops.mla_attention(**a)
        target = ops.mla_attn_target(**target_arguments(a, lse))
        for shift in (1, 7, 64, 300):
            both = packed(example(shift, dtype=dtype, seed=5), a)
            got = ops.mla_attention(**both)
            assert all_same_bits((got[0][shift:], got[1][shift:]), (out, lse))
            got = ops.mla_attn_target(**target_arguments(both, got[1]))[shift:]
            assert properties.same_bits(got[:, shift:].contiguous(), target) and not got[:, :shift].any()

    def test_neighbours_with_another_start(self, isa, dtype):
        # Rows of one document, alternating with rows whose keys start elsewhere: no two rows can share a tile.
        a = example(70, dtype=dtype)
        b = {**a, "ks": a["ks"] + torch.arange(70, dtype=torch.int32) % 5}
        out, lse = ops.mla_attention(**a)
        mixed = ops.mla_attention(
            **{**a, **{n: torch.stack([a[n], b[n]], 1).flatten(0, 1).contiguous() for n in ROWS_OF_QUERIES}}
        )
        assert all_same_bits((mixed[0][::2], mixed[1][::2]), (out, lse))

    def test_what_lies_outside_its_range_does_not_matter(self, isa, dtype):
        a = example(40, 330, dtype=dtype)
        out, lse = ops.mla_attention(**a)
        target = ops.mla_attn_target(**target_arguments(a, lse))
        for rows, keys in ((slice(0, 1), 291), (slice(0, 7), 297), (slice(39, 40), 330)):
            for poison in (0.0, NAN, INF):
                k, v = a["k"].clone(), a["v"].clone()
                k[keys:], v[keys:] = poison, poison
                got = ops.mla_attention(**{**a, "k": k, "v": v})
                assert all_same_bits((got[0][rows], got[1][rows]), (out[rows], lse[rows]))
                got = ops.mla_attn_target(**target_arguments({**a, "k": k}, lse))
                assert properties.same_bits(got[rows], target[rows])
            cut = {**a, **{n: a[n][rows] for n in ROWS_OF_QUERIES}, **{n: a[n][:keys] for n in ROWS_OF_KEYS}}
            assert all_same_bits(ops.mla_attention(**cut), (out[rows], lse[rows]))

    def test_heads_do_not_meet(self, isa, dtype):
        a = example(50, heads=3, dtype=dtype)
        out, lse = ops.mla_attention(**a)
        one = {**a, **{n: a[n][:, 1:2] for n in ("q", "k", "v")}}  # not contiguous, on purpose
        assert all_same_bits(ops.mla_attention(**one), (out[:, 1:2], lse[:, 1:2]))

    def test_the_gradients_of_a_document_do_not_depend_on_its_pack(self, isa, dtype):
        documents = [example(n, dtype=dtype, seed=n) for n in (100, 65, 1, 290)]
        whole = packed(*documents)
        generator = torch.Generator().manual_seed(0)
        dout = torch.randn(whole["q"].shape[0], 2, 24, generator=generator).to(dtype)

        def backward(arguments, cotangent):
            lse = ops.mla_attention(**arguments)[1]
            return torch.ops.glm5.mla_attention_backward(
                cotangent,
                None,
                *(arguments[n] for n in ("q", "k", "v")),
                lse,
                *(arguments[n] for n in ("ks", "ke", "scale")),
            )

        together, start = backward(whole, dout), 0
        for document in documents:
            rows = slice(start, start + document["q"].shape[0])
            assert all_same_bits([g[rows] for g in together], backward(document, dout[rows]))
            start = rows.stop


@DTYPES
class TestEdges:
    def test_a_query_without_keys(self, isa, dtype):
        a = example(6, 9, ([0, 3, 9, 5, 0, 7], [4, 3, 9, 2, 9, 0]), dtype=dtype)
        out, lse = ops.mla_attention(**a)
        for row, empty in enumerate([False, True, True, True, False, True]):
            assert bool((lse[row] == INF).all()) == empty
            assert bool((out[row] == 0).all()) == empty
        target = ops.mla_attn_target(**target_arguments(a, lse))
        assert torch.equal(target[[1, 2, 3, 5]], torch.zeros(4, 9))
        assert all(g.isfinite().all() for g in gradients(a))
        assert torch.equal(gradients(a)[0][[1, 2, 3, 5]], torch.zeros(4, 2, 40, dtype=dtype))

    @pytest.mark.parametrize("queries, keys", [(0, 5), (0, 0), (4, 0), (1, 1)])
    def test_nothing_or_one(self, isa, dtype, queries, keys):
        a = example(queries, keys, ([0] * queries, [keys] * queries), heads=1, dk=1, dv=1, dtype=dtype)
        out, lse = ops.mla_attention(**a)
        if keys == 0:
            assert torch.equal(out, torch.zeros(queries, 1, 1, dtype=dtype)) and bool((lse == INF).all())
        else:
            assert torch.equal(out, a["v"][:queries])
        assert [g.shape for g in gradients(a)] == [a[n].shape for n in ("q", "k", "v")]
        assert ops.mla_attn_target(**target_arguments(a, lse)).shape == (queries, keys)

    def test_a_nan_score_stays_visible_and_at_home(self, isa, dtype):
        a = example(20, 300, dtype=dtype)
        clean = ops.mla_attention(**a)
        a["k"][290, 1, 3] = NAN  # seen by the rows from 10 on, in head 1
        out, lse = ops.mla_attention(**a)
        assert lse[10:, 1].isnan().all() and out[10:, 1].isnan().all()
        assert all_same_bits(
            (out[:10], lse[:10], out[:, 0], lse[:, 0]), (clean[0][:10], clean[1][:10], clean[0][:, 0], clean[1][:, 0])
        )
        target = ops.mla_attn_target(**target_arguments(a, lse))
        assert target[:10].isfinite().all() and target[10:, 0].isnan().all()

    def test_a_nan_value_stays_at_home_where_more_blocks_follow(self, isa, dtype):
        a = example(6, 530, ([140] * 6, [164, 200, 250, 300, 450, 450]), dtype=dtype)
        clean = ops.mla_attention(**a)
        a["v"][265] = NAN
        out, lse = ops.mla_attention(**a)
        assert all_same_bits((out[:3], lse), (clean[0][:3], clean[1])) and out[3:].isnan().all()

    def test_minus_infinity_is_never_attended_to(self, isa, dtype):
        a = example(3, 270, ([0, 0, 260], [270, 261, 261]), dtype=dtype)
        a["q"][..., 0], a["k"][260, :, 0] = 1.0, -INF
        a["v"][260] = 1e4
        out, lse = ops.mla_attention(**a)
        want = reference.mla_attention(**{n: v.double() if n in ("q", "k", "v") else v for n, v in a.items()})
        assert properties.same_bits(lse[2], torch.full((2,), INF)) and not out[2].any()
        torch.testing.assert_close(out[:2].double(), want[0][:2], rtol=2e-2, atol=2e-2)
        assert torch.equal(ops.mla_attn_target(**target_arguments(a, lse))[:, 260], torch.zeros(3))

    def test_scores_far_from_zero(self, isa, dtype):
        # Without the running maximum these overflow; the third block raises it late.
        a = example(2, 700, ([0, 0], [700, 650]), dtype=dtype)
        a["k"] *= 0.1
        a["k"][600] = a["q"][0] * 30
        out, lse = ops.mla_attention(**a)
        want = reference.mla_attention(**{n: v.double() if n in ("q", "k", "v") else v for n, v in a.items()})
        assert (out.double() - want[0]).norm() / want[0].norm() < (3e-3 if dtype == torch.bfloat16 else 5e-6)
        assert (lse.double() - want[1]).norm() / want[1].norm() < 5e-6

    def test_zeros_of_either_sign_are_one_score(self, isa, dtype):
        a = example(1, 5, ([0], [5]), dtype=dtype)
        a["q"] = torch.zeros_like(a["q"])
        minus = {**a, "q": -a["q"]}
        assert all_same_bits(ops.mla_attention(**a), ops.mla_attention(**minus))

    def test_many_heads_and_long_rows(self, isa, dtype):
        for arguments in (
            example(3, 20, heads=128, dk=17, dv=9, dtype=dtype),
            example(2, 3000, heads=1, dk=576, dv=130, dtype=dtype),
        ):
            assert not (found := complaints(ATTENTION, ops.mla_attention, arguments, dtype)), found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=["bf16", "float32", "float64"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["q", "k", "v", "dout", "dlse"])
def test_gradients_that_are_not_finite_stay_at_home(isa, dtype, name, value):
    # Row r sees the keys from 10 r to 10 r + 30: one segment, two tiles, key blocks that most rows have no part in.
    starts = 10 * torch.arange(71)
    a = example(71, 740, (starts, starts + 30), dtype=dtype)
    draw = RandomDraw(1)
    a |= {
        "dout": draw.tensor(71, 2, 24, dtype=dtype),
        "dlse": draw.tensor(71, 2, dtype=torch.float64 if dtype == torch.float64 else torch.float32),
    }

    def backward():
        lse = ops.mla_attention(*(a[n] for n in ("q", "k", "v", "ks", "ke", "scale")))[1]
        arguments = (a[n] for n in ("dout", "dlse", "q", "k", "v"))
        return torch.ops.glm5.mla_attention_backward(*arguments, lse, a["ks"], a["ke"], a["scale"])

    clean = backward()
    # A row, and the last; a key that three rows see, the first of the second block, the last seen, one that none sees.
    for place in (7, 70) if name in ("q", "dout", "dlse") else (75, 256, 729, 739):
        row_or_key, before = (place, 1, *([3] * (a[name].dim() - 2))), a[name].clone()
        a[name][row_or_key] = value
        with _native.counted_paths() as counts:
            got = backward()
        a[name] = before
        rows = torch.arange(71) == place
        if name in ("k", "v"):
            rows = (a["ks"] <= place) & (place < a["ke"])
        keys = torch.zeros(740, dtype=torch.bool)
        for start in starts[rows]:
            keys[start : start + 30] = True
        for gradient, expected, own in zip(got, clean, (rows, keys, keys), strict=True):
            assert all_same_bits((gradient[~own], gradient[:, 0]), (expected[~own], expected[:, 0]))
        dq, dk, dv = (g[own, 1] for g, own in zip(got, (rows, keys, keys), strict=True))
        if value != value:
            assert dq.isnan().all() and dk.isnan().all()
        if name == "k":
            assert not dq[:, 3].isfinite().any()
        if name == "dout":
            others = torch.arange(24) != 3
            assert not dv[:, 3].isfinite().any()
            assert properties.same_bits(dv[:, others], clean[2][keys, 1][:, others])
        assert bool(counts.get("mla backward with values that are not finite")) == bool(rows.any())


def test_the_lse_takes_a_gradient(isa):
    a = example(90, dtype=torch.float32)
    leaves = {n: a[n].clone().requires_grad_() for n in ("q", "k")}
    wide = {n: a[n].double().requires_grad_() for n in ("q", "k")}
    weights = torch.randn(90, 2, generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad((ops.mla_attention(**{**a, **leaves})[1] * weights).sum(), list(leaves.values()))
    want = torch.autograd.grad(
        (reference.mla_attention(**{**a, **wide, "v": a["v"].double()})[1] * weights).sum(), list(wide.values())
    )
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() / w.norm() < 5e-6


def test_gradcheck():
    for seed in range(3):
        a = example(7, 9, ([0, 0, 2, 5, 4, 3, 0], [9, 1, 6, 5, 9, 9, 4]), dk=3, dv=2, dtype=torch.float64, seed=seed)
        has_keys = a["ks"] < a["ke"]  # the lse of the other row is infinite: no differences can be taken of it

        def attend(q, k, v, a=a, has_keys=has_keys):
            out, lse = ops.mla_attention(q, k, v, a["ks"], a["ke"], a["scale"])
            return out, lse[has_keys]

        torch.autograd.gradcheck(attend, [a[n].requires_grad_() for n in ("q", "k", "v")])


@pytest.mark.parametrize("dtype", ATTENTION.dtypes, ids=["bf16", "float32"])
def test_every_tile_of_the_product_runs(isa, dtype):
    lanes = {"portable": 4, "avx2": 8, "avx512": 16, "amx": 16}[isa]
    with _native.counted_paths() as counts:
        for queries in (6, 5, 3, 20, 40, 60):
            for dv in (4 * lanes, 3 * lanes, 1):
                a = example(queries, 301, dv=dv, dtype=dtype)
                assert not (found := complaints(ATTENTION, ops.mla_attention, a, dtype)), found
        a["v"][-1] = INF
        ops.mla_attention(**a)
    if isa == "amx" and dtype == torch.bfloat16:
        want = {f"mla forward tiles {rows}" for rows in (1, 2, 3, 4)}
        want |= {f"mla tiles {rows}x{columns}" for rows in (1, 2) for columns in (1, 2)}  # of the backward
        want.add("mla tiles with values that are not finite")
    else:
        widths = (1, 2, 4) if isa in ("avx512", "amx") else (1, 2)
        want = {f"mla product {rows}x{width}" for rows in (1, 2, 4, 6) for width in widths}
        if isa == "avx512" and dtype == torch.bfloat16:
            want.add("mla product odd k")
    assert {name for name, count in counts.items() if count and name.startswith("mla")} == want


class TestKeysPackedAhead:
    """A document of more row tiles than one (512 rows on AMX) has its keys packed once, by whichever task comes first."""

    def documents(self, dk=40, dv=24):
        lone = example(3, 9, ([0, 4, 9], [9, 9, 9]), dk=dk, dv=dv, dtype=torch.bfloat16)
        return [example(n, dk=dk, dv=dv, dtype=torch.bfloat16, seed=n) for n in (1100, 70, 600)] + [lone]

    @pytest.fixture
    def packs(self, isa):
        if isa != "amx":
            pytest.skip("AMX packs ahead, the others pack a block at a time")

    def test_bits_do_not_show_it(self, packs):
        documents = self.documents()
        whole = packed(*documents)
        with _native.counted_paths() as counts:
            out, lse = ops.mla_attention(**whole)
        assert counts["mla keys packed ahead"] == 2 * (5 + 3)  # heads, blocks of 256 keys
        start = 0
        for document in documents:
            rows = document["q"].shape[0]
            for begin in range(0, rows, 300):  # pieces of one tile each
                part = {**document, **{n: document[n][begin : begin + 300] for n in ROWS_OF_QUERIES}}
                here = slice(start + begin, start + min(begin + 300, rows))
                with _native.counted_paths() as counts:
                    assert all_same_bits(ops.mla_attention(**part), (out[here], lse[here]))
                assert "mla keys packed ahead" not in counts
            start += rows

    def test_conforms(self, packs):
        for dk, dv in ((40, 24), (64, 32), (33, 130)):
            a = packed(*self.documents(dk, dv))
            assert not (found := complaints(ATTENTION, ops.mla_attention, a, torch.bfloat16)), found

    def test_many_heads_go_in_turns(self, packs):
        # 8 documents of 1024 tokens: 24 MB a head, and 32 MB are packed at a time.
        a = example(1030, heads=5, dk=512, dv=512, dtype=torch.bfloat16)
        many = packed(*[a] * 8)
        out, lse = ops.mla_attention(**a)
        got = ops.mla_attention(**many)
        for start in range(0, 8 * 1030, 1030):
            assert all_same_bits((got[0][start : start + 1030], got[1][start : start + 1030]), (out, lse))

    @pytest.mark.parametrize("poison", [NAN, INF])
    def test_a_key_that_is_not_finite_reaches_only_those_who_see_it(self, packs, poison):
        a = example(1100, dtype=torch.bfloat16)
        out, lse = ops.mla_attention(**a)
        for key in (3, 700, 1099):
            v = a["v"].clone()
            v[key, 1, 5] = poison
            got = ops.mla_attention(**{**a, "v": v})
            assert properties.same_bits(got[1], lse)
            assert not got[0][key:, 1, 5].isfinite().any()
            others = torch.ones_like(out, dtype=torch.bool)
            others[key:, 1, 5] = False
            assert torch.equal(got[0][others], out[others])


def test_opcheck_compile_export():
    a = example(12, 20)
    leaves = {n: a[n].clone().requires_grad_() for n in ("q", "k", "v")}
    properties.assert_opcheck(ATTENTION, tuple({**a, **leaves}.values()))
    lse = ops.mla_attention(**a)[1]
    properties.assert_opcheck(TARGET, (a["q"], a["k"], lse, a["ks"], a["ke"], a["scale"]))
    other = example(17, 33)
    queries, keys = torch.export.Dim("queries"), torch.export.Dim("keys")
    dynamic = {n: {0: queries} for n in ("q", "ks", "ke", "lse")} | {n: {0: keys} for n in ("k", "v")}
    properties.assert_compiles(ATTENTION, a, other)
    properties.assert_exports(ATTENTION, a, dynamic)
    a, other = target_arguments(a, lse), target_arguments(other, ops.mla_attention(**other)[1])
    properties.assert_compiles(TARGET, a, other)
    properties.assert_exports(TARGET, a, dynamic)


def test_autocast():
    a = example(5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.mla_attention(**a)
    narrow = {n: v.bfloat16() if n in ("q", "k", "v") else v for n, v in a.items()}
    assert all_same_bits(got, ops.mla_attention(**narrow))


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"q": [1.0]}, TypeError, "q is list"),
        ({"q": torch.ones(3, 2, 4, dtype=torch.int32)}, ValueError, "q has dtype"),
        ({"k": torch.ones(5, 2, 4, dtype=torch.bfloat16)}, ValueError, "k has dtype"),
        ({"v": torch.ones(5, 2, 4, dtype=torch.bfloat16)}, ValueError, "v has dtype"),
        ({"q": torch.ones(3, 4)}, ValueError, "q has shape"),
        ({"q": torch.ones(3, 0, 4)}, ValueError, "at least one head"),
        ({"q": torch.ones(3, 2, 0)}, ValueError, "non-empty last dimension"),
        ({"k": torch.ones(5, 3, 4)}, ValueError, "the heads of q"),
        ({"k": torch.ones(5, 2, 5)}, ValueError, "the last dimension of q"),
        ({"v": torch.ones(4, 2, 4)}, ValueError, "the keys of k"),
        ({"v": torch.ones(5, 1, 4)}, ValueError, "v has shape"),
        ({"v": torch.ones(5, 2, 0)}, ValueError, "v has shape"),
        ({"ks": torch.zeros(3, dtype=torch.int64)}, ValueError, "ks has dtype"),
        ({"ks": torch.zeros(4, dtype=torch.int32)}, ValueError, "ks has shape"),
        ({"ke": torch.zeros(3, 1, dtype=torch.int32)}, ValueError, "ke has shape"),
        ({"ke": torch.tensor([1, 6, 2], dtype=torch.int32)}, ValueError, r"query 1 has the key range \[0, 6\)"),
        ({"ks": torch.tensor([0, 0, -1], dtype=torch.int32)}, ValueError, r"query 2 has the key range \[-1, 5\)"),
        ({"scale": NAN}, ValueError, "scale is nan"),
    ],
)
def test_bad_input(change, error, words):
    good = {
        "q": torch.ones(3, 2, 4),
        "k": torch.ones(5, 2, 4),
        "v": torch.ones(5, 2, 4),
        "ks": torch.zeros(3, dtype=torch.int32),
        "ke": torch.full((3,), 5, dtype=torch.int32),
        "scale": 1.0,
    }
    ops.mla_attention(**good)
    properties.assert_refused(error, words, ops.mla_attention, **{**good, **change})
    if "v" not in change:
        properties.assert_refused(
            error, words, ops.mla_attn_target, **target_arguments({**good, **change}, torch.zeros(3, 2))
        )


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("lse", torch.zeros(3, 1), "lse has shape"),
        ("lse", torch.zeros(3, 2, dtype=torch.bfloat16), "lse has dtype"),
        ("dlse", torch.zeros(2, 2), "dlse has shape"),
        ("dout", torch.ones(3, 2, 5), "dout has shape"),
        ("dout", torch.ones(3, 2, 4, dtype=torch.bfloat16), "dout has dtype"),
    ],
)
def test_bad_input_of_the_backward(name, value, words):
    good = {"dout": torch.ones(3, 2, 4), "dlse": None, "q": torch.ones(3, 2, 4), "k": torch.ones(5, 2, 4)}
    good |= {"v": torch.ones(5, 2, 4), "lse": torch.zeros(3, 2), "ks": torch.zeros(3, dtype=torch.int32)}
    good |= {"ke": torch.full((3,), 5, dtype=torch.int32), "scale": 1.0}
    torch.ops.glm5.mla_attention_backward(*good.values())
    properties.assert_refused(ValueError, words, torch.ops.glm5.mla_attention_backward, *{**good, name: value}.values())


PAGED = spec("mla_attention_paged")


def paged_arguments(page_size, form, heads=3, **layout):
    layout = latent_layout(page_size, form, **layout)
    dtype = layout.pages.cache.dtype if form != "fp8" else torch.bfloat16
    arguments = {
        "q": RandomDraw(1).tensor(8, heads, layout.dim, dtype=dtype),
        **layout.table,
        "sequence": SEQUENCE,
        "ks": KS,
        "ke": KE,
        "scale": layout.dim**-0.5,
        "d_v": layout.dim - 7,
    }
    return arguments, layout


@pytest.mark.parametrize("dtype", PAGED.dtypes, ids=["bf16", "float32"])
class TestPaged:
    def test_keeps_its_promise(self, isa, dtype):
        given(st.data())(lambda data: properties.assert_keeps_promise(PAGED, data, dtype))()

    def test_thread_count_does_not_matter(self, isa, dtype):
        given(st.data())(lambda data: properties.assert_thread_count_does_not_matter(PAGED, data, dtype))()


@PAGE_SIZES
@pytest.mark.parametrize("form", ["bf16", "float32", "float64", "fp8"])
def test_pages_give_the_bits_of_expanded_rows(isa, form, page_size):
    for heads in (3, 40) if form != "float64" else (3,):
        arguments, layout = paged_arguments(page_size, form, heads=heads)
        got = ops.mla_attention_paged(**arguments)
        for t, s in enumerate(SEQUENCE.tolist()):
            k = layout.rows(s)[:, None].expand(-1, heads, -1)
            q, ks, ke = (arguments[name][t : t + 1] for name in ("q", "ks", "ke"))
            want = ops.mla_attention(q, k, k[..., : arguments["d_v"]], ks, ke, arguments["scale"])
            assert same_bits(got[0][t : t + 1], want[0]) and same_bits(got[1][t : t + 1], want[1]), t
        for seed, count in ((1, 1), (2, 2), (3, 3)):
            with properties.threads(count):
                moved = ops.mla_attention_paged(**elsewhere(arguments, layout, seed))
            assert all(map(same_bits, moved, got))
        order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
        mixed = ops.mla_attention_paged(**{**arguments, **{name: arguments[name][order] for name in PAGED.rows}})
        assert all(same_bits(m, g[order]) for m, g in zip(mixed, got, strict=True))


def test_more_rows_than_are_gathered_at_a_time(isa):
    layout = latent_layout(64, "bf16", dim=8, lengths=(40000, 30000, 50), shared=0)
    q = torch.randn(4, 2, 8).bfloat16()
    sequence, ks = torch.tensor([0, 1, 1, 2], dtype=torch.int32), torch.tensor([0, 0, 29000, 3], dtype=torch.int32)
    ke = torch.tensor([40000, 30000, 29990, 50], dtype=torch.int32)
    got = ops.mla_attention_paged(q, **layout.table, sequence=sequence, ks=ks, ke=ke, scale=0.3, d_v=8)
    for t, s in enumerate(sequence.tolist()):
        k = layout.rows(s)[:, None].expand(-1, 2, -1)
        row = slice(t, t + 1)
        want = ops.mla_attention(q[row], k, k, ks[row], ke[row], 0.3)
        assert same_bits(got[0][row], want[0]) and same_bits(got[1][row], want[1])


def test_paged_opcheck_compile_export():
    for form in ("float32", "fp8"):
        arguments, _ = paged_arguments(16, form)
        properties.assert_opcheck(PAGED, tuple(arguments.values()))
    other = {**arguments, **{name: torch.cat([arguments[name]] * 2) for name in ("q", "sequence", "ks", "ke")}}
    properties.assert_compiles(PAGED, arguments, other)
    dynamic = dict.fromkeys(("q", "sequence", "ks", "ke"), {0: torch.export.Dim("tokens")})
    properties.assert_exports(PAGED, arguments, dynamic)


@pytest.mark.parametrize(
    "change, words",
    [
        *BAD_PAGES,
        ({"q": lambda q: q.half()}, "q has dtype"),
        ({"q": lambda q: q[0]}, "q has shape"),
        ({"ks": lambda ks: ks[1:]}, "ks has shape"),
        ({"ke": lambda ke: ke.float()}, "ke has dtype"),
        ({"d_v": lambda d: 1000}, "d_v is 1000"),
        ({"scale": lambda s: float("nan")}, "scale is nan"),
        ({"ks": lambda ks: ks - 1}, "ks is -1 for query 0"),
        ({"ke": lambda ke: ke + 10**6}, "ke is 1000300 for query 0"),
        (
            {"block_table": lambda b: b.clone().index_fill_(1, torch.tensor(9), 99999)},
            r"block_table\[3, 9\] is 99999, want 0",
        ),
    ],
)
@pytest.mark.parametrize("form", ["bf16", "fp8"])
def test_paged_bad_input(change, words, form):
    arguments = changed(paged_arguments(16, form)[0], change)
    properties.assert_refused(ValueError, f"mla_attention_paged: {words}", ops.mla_attention_paged, **arguments)
