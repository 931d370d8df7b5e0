"""Top-k selection: exactly the reference's choice whatever the values, on every instruction set."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm5 import _native, ops, reference
from glm5.testing import check, spec
from tests.ops import properties

SPEC = spec("topk_indices")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=["bf16", "f32", "f64"])
INF, NAN = float("inf"), float("nan")


def test_passes_the_conformance_kit(isa):
    check("topk_indices", examples=60).raise_if_failed()


@DTYPES
def test_chooses_what_the_reference_chooses(isa, dtype):
    def chooses(data):
        source = properties.HypothesisDraw(data)
        arguments = source.choice([SPEC.draw, SPEC.ties, SPEC.special])(source, dtype)
        assert torch.equal(ops.topk_indices(**arguments), reference.topk_indices(**arguments))

    given(st.data())(chooses)()


def test_thread_count_does_not_matter(isa):
    given(st.data())(lambda data: properties.assert_thread_count_does_not_matter(SPEC, data, torch.float32))()


@pytest.mark.parametrize(
    "scores, k, chosen",
    [
        ([3.0, 1.0, 2.0], 2, [0, 2]),
        ([1.0, 1.0, 1.0, 1.0], 2, [0, 1]),
        ([0.0, -0.0, 0.0], 2, [0, 1]),
        ([-0.0, 0.0, -1.0], 1, [0]),
        ([NAN, 1.0, -INF, 2.0], 4, [1, 3, -1, -1]),
        ([NAN, -NAN, -INF], 2, [-1, -1]),
        ([INF, 1.0, INF, INF], 2, [0, 2]),
        ([-3.4028234663852886e38, -INF], 2, [0, -1]),
        ([1e-45, 0.0, -1e-45], 1, [0]),
        ([5.0], 0, []),
        ([], 3, [-1, -1, -1]),
    ],
)
def test_pinned_choices(isa, scores, k, chosen):
    got = ops.topk_indices(torch.tensor([scores]), k)
    assert got.dtype == torch.int32 and got.tolist() == [chosen]


def test_ranges(isa):
    scores = torch.arange(10.0).expand(5, 10)
    ks, ke = (torch.tensor(t, dtype=torch.int32) for t in ([0, 3, 5, 10, 7], [10, 6, 5, 10, 2]))
    want = [[6, 7, 8, 9], [3, 4, 5, -1], [-1] * 4, [-1] * 4, [-1] * 4]
    assert ops.topk_indices(scores, 4, ks, ke).tolist() == want


def adversarial_rows(n, k):
    """Rows made to mislead the sampled threshold, by name."""
    generator = torch.Generator().manual_seed(0)
    sampled = torch.zeros(n, dtype=torch.bool)
    for run in range(64):
        sampled[(n - 16) * run // 63 :][:16] = True
    noise = torch.randn(n, generator=generator)
    yield "the sample holds the largest", torch.where(sampled, noise + 10, noise)
    yield "the sample holds the smallest", torch.where(sampled, noise - 10, noise)
    again = sampled.clone()
    for run in range(64):
        again[(n - 16) * (2 * run + 1) // 128 :][:16] = True
    yield "both samples hold the largest", torch.where(again, noise + 10, noise)
    yield "the sample is all NaN", noise.masked_fill(sampled, NAN)
    yield "only the sample is valid", noise.masked_fill(~sampled, -INF)
    yield "k-th value shared by many", torch.where(noise > 2, noise, 0.0)
    yield "more than k above a shared value", torch.where(torch.arange(n) % 3 == 0, noise.abs() + 1, -0.0)
    yield "shared, -0.0 and 0.0", torch.where(torch.arange(n) % 2 == 0, 0.0, -0.0)
    yield "two values", (noise > 1).float()
    yield "huge and tiny", noise * torch.exp(20 * torch.randn(n, generator=generator))
    yield "infinities", torch.where(noise > 0, INF, -INF)
    yield "one outlier", torch.where(torch.arange(n) == n // 2, 3e38, noise * 1e-30)
    yield "exactly k valid", torch.where(torch.arange(n) < k, noise, -INF)
    yield "ascending", noise.sort().values
    yield "descending", noise.sort(descending=True).values


@pytest.mark.parametrize("n, k", [(4096, 64), (4097, 2048), (20000, 2048), (33333, 1)])
def test_rows_that_mislead_the_sample(isa, n, k):
    names, rows = zip(*adversarial_rows(n, k), strict=True)
    scores = torch.stack(rows)
    got, want = ops.topk_indices(scores, k), reference.topk_indices(scores, k)
    assert [name for name, g, w in zip(names, got, want, strict=True) if not torch.equal(g, w)] == []


def test_every_path_runs(isa):
    with _native.counted_paths() as paths:
        for _, row in adversarial_rows(20000, 2048):
            ops.topk_indices(row[None], 2048)
    for name in (
        "sampled threshold", "misleading sample", "both samples misleading", "every value a candidate",
        "k-th value shared by many",
    ):  # fmt: skip
        assert paths.get(f"topk_indices: {name}", 0) > 0, paths


def test_nothing_is_written_beyond_a_row(isa):
    """Rows side by side: a vector store must not spill into the next row, whoever computes it."""
    scores = torch.randn(50, 5000)
    for k in (1, 15, 16, 17, 33, 2048):
        want = reference.topk_indices(scores, k)
        for threads in (1, 3):
            with properties.threads(threads):
                assert torch.equal(ops.topk_indices(scores, k), want)


def test_opcheck_compile_export():
    scores, ks, ke = torch.randn(4, 50), torch.zeros(4, dtype=torch.int32), torch.full((4,), 40, dtype=torch.int32)
    properties.assert_opcheck(SPEC, (scores, 8, ks, ke))
    properties.assert_compiles(
        SPEC,
        {"scores": scores, "k": 8, "ks": ks, "ke": ke},
        {"scores": torch.randn(7, 60), "k": 8, "ks": torch.zeros(7, dtype=torch.int32), "ke": torch.ones(7).int()},
    )
    rows = torch.export.Dim("rows")
    properties.assert_exports(
        SPEC,
        {"scores": scores, "k": 8, "ks": ks, "ke": ke},
        {"scores": {0: rows, 1: torch.export.Dim("cols")}, "ks": {0: rows}, "ke": {0: rows}},
    )


ROW = torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((torch.ones(2, 3), -1), ValueError, "k is -1"),
        ((torch.ones(3), 1), ValueError, "scores has shape"),
        ((torch.ones(2, 3, dtype=torch.int32), 1), ValueError, "scores has dtype"),
        ((torch.ones(2, 3), 1, ROW.long(), ROW), ValueError, "ks has dtype"),
        ((torch.ones(3, 3), 1, ROW, ROW), ValueError, "ks has shape"),
        ((torch.ones(2, 3), 1, ROW - 1, ROW), ValueError, "ks is -1 in row 0"),
        ((torch.ones(2, 3), 1, ROW, ROW + 4), ValueError, "ke is 4 in row 0"),
        (([1.0], 1), TypeError, "scores is list"),
    ],
)
def test_bad_input(arguments, error, words):
    properties.assert_refused(error, words, ops.topk_indices, *arguments)
