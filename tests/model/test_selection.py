"""Selections other than the indexer's, and how they are judged."""

import pytest
import torch

from glm5.model import selection
from glm5.model.attention import Selection
from tests.model import shapes
from tests.ops.properties import same_bits


def observed(model, batch):
    return model.hidden_states(batch["tokens"], batch["positions"], batch["ks"], batch["ke"], collect_indexer=True)


def batch():
    return shapes.pack(shapes.random_tokens(50), shapes.random_tokens(31, seed=1))


@torch.no_grad()
def test_every_selection_lies_in_its_range_and_is_ascending():
    b = batch()
    for form in shapes.FORMS:
        _, seen = observed(shapes.model(form), b)
        assert len(seen) == 3
        for s in seen:
            for indices in (s.indices, selection.last_keys(s), selection.random_keys(1)(s), selection.true_topk(s)):
                assert indices.dtype == torch.int32 and indices.shape == (81, 16)
                held = indices >= 0
                assert ((indices >= b["ks"][:, None]) & (indices < b["ke"][:, None]) | ~held).all()
                assert torch.equal(held.sum(1), (b["ke"] - b["ks"]).clamp(max=16))
                assert (indices.diff(dim=1)[held[:, 1:]] > 0).all() and (held[:, :-1] | ~held[:, 1:]).all()


@torch.no_grad()
def test_target_is_a_distribution_and_its_topk_catches_most():
    _, seen = observed(shapes.model(), batch())
    for s in seen:
        torch.testing.assert_close(s.attention_target().sum(1), torch.ones(81))
        best = selection.attention_mass(s, selection.true_topk(s))
        for other in (s.indices, selection.last_keys(s), selection.random_keys(0)(s)):
            assert (selection.attention_mass(s, other) <= best + 1e-6).all()


def plain_selection(ks, ke, topk=16, layer=0) -> Selection:
    return Selection(layer, None, torch.tensor(ks, dtype=torch.int32), torch.tensor(ke, dtype=torch.int32), topk, None)


def test_random_keys_are_a_function_of_seed_layer_and_row():
    rows, topk = 2500, 13
    ks = [t // 70 * 70 for t in range(rows)]
    whole = selection.random_keys(5)(plain_selection(ks, range(1, rows + 1), topk))
    for first in (1, 999, 2300):
        cut = plain_selection(ks[first:], range(first + 1, rows + 1), topk)
        assert torch.equal(selection.random_keys(5, first)(cut), whole[first:])
        assert not torch.equal(selection.random_keys(5)(cut), whole[first:])
    # Where a range lies decides nothing but the offset, and no two of rows, layers and seeds share their draws.
    moved = plain_selection([k + 9 for k in ks], range(10, rows + 10), topk)
    assert torch.equal(selection.random_keys(5)(moved), torch.where(whole < 0, -1, whole + 9))
    many = [selection.random_keys(s)(plain_selection([0] * 300, [64] * 300, topk, n)) for s in (0, 1) for n in range(3)]
    assert len({tuple(row) for drawn in many for row in drawn.tolist()}) == 6 * 300


@pytest.mark.parametrize("width, topk", [(5, 3), (64, 16), (17, 16), (16, 16), (3, 16), (0, 4)])
def test_random_keys_are_drawn_evenly(width, topk):
    rows = 20000
    drawn = selection.random_keys(3)(plain_selection([7] * rows, [7 + width] * rows, topk))
    count = torch.bincount(drawn[drawn >= 0].long(), minlength=7 + width)[7:].double()
    share = min(topk / width, 1) if width else 1
    assert (drawn >= 0).sum() == rows * min(topk, width)
    assert ((count / rows - share).abs() <= 5 * (share * (1 - share) / rows) ** 0.5).all()
    if width == 5:  # every subset as often as another
        times = torch.unique(drawn, dim=0, return_counts=True)[1].double()
        assert len(times) == 10 and ((times / rows - 0.1).abs() < 5 * (0.09 / rows) ** 0.5).all()


@torch.no_grad()
def test_an_override_changes_what_sparse_attention_sees():
    model, b = shapes.model("sparse"), batch()
    own, _ = observed(model, b)
    with model.selecting(lambda s: s.indices):
        same, _ = observed(model, b)
    assert same_bits(own, same)
    with model.selecting(selection.last_keys):
        window, _ = observed(model, b)
    # Rows with at most topk keys see all of them either way.
    few = (b["ke"] - b["ks"]) <= 16
    assert same_bits(own[few], window[few]) and not torch.equal(own[~few], window[~few])


def test_recall():
    truth = torch.tensor([[0, 2, 5], [1, -1, -1], [-1, -1, -1]], dtype=torch.int32)
    indices = torch.tensor([[2, 5, 7, -1], [0, 2, -1, -1], [3, -1, -1, -1]], dtype=torch.int32)
    torch.testing.assert_close(selection.recall(indices, truth), torch.tensor([2 / 3, 0.0, 1.0]))
