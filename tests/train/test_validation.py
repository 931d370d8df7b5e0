"""Held-out measures against their definitions, computed the long way on one batch."""

from functools import partial

import pytest
import torch

from glm5.data import MixedDataset
from glm5.model.selection import last_keys, random_keys, recall, true_topk
from glm5.train import evaluation
from glm5.train.evaluation import Evaluator
from glm5.train.validation import batches, indexer_kl, language_loss, long_rows, selection_recall
from tests.data.folders import text_folder
from tests.model import shapes

TOPK = 4  # rows with more than 16 keys are long


@pytest.fixture(scope="module")
def model():
    return shapes.model(vocab_size=320, index_topk=TOPK)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    texts = [bytes(torch.randint(32, 127, (n,), generator=generator).tolist()) for n in (50, 9, 33, 120, 2)]
    return packs_of(texts, 40, tmp_path_factory.mktemp("data") / "data")


def packs_of(texts, sequence_length, folder):
    return MixedDataset(text_folder(folder, code=texts), {"code": 1.0}, sequence_length, seed=0)


def test_nats_per_byte_is_the_cost_of_all_targets_over_the_bytes(model, dataset):
    measured = language_loss(model, "dense", batches(dataset, 100, 2))
    whole = dataset.collate(range(dataset.num_packs(100)))
    nats = -model.target_logprobs(whole).detach().double()
    assert whole.num_bytes() == 50 + 9 + 33 + 120 + 2 < int((whole.targets >= 0).sum())  # <sop> and end-of-text cost too
    assert measured["nats_per_byte"] == pytest.approx(float(nats.sum()) / whole.num_bytes())
    counted = (whole.ke - whole.ks > 16) & (whole.targets >= 0)
    assert measured["long_rows"] == pytest.approx(float(nats[counted].mean()))
    assert torch.equal(long_rows(whole, TOPK), whole.ke - whole.ks > 16)


def test_a_selection_takes_the_place_of_the_indexers(model, dataset):
    own, window = (language_loss(model, "sparse", batches(dataset, 100, 4), s) for s in (None, lambda _: last_keys))
    chosen = language_loss(model, "sparse", batches(dataset, 100, 4), lambda _: lambda selection: selection.indices)
    assert own == chosen and own != window
    assert own != language_loss(model, "dense", batches(dataset, 100, 4)) and model.attention == "dense"


def test_random_keys_do_not_depend_on_how_packs_are_batched(model, dataset):
    alone, together = (language_loss(model, "sparse", batches(dataset, 100, n), partial(random_keys, 0)) for n in (1, 4))
    assert alone == {name: pytest.approx(value, rel=1e-12) for name, value in together.items()}
    for other in (partial(random_keys, 1), lambda _: random_keys(0), lambda _: last_keys):
        assert language_loss(model, "sparse", batches(dataset, 100, 1), other)["long_rows"] != alone["long_rows"]


@pytest.mark.parametrize("depth", [0, 2])
def test_kl_is_a_mean_over_rows_however_they_are_batched(model, dataset, depth):
    packs = dataset.num_packs(100)
    with torch.no_grad():
        whole = float(model.losses(dataset.collate(range(packs)), mtp_depth=depth, indexer="warmup")["indexer_kl"])
    for size in (packs, packs - 1, 1):
        assert indexer_kl(model, batches(dataset, packs, size), "warmup", depth) == pytest.approx(whole, rel=1e-5)


def test_recall_is_over_long_rows_and_all_layers(model, dataset):
    measured = selection_recall(model, "sparse", batches(dataset, 100, 1))
    found = {"indexer": [], "window": []}
    model.attention = "sparse"
    for pack in range(dataset.num_packs(100)):
        b = dataset.collate([pack])
        with torch.no_grad():
            _, seen = model.hidden_states(b.tokens, b.positions, b.ks, b.ke, collect_indexer=True)
            for s in seen:
                for name, indices in (("indexer", s.indices), ("window", last_keys(s))):
                    found[name].append(recall(indices, true_topk(s))[b.ke - b.ks > 16])
    model.attention = "dense"
    assert measured == {name: pytest.approx(float(torch.cat(v).mean())) for name, v in found.items()}


def test_without_long_rows_there_is_no_recall(model, tmp_path):
    short = packs_of([b"abcdefgh"], 12, tmp_path / "data")
    assert selection_recall(model, "dense", batches(short, 1, 1)) == {"indexer": None, "window": None}
    assert language_loss(model, "dense", batches(short, 1, 1))["long_rows"] is None


def test_evaluation_reads_held_out_text_in_the_form_of_the_stage(tmp_path, monkeypatch):
    from glm5.train.run import build_model, open_run
    from tests.train.test_run import small_recipe

    recipe = small_recipe()
    run, model, asked = open_run(recipe, tmp_path), build_model(recipe), []

    def record(model, attention, held_out, select=None):
        asked.append((attention, next(held_out).tokens))
        return {"nats_per_byte": 1.0}

    monkeypatch.setattr(evaluation, "language_loss", record)
    for form in ("dense", "sparse"):
        model.attention = form
        Evaluator(run, model).validation_loss()
    held_out = run.held_out("code", recipe.evaluation.sequence_length)
    run.close()
    assert [form for form, _ in asked] == ["dense", "sparse"]
    assert all(torch.equal(tokens[:64], held_out.collate([0]).tokens) for _, tokens in asked)
