"""Sparse MLA: against float64, row by row and list by list, on every instruction set."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm5 import _native, ops, reference
from glm5.testing import RandomDraw, relative_error, spec
from glm5.testing.judges import complaints
from glm5.testing.sparse_mla import draw_indices
from tests.ops import properties
from tests.ops.paged import BAD_PAGES, PAGE_SIZES, SEQUENCE, changed, elsewhere, latent_layout
from tests.ops.properties import same_bits

SPARSE_MLA, TARGET = spec("sparse_mla"), spec("sparse_mla_attn_target")
OPS = pytest.mark.parametrize("op", [SPARSE_MLA, TARGET], ids=lambda op: op.name)
DTYPES = pytest.mark.parametrize("dtype", SPARSE_MLA.dtypes, ids=["bf16", "float32"])
INF = float("inf")


def example(queries=5, keys=150, heads=6, dim=64, d_v=48, topk=130, dtype=torch.float32, seed=0, valid=None):
    """Arguments of sparse_mla with lists of `valid` (default topk) distinct ascending rows."""
    draw = RandomDraw(seed)
    generator = torch.Generator().manual_seed(seed)
    indices = torch.full((queries, topk), -1, dtype=torch.int32)
    count = min(topk if valid is None else valid, keys)
    for row in indices:
        row[:count] = torch.randperm(keys, generator=generator)[:count].sort().values
    return {
        "q": draw.tensor(queries, heads, dim, dtype=dtype),
        "kv": draw.tensor(keys, dim, dtype=dtype),
        "indices": indices,
        "scale": dim**-0.5,
        "d_v": d_v,
    }


def target_arguments(arguments):
    """The same as arguments of sparse_mla_attn_target."""
    lse = ops.sparse_mla(**arguments)[1]
    return {**{k: v for k, v in arguments.items() if k != "d_v"}, "lse": lse}


def everything(arguments):
    """out, lse, dq, dkv and target of one set of arguments."""
    return [*properties.run_with_gradients(SPARSE_MLA, arguments), ops.sparse_mla_attn_target(**target_arguments(arguments))]


@OPS
@DTYPES
class TestEveryOp:
    def test_keeps_its_promise(self, isa, op, dtype):
        given(st.data())(lambda data: properties.assert_keeps_promise(op, data, dtype))()

    def test_thread_count_does_not_matter(self, isa, op, dtype):
        given(st.data())(lambda data: properties.assert_thread_count_does_not_matter(op, data, dtype))()


@DTYPES
class TestRowInvariance:
    def test_a_row_depends_on_itself_alone(self, isa, dtype):
        for heads in (1, 6, 20, 40, 64):
            arguments = example(queries=9, heads=heads, dtype=dtype)
            out, lse, dq, _, target = everything(arguments)
            order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
            shuffled = {**arguments, "q": arguments["q"][order], "indices": arguments["indices"][order]}
            for whole, part in zip((out, lse, target), (everything(shuffled)[i] for i in (0, 1, 4)), strict=True):
                assert same_bits(whole[order], part)
            for row in range(9):
                alone = {**arguments, "q": arguments["q"][row : row + 1], "indices": arguments["indices"][row : row + 1]}
                got = ops.sparse_mla(**alone)
                assert same_bits(out[row : row + 1], got[0]) and same_bits(lse[row : row + 1], got[1])
                assert same_bits(target[row : row + 1], ops.sparse_mla_attn_target(**target_arguments(alone)))

    def test_minus_one_at_the_end_of_a_list_changes_nothing(self, isa, dtype):
        for topk in (1, 2, 15, 16, 17, 63, 64, 65, 100, 128, 129, 130):
            arguments = example(topk=topk, dtype=dtype, seed=topk)
            narrow = everything(arguments)
            for extra in (1, 2, 31, 64, 200):
                padding = torch.full((5, extra), -1, dtype=torch.int32)
                wide = everything({**arguments, "indices": torch.cat([arguments["indices"], padding], 1)})
                assert all(same_bits(a, b) for a, b in zip(narrow[:4], wide[:4], strict=True)), (topk, extra)
                assert same_bits(narrow[4], wide[4][:, :topk].contiguous()) and not wide[4][:, topk:].any()

    def test_a_document_may_lie_anywhere_in_the_pack(self, isa, dtype):
        arguments = example(dtype=dtype)
        at_0 = everything(arguments)
        for shift in (1, 64, 1000):
            before = torch.full((shift, 64), float("nan"), dtype=dtype)
            moved = {
                **arguments,
                "kv": torch.cat([before, arguments["kv"], before]),
                "indices": arguments["indices"] + shift,
            }
            out, lse, dq, dkv, target = everything(moved)
            for a, b in zip(at_0, (out, lse, dq, dkv[shift : shift + 150].contiguous(), target), strict=True):
                assert same_bits(a, b)
            assert not dkv[:shift].any() and not dkv[shift + 150 :].any()

    def test_strided_inputs(self, isa, dtype):
        arguments = example(dtype=dtype)
        strided = {
            **arguments,
            "q": arguments["q"].transpose(0, 1).contiguous().transpose(0, 1),
            "kv": torch.cat([arguments["kv"]] * 2, 1)[:, :64],
            "indices": arguments["indices"].T.contiguous().T,
        }
        assert all(same_bits(a, b) for a, b in zip(everything(arguments), everything(strided), strict=True))


@DTYPES
class TestEdges:
    @pytest.mark.parametrize(
        "heads, dim, d_v",
        [(1, 2, 1), (3, 17, 5), (4, 96, 64), (16, 576, 512), (20, 33, 32), (40, 108, 69), (64, 576, 512), (128, 40, 33)],
    )
    def test_any_shape(self, isa, dtype, heads, dim, d_v):
        for topk in (1, 70):
            arguments = example(queries=2, keys=90, heads=heads, dim=dim, d_v=d_v, topk=topk, dtype=dtype, seed=heads)
            # With one key the gradient through the softmax is pure cancellation: only dkv and the outputs are judged.
            names = ("kv",) if topk == 1 else ("q", "kv")
            assert not complaints(replace(SPARSE_MLA, differentiable=names), ops.sparse_mla, arguments, dtype)
            arguments = target_arguments(arguments)
            assert not complaints(TARGET, ops.sparse_mla_attn_target, arguments, dtype)

    def test_glm5_shape(self, isa, dtype):
        arguments = example(queries=2, keys=5000, heads=64, dim=576, d_v=512, topk=2048, dtype=dtype)
        assert not complaints(SPARSE_MLA, ops.sparse_mla, arguments, dtype)
        assert not complaints(TARGET, ops.sparse_mla_attn_target, target_arguments(arguments), dtype)

    def test_no_valid_key(self, isa, dtype):
        for arguments in (example(dtype=dtype, valid=0), example(dtype=dtype, topk=0), example(dtype=dtype, keys=0)):
            out, lse, dq, dkv, target = everything(arguments)
            assert not out.any() and (lse == INF).all() and not dq.any() and not dkv.any() and not target.any()
        arguments = example(dtype=dtype)
        arguments["indices"][2] = -1
        out, lse, dq, _, target = everything(arguments)
        assert not out[2].any() and (lse[2] == INF).all() and not dq[2].any() and not target[2].any()
        assert out[1].any() and torch.isfinite(lse[[0, 1, 3, 4]]).all()

    def test_no_query(self, isa, dtype):
        out, lse, dq, dkv, target = everything(example(queries=0, dtype=dtype))
        assert out.shape == (0, 6, 48) and lse.shape == (0, 6) and dq.shape == (0, 6, 64) and target.shape == (0, 130)
        assert not dkv.any()

    def test_any_list_order_and_repeated_keys(self, isa, dtype):
        arguments = example(queries=6, keys=40, dtype=dtype, topk=100)
        generator = torch.Generator().manual_seed(5)
        arguments["indices"] = torch.randint(-1, 40, (6, 100), generator=generator, dtype=torch.int32)
        assert not complaints(SPARSE_MLA, ops.sparse_mla, arguments, dtype)
        assert not complaints(TARGET, ops.sparse_mla_attn_target, target_arguments(arguments), dtype)

    def test_holes_in_a_long_list(self, isa, dtype):
        arguments = example(queries=4, keys=900, dtype=dtype, topk=700)
        holes = torch.rand(4, 700, generator=torch.Generator().manual_seed(2)) < torch.tensor([0.1, 0.5, 0.9, 0.0])[:, None]
        arguments["indices"][holes] = -1
        arguments["indices"][1, 128:300] = -1  # a block with no key at all
        assert not complaints(SPARSE_MLA, ops.sparse_mla, arguments, dtype)
        assert not complaints(TARGET, ops.sparse_mla_attn_target, target_arguments(arguments), dtype)

    @pytest.mark.parametrize("rise", [0.05, 60.0, -60.0])
    def test_a_maximum_that_keeps_rising_from_block_to_block(self, isa, dtype, rise):
        arguments = example(queries=2, keys=2048, dtype=dtype, topk=2048)
        arguments["q"][:, :, 63], arguments["kv"][:, 63] = 8, torch.linspace(0, rise, 2048)
        arguments["kv"][:, 0] = torch.linspace(-3, 3, 2048)  # a value that tells which blocks weighed too much
        arguments["q"][:, :, :63] *= 0.01
        assert not complaints(SPARSE_MLA, ops.sparse_mla, arguments, dtype)

    def test_nan_poisons_exactly_the_rows_that_see_it(self, isa, dtype):
        arguments = example(keys=300, dtype=dtype, topk=70)
        clean = ops.sparse_mla(**arguments)
        clean_target = ops.sparse_mla_attn_target(**target_arguments(arguments))
        row = int(arguments["indices"][1, 69])
        arguments["kv"][row, 50] = float("nan")  # in the score's part of the row, not in the value's
        sees = (arguments["indices"] == row).any(1)
        assert sees.any() and not sees.all()
        out, lse = ops.sparse_mla(**arguments)
        target = ops.sparse_mla_attn_target(**target_arguments(arguments))
        assert lse[sees].isnan().all() and out[sees].isnan().all() and target[sees].isnan().any(1).all()
        for a, b in ((clean[0], out), (clean[1], lse), (clean_target, target)):
            assert same_bits(a[~sees], b[~sees])

    def test_nan_in_one_head_poisons_that_head(self, isa, dtype):
        arguments = example(dtype=dtype)
        clean = ops.sparse_mla(**arguments)
        arguments["q"][3, 2, 0] = float("nan")
        for a, b in zip(clean, ops.sparse_mla(**arguments), strict=True):
            assert b[3, 2].isnan().all()
            b[3, 2] = a[3, 2]
            assert same_bits(a, b)

    def test_scores_of_minus_infinity_carry_no_weight(self, isa, dtype):
        arguments = example(dtype=dtype, topk=70)
        arguments["q"][:, :, 63] = 1
        arguments["kv"][:, 63] = 0
        some = arguments["indices"][0, ::2].long()
        arguments["kv"][some, 63] = -INF
        for got, want in zip(ops.sparse_mla(**arguments), reference.sparse_mla(**arguments), strict=True):
            assert relative_error(got, want.double()) < (6e-3 if dtype == torch.bfloat16 else 5e-6)
        arguments["kv"][:, 63] = -INF
        out, lse = ops.sparse_mla(**arguments)
        assert not out.any() and (lse == INF).all()

    def test_large_scores(self, isa, dtype):
        arguments = example(dtype=dtype)
        arguments["scale"] = 1000.0
        out, lse = ops.sparse_mla(**arguments)
        want_out, want_lse = reference.sparse_mla(**{k: v.double() if k in ("q", "kv") else v for k, v in arguments.items()})
        assert torch.isfinite(out).all() and relative_error(lse, want_lse) < 1e-6
        assert relative_error(out, want_out) < 2e-2  # the scores themselves are good to 1e-3 only

    def test_the_target_sums_to_one(self, isa, dtype):
        target = ops.sparse_mla_attn_target(**target_arguments(example(queries=20, dtype=dtype, valid=100)))
        assert (target >= 0).all() and not target[:, 100:].any()
        torch.testing.assert_close(target.sum(1), torch.ones(20))


def test_the_target_takes_no_gradient():
    arguments = target_arguments(example())
    arguments["q"].requires_grad_()
    assert not ops.sparse_mla_attn_target(**arguments).requires_grad


def test_gradcheck():
    arguments = example(queries=2, keys=9, heads=3, dim=5, d_v=3, topk=7, valid=5, dtype=torch.float64)
    arguments["indices"][0, 1] = -1
    rest = (arguments["indices"], 0.7, 3)
    q, kv = arguments["q"].requires_grad_(), arguments["kv"].requires_grad_()
    torch.autograd.gradcheck(lambda q, kv: ops.sparse_mla(q, kv, *rest), (q, kv))
    torch.autograd.gradcheck(lambda q, kv: ops.sparse_mla(q, kv, *rest)[1], (q, kv))  # through lse alone


def test_opcheck_compile_export():
    arguments = example(queries=4, keys=30, heads=3, dim=16, d_v=8, topk=12)
    leaves = [arguments["q"].clone().requires_grad_(), arguments["kv"].clone().requires_grad_(), arguments["indices"]]
    properties.assert_opcheck(SPARSE_MLA, (*leaves, 0.25, 8))
    properties.assert_opcheck(TARGET, (*leaves[:3], ops.sparse_mla(**arguments)[1], 0.25))
    other = example(queries=7, keys=45, heads=3, dim=16, d_v=8, topk=12)
    tokens, rows = torch.export.Dim("tokens"), torch.export.Dim("rows")
    per_token = {0: tokens}
    dynamic = {"q": per_token, "kv": {0: rows}, "indices": per_token, "lse": per_token}
    properties.assert_compiles(SPARSE_MLA, arguments, other)
    properties.assert_exports(SPARSE_MLA, arguments, dynamic)
    properties.assert_compiles(TARGET, target_arguments(arguments), target_arguments(other))
    properties.assert_exports(TARGET, target_arguments(arguments), dynamic)


def test_backward_opcheck():
    arguments = example(queries=4, keys=30, heads=3, dim=16, d_v=8, topk=12)
    out, lse = ops.sparse_mla(**arguments)
    rest = (arguments["q"], arguments["kv"], arguments["indices"], lse, arguments["scale"])
    for dlse in (None, torch.randn_like(lse)):
        torch.library.opcheck(torch.ops.glm5.sparse_mla_backward.default, (torch.randn_like(out), dlse, *rest))


def test_autocast():
    arguments = example()
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = ops.sparse_mla(**arguments)
    halved = {k: v.bfloat16() if k in ("q", "kv") else v for k, v in arguments.items()}
    for got, want in zip((out, lse), ops.sparse_mla(**halved), strict=True):
        assert same_bits(got, want)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"q": [1.0]}, TypeError, "q is list"),
        ({"q": torch.ones(5, 6, 64, dtype=torch.float16)}, ValueError, "q has dtype"),
        ({"q": torch.ones(5, 384)}, ValueError, "q has shape"),
        ({"q": torch.ones(5, 0, 64)}, ValueError, "at least one head"),
        ({"kv": torch.ones(150, 64, dtype=torch.bfloat16)}, ValueError, "kv has dtype"),
        ({"kv": torch.ones(150, 63)}, ValueError, "kv has shape"),
        ({"indices": torch.zeros(5, 130, dtype=torch.int64)}, ValueError, "indices has dtype"),
        ({"indices": torch.zeros(4, 130, dtype=torch.int32)}, ValueError, "indices has shape"),
        (
            {"indices": torch.full((5, 130), 150, dtype=torch.int32)},
            ValueError,
            r"indices\[0, 0\] is 150, want -1 .* to 149",
        ),
        ({"indices": torch.full((5, 130), -2, dtype=torch.int32)}, ValueError, r"indices\[0, 0\] is -2"),
        ({"kv": torch.ones(0, 64)}, ValueError, "indices"),
        ({"scale": float("nan")}, ValueError, "scale is nan"),
        ({"d_v": 65}, ValueError, "d_v is 65"),
        ({"d_v": 0}, ValueError, "d_v is 0"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {**example(), **change}
    properties.assert_refused(error, words, ops.sparse_mla, **arguments)
    if not {"d_v", "q"} & set(change):
        lse = torch.zeros(5, 6)
        properties.assert_refused(
            error, words, ops.sparse_mla_attn_target, **{k: v for k, v in arguments.items() if k != "d_v"}, lse=lse
        )


def test_bad_lse():
    arguments = target_arguments(example())
    for lse, words in ((torch.zeros(5, 7), "lse has shape"), (torch.zeros(5, 6, dtype=torch.float64), "lse has dtype")):
        properties.assert_refused(ValueError, words, ops.sparse_mla_attn_target, **{**arguments, "lse": lse})


def test_the_last_of_many_indices_is_checked(isa):
    arguments = example(queries=300, keys=150, heads=1, dim=4, d_v=4)
    arguments["indices"][299, 129] = 150
    properties.assert_refused(ValueError, r"indices\[299, 129\] is 150", ops.sparse_mla, **arguments)


def paths(isa):
    """Every microkernel and tail of an instruction set."""
    wide = isa in ("avx512", "amx")
    names = [f"sparse_mla dots {tile}" for tile in (("4x4", "2x8", "1x16") if wide else ("3x4", "2x4", "1x8"))]
    for kind in ("", "narrow ", "masked "):
        names += [f"sparse_mla {kind}weighted {heads}" for heads in ((8, 4, 2, 1) if wide else (4, 2, 1))]
        names += [f"sparse_mla {kind}scatter{keys}" for keys in ("", " 2", " 1")]
    names += ["sparse_mla forward in parts"]
    if isa == "avx512":
        rows = (6, 4, 2, 1)
        names += [f"sparse_mla pairs scores {tile}" for tile in "8x1 6x2 6x3 6x4 2x1 2x2 2x3 2x4".split()]
        names += ["sparse_mla pairs scores of few heads"]
        names += [f"sparse_mla pairs weighted {r}x{v}" for r in rows for v in (4, 2)]
        names += [f"sparse_mla pairs scatter {r}" for r in (6, 2, 1)]
    if isa == "amx":
        names += [f"sparse_mla tiles backward scatter {r}x2" for r in (2, 1)]
        names += [f"sparse_mla tiles scores 2x{c}" for c in (2, 1)]
        names += [f"sparse_mla tiles forward scores {tile}" for tile in ("4x1", "2x2", "1x3", "1x4")]
        names += [f"sparse_mla tiles forward weighted {r}x2" for r in (2, 1)] + ["sparse_mla tiles forward rescale"]
    return names


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@DTYPES
@pytest.mark.parametrize("heads", [1, 8, 13, 64])
def test_one_row_has_the_bits_of_a_row_of_many(isa, dtype, heads):
    """One row is cut over threads by segments of its list and groups of heads; 64 rows are not."""
    arguments = example(queries=64, keys=900, heads=heads, topk=800, dtype=dtype)
    holes = torch.rand(64, 800, generator=torch.Generator().manual_seed(2)) < 0.2
    arguments["indices"][holes] = -1
    arguments["indices"][0, 256:520] = -1  # a segment with no key, and some of the next
    arguments["indices"][1, :300] = -1  # no key in the first
    for count in (1, 2, 3):
        with threads(count):
            many = ops.sparse_mla(**arguments)
            for rows in (slice(0, 1), slice(1, 2), slice(0, 5)):
                few = {**arguments, "q": arguments["q"][rows], "indices": arguments["indices"][rows]}
                assert all(same_bits(a[rows], b) for a, b in zip(many, ops.sparse_mla(**few), strict=True)), (count, rows)
    assert not complaints(replace(SPARSE_MLA, differentiable=()), ops.sparse_mla, arguments, dtype)


def test_every_tile_runs(isa):
    """Shapes that reach every tile and tail of this instruction set's kernels; the tests above judge their numbers."""
    with _native.counted_paths() as counts:
        for dtype in (torch.bfloat16, torch.float32):
            for heads in (1, 3, 6, 7, 20, 40, 64):
                everything(example(heads=heads, dim=108, d_v=69, dtype=dtype))
            everything(example(heads=3, dim=140, d_v=130, dtype=dtype))
            everything(example(valid=11, dtype=dtype))
            rising = example(keys=300, topk=300, dtype=dtype)
            rising["kv"] *= torch.linspace(0, 100, 300, dtype=dtype)[:, None]
            everything(rising)
            with threads(2):
                everything(example(queries=1, heads=64, dtype=dtype))
    assert not (missing := [name for name in paths(isa) if not counts.get(name)]), f"{missing} of {sorted(counts)}"


def test_backward_names_a_dout_of_the_wrong_width():
    q, kv, indices = torch.ones(2, 1, 4), torch.ones(3, 4), torch.zeros(2, 1, dtype=torch.int32)
    for width in (0, 5):
        properties.assert_refused(
            ValueError,
            "dout has shape",
            torch.ops.glm5.sparse_mla_backward,
            torch.ones(2, 1, width),
            None,
            q,
            kv,
            indices,
            torch.zeros(2, 1),
            1.0,
        )


PAGED = spec("sparse_mla_paged")
FORMS = pytest.mark.parametrize("form", ["bf16", "float32", "float64", "fp8"])


def paged_arguments(page_size, form, heads=6, topk=40, **layout):
    """Eight queries of ``SEQUENCE`` with lists of up to topk positions, holes among them."""
    layout = latent_layout(page_size, form, **layout)
    dtype = layout.pages.cache.dtype if form != "fp8" else torch.bfloat16
    draw, lists = RandomDraw(1), []
    for s in SEQUENCE.tolist():
        lists.append(draw_indices(draw, 1, layout.pages.lengths[s], topk))
    arguments = {
        "q": draw.tensor(8, heads, layout.dim, dtype=dtype),
        **layout.table,
        "sequence": SEQUENCE,
        "indices": torch.cat(lists),
        "scale": layout.dim**-0.5,
        "d_v": layout.dim - 7,
    }
    return arguments, layout


@DTYPES
class TestPaged:
    def test_keeps_its_promise(self, isa, dtype):
        given(st.data())(lambda data: properties.assert_keeps_promise(PAGED, data, dtype))()

    def test_thread_count_does_not_matter(self, isa, dtype):
        given(st.data())(lambda data: properties.assert_thread_count_does_not_matter(PAGED, data, dtype))()


@PAGE_SIZES
@FORMS
def test_pages_give_the_bits_of_rows_in_a_row(isa, form, page_size):
    for heads, topk in ((6, 130), (64, 70)) if form != "float64" else ((6, 130),):
        arguments, layout = paged_arguments(page_size, form, heads=heads, topk=topk)
        got = ops.sparse_mla_paged(**arguments)
        rest = arguments["scale"], arguments["d_v"]
        for t, s in enumerate(SEQUENCE.tolist()):
            row = slice(t, t + 1)
            want = ops.sparse_mla(arguments["q"][row], layout.rows(s), arguments["indices"][row], *rest)
            assert same_bits(got[0][row], want[0]) and same_bits(got[1][row], want[1]), t
        for seed, count in ((1, 1), (2, 2), (3, 3)):
            with threads(count):
                moved = ops.sparse_mla_paged(**elsewhere(arguments, layout, seed))
            assert all(map(same_bits, moved, got))
        order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
        mixed = ops.sparse_mla_paged(**{**arguments, **{name: arguments[name][order] for name in PAGED.rows}})
        assert all(same_bits(m, g[order]) for m, g in zip(mixed, got, strict=True))


def test_fp8_rows_of_many_queries_are_read_in_chunks(isa):
    """More rows than are read at a time."""
    layout = latent_layout(16, "fp8", dim=576, lengths=(900,))
    q = torch.randn(20, 2, 576).bfloat16()
    indices = torch.stack([torch.randperm(900)[:850].sort().values for _ in range(20)]).int()
    indices[3, 5:9] = indices[7, 400:] = -1
    got = ops.sparse_mla_paged(
        q, **layout.table, sequence=torch.zeros(20, dtype=torch.int32), indices=indices, scale=0.05, d_v=512
    )
    assert all(map(same_bits, got, ops.sparse_mla(q, layout.rows(0), indices, 0.05, 512)))


@pytest.mark.parametrize("heads", [1, 4, 16, 20, 36, 64, 128])
def test_heads_of_one_row_may_be_tasks(isa, heads):
    """One row in bf16 is cut over threads by heads."""
    arguments = example(queries=1, keys=900, heads=heads, topk=800, dtype=torch.bfloat16)
    one = ops.sparse_mla(**arguments)
    cut = heads >= 64 or heads in (20, 36) and isa == "amx"  # four heads left over are summed in another way without tiles
    with _native.counted_paths() as counts:
        for count in (2, 3, 8):
            with threads(count):
                assert all(map(same_bits, one, ops.sparse_mla(**arguments))), count
    assert bool(counts.get("sparse_mla heads as tasks")) == (cut and isa in ("avx512", "amx"))


def test_paged_opcheck_compile_export():
    for form in ("float32", "fp8"):
        arguments, _ = paged_arguments(16, form)
        properties.assert_opcheck(PAGED, tuple(arguments.values()))
    other = {**arguments, **{name: torch.cat([arguments[name]] * 2) for name in ("q", "sequence", "indices")}}
    properties.assert_compiles(PAGED, arguments, other)
    dynamic = dict.fromkeys(("q", "sequence", "indices"), {0: torch.export.Dim("tokens")})
    properties.assert_exports(PAGED, arguments, dynamic)


@pytest.mark.parametrize(
    "change, words",
    [
        *BAD_PAGES,
        ({"q": lambda q: q.half()}, "q has dtype"),
        ({"q": lambda q: q.double()}, ".* has dtype"),
        ({"q": lambda q: q[0]}, "q has shape"),
        ({"indices": lambda i: i.long()}, "indices has dtype"),
        ({"indices": lambda i: i[1:]}, "indices has shape"),
        ({"d_v": lambda d: 0}, "d_v is 0"),
        ({"d_v": lambda d: 1000}, "d_v is 1000"),
        ({"scale": lambda s: INF}, "scale is inf"),
        ({"indices": lambda i: i.clone().index_fill_(0, torch.tensor(2), -2)}, r"indices\[2, 0\] is -2, want -1 .* 0 to"),
        ({"indices": lambda i: i.clone().index_fill_(0, torch.tensor(2), 10**6)}, r"indices\[2, 0\] is 1000000, want"),
        ({"block_table": lambda b: b.clone().fill_(99999)}, r"block_table\[\d, \d+\] is 99999, want 0 to"),
    ],
)
@pytest.mark.parametrize("form", ["bf16", "fp8"])
def test_paged_bad_input(change, words, form):
    arguments = changed(paged_arguments(16, form)[0], change)
    properties.assert_refused(ValueError, f"sparse_mla_paged: {words}", ops.sparse_mla_paged, **arguments)
