"""The loop: which losses count how much, when the rate changes, what a step leaves behind."""

import types

import pytest
import torch

from glm5.recipes import StageRecipe
from glm5.train import loop
from glm5.train.loop import StageState, TrainingError, total_loss, train_stage
from glm5.train.metrics import MetricsLog
from glm5.train.parameters import indexer_names
from glm5.train.run import build_model, open_run, prepare, run_stages
from glm5.train.schedule import lr_factor
from glm5.train.stages import KINDS, ModelForm, stage_of
from tests.train.test_run import STAGES, small_recipe

ASKED = {"lm": 2.0, "mtp": [1.0, 5.0], "indexer_kl": 0.25}


def losses(**changes):
    named = ASKED | changes
    return {
        n: [torch.tensor(x) for x in v] if isinstance(v, list) else None if v is None else torch.tensor(v)
        for n, v in named.items()
    }


@pytest.mark.parametrize(
    "given, total",
    [
        ({}, 2 + 0.3 * 3 + 0.25),
        ({"indexer_kl": None}, 2 + 0.3 * 3),
        ({"indexer_kl": None, "mtp": []}, 2.0),
        ({"lm": None, "mtp": []}, 0.25),
    ],
)
def test_the_total_is_the_weighted_sum_of_what_was_asked_for(given, total):
    recipe = small_recipe("stages.pretrain.mtp_weight=0.3").stages["pretrain"]
    torch.testing.assert_close(total_loss(losses(**given), recipe), torch.tensor(total))


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
    stage = stage_of(small_recipe("stages.pretrain.steps=6", "stages.pretrain.warmup_steps=2"), "pretrain")
    monkeypatch.setattr(loop, "make_optimizers", lambda model, stage: {"only": (recorder, 0.5)})
    monkeypatch.setattr(loop, "total_loss", lambda *_: torch.ones((), requires_grad=True))
    monkeypatch.setattr(loop, "step_flops", lambda *_: 0.0)
    monkeypatch.setattr(loop, "rate", lambda *_: {})
    model = types.SimpleNamespace(
        losses=lambda *_, **__: losses() | {"expert_load": 0},
        update_router_bias=lambda *_: None,
        named_parameters=lambda: (),
    )
    dataset = types.SimpleNamespace(batch=lambda *arguments: asked.append(arguments))
    log = MetricsLog(tmp_path / "m")
    train_stage(model, "pretrain", stage, dataset, 70, StageState(begin), log, lambda state: None)
    assert recorder.steps == [(step, 0.5 * lr_factor(step, stage.recipe)) for step in range(begin, 6)]
    assert asked == [(step, stage.recipe.packs_per_step, 70) for step in range(begin, 6)]


def one_step(stage, overrides, folder, model=None):
    """The model after one update of the stage called `stage`."""
    recipe = small_recipe(*(f"stages.{stage}.{key}" for key in ("steps=1", "packs_per_step=1", *overrides)))
    prepare(recipe)
    run = open_run(recipe, folder)
    model = model or build_model(recipe)
    dataset = run.train_dataset(stage)
    try:
        train_stage(model, stage, stage_of(recipe, stage), dataset, 0, StageState(), run.metrics, lambda state: None)
    finally:
        run.close()
    return model


@pytest.mark.parametrize("stage", STAGES)
def test_router_biases_move_unless_the_model_is_frozen(stage, tmp_path):
    model = one_step(stage, ["router_bias_rate=0.5"], tmp_path)
    biases = torch.stack([layer.gate.e_score_correction_bias for layer in model.moe_layers()])
    assert set(biases.unique().tolist()) <= ({0.0} if stage == "dsa-warmup" else {-0.5, 0.0, 0.5})
    assert (biases != 0).any() == (stage != "dsa-warmup")


def test_an_update_that_would_touch_what_is_frozen_is_refused(tmp_path, monkeypatch):
    """Nobody can give a frozen parameter a gradient by way of autograd, so it is planted; and so is a greedy optimizer."""
    make_optimizers = loop.make_optimizers

    def leaking(model, stage):
        optimizers = make_optimizers(model, stage)
        model.model.norm.weight.grad = torch.zeros_like(model.model.norm.weight)
        return optimizers

    def greedy(model, stage):
        optimizers = make_optimizers(model, stage)
        optimizers["indexer"][0].parameters["model.norm.weight"] = model.model.norm.weight
        return optimizers

    message = "stage dsa-warmup, step 0: model.norm.weight and 0 other parameters are not the stage's to train"
    for faulty in (leaking, greedy):
        monkeypatch.setattr(loop, "make_optimizers", faulty)
        with pytest.raises(TrainingError, match=message):
            one_step("dsa-warmup", [], tmp_path / faulty.__name__)
    monkeypatch.setattr(loop, "make_optimizers", leaking)
    one_step("dsa-sparse", [], tmp_path / "sparse")  # there the parameter learns


@pytest.mark.parametrize("before", [ModelForm(), ModelForm("sparse")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_asks_for_nothing_that_it_does_not_train(kind, before, tmp_path):
    """What a stage lets learn has a gradient, and nothing else has: of all parameters of the model."""
    model = build_model(small_recipe())
    stage = KINDS[kind](StageRecipe(kind=kind, steps=1), before)
    run = open_run(small_recipe(), tmp_path)
    batch = run.train_dataset("midtrain").batch(0, 2)
    run.close()
    stage.form.give(model)
    total_loss(stage.losses(model, batch), stage.recipe).backward()  # with every parameter asking for a gradient
    indexer = indexer_names(model)
    for parameter, p in model.named_parameters():
        assert (p.grad is not None) == stage.learns(parameter in indexer), parameter


def test_stages_of_one_length_go_through_the_train_text_once(tmp_path, monkeypatch):
    """No pack comes twice, and none holds held-out text."""
    recipe, drawn = small_recipe("stages.pretrain.sequence_length=128"), {}

    def record(model, name, stage, dataset, first_pack, state, metrics, save, validate):
        steps, packs = stage.recipe.steps, stage.recipe.packs_per_step
        drawn[name] = [dataset.batch(step, packs, first_pack).tokens for step in range(steps)]
        state.step = steps
        save(state)

    monkeypatch.setattr("glm5.train.run.train_stage", record)
    monkeypatch.setattr("glm5.train.evaluation.Evaluator.after", lambda self, name: None)
    run = open_run(recipe, tmp_path)
    run_stages(run, build_model(recipe), say=lambda _: None)
    run.close()
    packs = [bytes_of(pack) for name in STAGES[1:] for batch in drawn[name] for pack in batch.split(64)]
    assert len(set(packs)) == len(packs) == 3 * 5 * 2
    train, held_out = (text_of(run.data.domain(name)) for name in ("code", "code/validation"))
    pieces = [piece for pack in packs for piece in pack.split(b"\xff") if len(piece) > 40]
    assert pieces and all(piece in train for piece in pieces)
    assert sum(piece in held_out for piece in pieces) < len(pieces) / 4


def text_of(domain) -> bytes:
    return b"\0".join(bytes_of(torch.from_numpy(domain.tokens(i).astype(int))) for i in range(domain.num_documents))


def bytes_of(pack: torch.Tensor) -> bytes:
    """Text of a pack, with 0xff, which UTF-8 never has, for special tokens."""
    return bytes(min(token, 255) for token in pack.tolist())
