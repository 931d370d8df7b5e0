"""Selections other than the indexer's, and how they are judged."""

import torch

from glm5.model import selection
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
