"""SequencePacker: nothing is lost, nothing overflows, and few packs are used."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm5._runtime import SequencePacker


@st.composite
def problems(draw, max_documents=60):
    budget = draw(st.integers(1, 64))
    return budget, draw(st.lists(st.integers(1, budget), max_size=max_documents))


def first_fit(budget, lengths):
    loads = []
    for length in lengths:
        for i, load in enumerate(loads):
            if load + length <= budget:
                loads[i] += length
                break
        else:
            loads.append(length)
    return len(loads)


def best_fit_decreasing(budget, lengths):
    """The specification, plain and quadratic: document ids by pack."""
    packs, free = [], []
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [i for i in range(len(packs)) if free[i] >= lengths[document]]
        if not fitting:
            packs.append([])
            free.append(budget)
            fitting = [len(packs) - 1]
        best = min(fitting, key=lambda i: free[i])
        packs[best].append(document)
        free[best] -= lengths[document]
    return sorted(sorted(p) for p in packs)


def fewest_packs(budget, lengths):
    """By trying every assignment in which document i opens at most one new pack."""
    best = len(lengths)

    def place(document, loads):
        nonlocal best
        if len(loads) >= best:
            return
        if document == len(lengths):
            best = len(loads)
            return
        for i in range(len(loads)):
            if loads[i] + lengths[document] <= budget:
                place(document + 1, (*loads[:i], loads[i] + lengths[document], *loads[i + 1 :]))
        place(document + 1, (*loads, lengths[document]))

    place(0, ())
    return best


@given(problems())
def test_every_document_lands_once_and_no_pack_overflows(problem):
    budget, lengths = problem
    packs = SequencePacker(budget).pack(np.array(lengths, dtype=np.int64))
    assert sorted(itertools.chain.from_iterable(p.documents.tolist() for p in packs)) == list(range(len(lengths)))
    for pack in packs:
        sizes = [lengths[i] for i in pack.documents]
        assert pack.cu_seqlens.tolist() == [0, *itertools.accumulate(sizes)]
        assert pack.num_tokens == sum(sizes) <= budget


@given(problems())
def test_is_best_fit_decreasing_in_stream_order(problem):
    budget, lengths = problem
    packs = [p.documents.tolist() for p in SequencePacker(budget).pack(np.array(lengths, dtype=np.int64))]
    assert packs == best_fit_decreasing(budget, lengths)


@given(problems())
def test_close_to_first_fit_or_better_and_no_two_packs_could_be_one(problem):
    budget, lengths = problem
    packs = SequencePacker(budget).pack(np.array(lengths, dtype=np.int64))
    assert 9 * len(packs) <= 11 * first_fit(budget, lengths) + 6
    tokens = sorted(p.num_tokens for p in packs)
    assert len(packs) < 2 or tokens[0] + tokens[1] > budget


@given(problems(max_documents=8))
def test_close_to_the_fewest_packs(problem):
    budget, lengths = problem
    packs = SequencePacker(budget).pack(np.array(lengths, dtype=np.int64))
    assert 9 * len(packs) <= 11 * fewest_packs(budget, lengths) + 6


@given(problems())
def test_positions_and_ranges_stay_inside_the_document(problem):
    budget, lengths = problem
    for pack in SequencePacker(budget).pack(np.array(lengths, dtype=np.int64)):
        positions, ks, ke = pack.positions(), pack.ks(), pack.ke()
        assert positions.dtype == ks.dtype == ke.dtype == np.int32
        token = 0
        for start, end in itertools.pairwise(pack.cu_seqlens.tolist()):
            for position in range(end - start):
                assert (positions[token], ks[token], ke[token]) == (position, start, start + position + 1)
                token += 1
        assert token == len(positions) == pack.num_tokens


def test_any_integer_type_any_layout_and_no_documents():
    packer = SequencePacker(10)
    want = [p.documents.tolist() for p in packer.pack(np.array([7, 2, 9, 3], dtype=np.int64))]
    assert want == [[0, 3], [1], [2]]
    strided = np.array([7, 0, 2, 0, 9, 0, 3, 0], dtype=np.int32)[::2]
    for lengths in ([7, 2, 9, 3], strided, np.array([7, 2, 9, 3], dtype=np.uint8)):
        assert [p.documents.tolist() for p in packer.pack(lengths)] == want
    assert packer.pack([]) == []
    assert packer.budget == 10


def test_a_million_documents():
    lengths = np.random.default_rng(0).integers(1, 4096, 1_000_000)
    packs = SequencePacker(4096).pack(lengths)
    assert sum(p.num_tokens for p in packs) == lengths.sum()
    assert len(packs) < 1.003 * lengths.sum() / 4096 + 1


@pytest.mark.parametrize(
    "budget, lengths, error, words",
    [
        (0, [], ValueError, "budget is 0, want 1"),
        (-5, [], ValueError, "budget is -5"),
        (2**31, [], ValueError, "budget is 2147483648"),
        (8, [3, 9], ValueError, r"lengths\[1\] is 9, want 1 to the budget, 8"),
        (8, [0], ValueError, r"lengths\[0\] is 0"),
        (8, [-1], ValueError, r"lengths\[0\] is -1"),
        (8, [1.5], TypeError, "dtype float64, want an integer one"),
        (8, [[1]], ValueError, "2 dimensions, want 1"),
    ],
)
def test_bad_input(budget, lengths, error, words):
    with pytest.raises(error, match=words):
        SequencePacker(budget).pack(lengths)
