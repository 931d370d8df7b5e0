"""The loop: which losses count how much, when the rate changes, what a step leaves behind."""

import types

import pytest
import torch

from glm5.train import loop
from glm5.train.loop import OBJECTIVES, StageState, total_loss, train_stage
from glm5.train.metrics import MetricsLog
from glm5.train.run import build_model, open_run, prepare, run_stages
from glm5.train.schedule import lr_factor
from tests.train.test_run import STAGES, small_recipe


def losses(**changes):
    named = {"lm": 2.0, "mtp": [1.0, 5.0], "indexer_kl": 0.25} | changes
    return {n: [torch.tensor(x) for x in v] if isinstance(v, list) else torch.tensor(v) for n, v in named.items()}


@pytest.mark.parametrize(
    "kind, total", [("pretrain", 2 + 0.3 * 3), ("dsa-warmup", 0.25), ("dsa-sparse", 2 + 0.3 * 3 + 0.25)]
)
def test_the_loss_of_a_stage(kind, total):
    stage = small_recipe("stages.dsa-sparse.mtp_weight=0.3").stages[kind]
    torch.testing.assert_close(total_loss(losses(), stage), torch.tensor(total))
    if kind == "pretrain":
        torch.testing.assert_close(total_loss(losses(mtp=[]), stage), torch.tensor(2.0))


class Recorder:
    """An optimizer that notes when it is asked for what."""

    parameters = {}

    def __init__(self):
        self.steps = []

    def step(self, step, lr):
        self.steps.append((step, lr))

    def zero_grad(self):
        pass

    def state_dict(self):
        return {}

    def load_state_dict(self, tensors):
        pass


@pytest.mark.parametrize("begin", [0, 3])
def test_rates_and_packs_follow_the_step(monkeypatch, tmp_path, begin):
    recorder, asked = Recorder(), []
    stage = small_recipe("stages.pretrain.steps=6", "stages.pretrain.warmup_steps=2").stages["pretrain"]
    monkeypatch.setattr(loop, "make_optimizers", lambda model, stage: {"only": (recorder, 0.5)})
    monkeypatch.setattr(loop, "total_loss", lambda *_: torch.ones((), requires_grad=True))
    model = types.SimpleNamespace(losses=lambda *_, **__: losses() | {"expert_load": 0}, update_router_bias=lambda *_: None)
    dataset = types.SimpleNamespace(batch=lambda *arguments: asked.append(arguments))
    log = MetricsLog(tmp_path / "m")
    train_stage(model, "pretrain", stage, dataset, 70, StageState(begin), log, lambda state: None)
    assert recorder.steps == [(step, 0.5 * lr_factor(step, stage)) for step in range(begin, 6)]
    assert asked == [(step, stage.packs_per_step, 70) for step in range(begin, 6)]


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_router_biases_move_unless_the_model_is_frozen(kind, tmp_path):
    recipe = small_recipe(*(f"stages.{kind}.{key}" for key in ("steps=1", "router_bias_rate=0.5", "packs_per_step=1")))
    prepare(recipe)
    run = open_run(recipe, tmp_path)
    model = build_model(recipe)
    stage = recipe.stages[kind]
    dataset = run.dataset("train", stage.sequence_length)
    train_stage(model, kind, stage, dataset, 0, StageState(), run.metrics, lambda state: None)
    run.close()
    biases = torch.stack([layer.gate.e_score_correction_bias for layer in model.moe_layers()])
    assert set(biases.unique().tolist()) <= ({0.0} if kind == "dsa-warmup" else {-0.5, 0.0, 0.5})
    assert (biases != 0).any() == (kind != "dsa-warmup")


def test_stages_of_one_length_go_through_the_train_text_once(tmp_path, monkeypatch):
    """No pack comes twice, and none holds held-out text."""
    recipe, drawn = small_recipe("stages.pretrain.sequence_length=128"), {}

    def record(model, name, stage, dataset, first_pack, state, metrics, save, validate):
        drawn[name] = [dataset.batch(step, stage.packs_per_step, first_pack).tokens for step in range(stage.steps)]
        state.step = stage.steps
        save(state)

    monkeypatch.setattr("glm5.train.run.train_stage", record)
    monkeypatch.setattr("glm5.train.evaluation.Evaluator.after", lambda self, name: None)
    run = open_run(recipe, tmp_path)
    run_stages(run, build_model(recipe), say=lambda _: None)
    run.close()
    packs = [bytes_of(pack) for name in STAGES[1:] for batch in drawn[name] for pack in batch.split(64)]
    assert len(set(packs)) == len(packs) == 3 * 5 * 2
    train, held_out = b"\0".join(run.corpus.train), b"\0".join(run.corpus.validation)
    pieces = [piece for pack in packs for piece in pack.split(b"\xff") if len(piece) > 40]
    assert pieces and all(piece in train for piece in pieces)
    assert sum(piece in held_out for piece in pieces) < len(pieces) / 4


def bytes_of(pack: torch.Tensor) -> bytes:
    """Text of a pack, with 0xff, which UTF-8 never has, for special tokens."""
    return bytes(min(token, 255) for token in pack.tolist())
