"""Whole runs at a very small size: stages hand over, a killed run ends with the bits of an uninterrupted one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from glm5.cli.main import main
from glm5.eval.longctx import evaluate_as_recipe
from glm5.model import config
from glm5.recipes import RecipeError, load_recipe
from glm5.report import read_metrics
from glm5.train import loop
from glm5.train.checkpoint import CheckpointStore
from glm5.train.loop import TrainingError
from glm5.train.parameters import indexer_names, make_optimizers
from glm5.train.run import build_model, open_run, prepare, run_stages
from glm5.train.stages import stage_of

STAGES = ("pretrain", "midtrain", "dsa-warmup", "dsa-sparse")
SMALL_MODEL = [
    "threads=1",
    *(
        f"model.overrides.{key}"
        for key in (
            "hidden_size=32",
            "num_hidden_layers=2",
            "index_topk=8",
            "moe_intermediate_size=32",
            "intermediate_size=32",
        )
    ),
]
SMALL = [
    *SMALL_MODEL,
    *(
        f"stages.{stage}.{key}"
        for stage in STAGES
        for key in ("steps=5", "sequence_length=64", "packs_per_step=2", "checkpoint_every=2", "validate_every=3")
    ),
    *(f"evaluation.{key}" for key in ("sequence_length=64", "packs=2", "sample_tokens=4")),
]


def small_recipe(*overrides):
    return load_recipe("foundation", [*SMALL, *overrides])


def carry_out(recipe, runs, last=None):
    prepare(recipe)
    run = open_run(recipe, runs)
    try:
        return run_stages(run, build_model(recipe), say=lambda _: None, last=last, long_context=evaluate_as_recipe)
    finally:
        run.close()


def final_state(folder, stages=STAGES):
    """Hashes of the last checkpoint's files, the evaluations, and what metrics say apart from times."""
    store = CheckpointStore(folder / "checkpoints", list(stages), writable=False)
    newest = store.list()[-1]
    manifest, _ = store.load(newest)
    rows = [
        {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s", "flops_per_s", "share_of_peak")}
        for row in read_metrics(folder / "metrics.jsonl")
    ]
    return newest.name, manifest.files, (folder / "evaluation.json").read_text(), rows


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    carry_out(small_recipe(), runs)
    return runs / "foundation"


def test_all_stages_run_and_are_evaluated(uninterrupted):
    name, files, evaluation, rows = final_state(uninterrupted)
    assert name == "dsa-sparse-000005"
    assert set(files) == {f"{n}.safetensors" for n in ("model", "muon", "adamw", "indexer")}
    assert all(label in evaluation for label in ("pretrain/dense", "dsa-warmup/sparse", "dsa-sparse/random", "samples"))
    steps = [row for row in rows if "lr_factor" in row]
    assert [(r["stage"], r["step"]) for r in steps] == [(s, i) for s in STAGES for i in range(1, 6)]
    assert all(("lm" in r) == (r["stage"] != "dsa-warmup") and ("indexer_kl" in r) == ("dsa" in r["stage"]) for r in steps)
    # The frozen model of the warm-up is not validated again and again.
    assert {r["stage"] for r in rows if "validation" in r} == set(STAGES) - {"dsa-warmup"}


def test_the_warm_up_changes_the_indexer_and_nothing_else(uninterrupted):
    store = CheckpointStore(uninterrupted / "checkpoints", list(STAGES), writable=False)
    _, before = store.load(store.path("midtrain", 5))
    _, after = store.load(store.path("dsa-warmup", 5))
    indexer = indexer_names(build_model(small_recipe()))
    for name, tensor in before["model"].items():
        assert torch.equal(tensor, after["model"][name]) == (name not in indexer), name
    assert set(after) == {"model", "indexer"}  # no optimizer state for what is frozen
    assert {name.split("/", 1)[1] for name in after["indexer"]} == indexer


def test_every_parameter_learns_in_one_stage_or_another():
    model = build_model(small_recipe())
    recipe = small_recipe()
    held = {name: [set(o.parameters) for o, _ in make_optimizers(model, stage_of(recipe, name)).values()] for name in STAGES}
    names = {name for name, _ in model.named_parameters()}
    assert set().union(*held["dsa-sparse"]) == names and sum(map(len, held["dsa-sparse"])) == len(names)
    assert set().union(*held["pretrain"]) == names - indexer_names(model)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [1, 4, 5, 6, 11, 19])
def test_killed_in_training_and_resumed_it_ends_with_the_same_bits(uninterrupted, tmp_path, monkeypatch, at):
    """`at` counts updates over all stages; a checkpoint is written every second and at the end of a stage."""
    calls = {"count": 0}
    total_loss = loop.total_loss

    def dying(*arguments):
        calls["count"] += 1
        if calls["count"] == at:
            raise Killed
        return total_loss(*arguments)

    monkeypatch.setattr(loop, "total_loss", dying)
    with pytest.raises(Killed):
        carry_out(small_recipe(), tmp_path)
    monkeypatch.setattr(loop, "total_loss", total_loss)
    carry_out(small_recipe(), tmp_path)
    assert final_state(tmp_path / "foundation") == final_state(uninterrupted)


@pytest.mark.parametrize("stage", STAGES)
def test_killed_in_an_evaluation_and_resumed_it_ends_with_the_same_bits(uninterrupted, tmp_path, monkeypatch, stage):
    from glm5.train.evaluation import Evaluator

    after = Evaluator.after

    def dying(self, name):
        if name == stage:
            raise Killed
        after(self, name)

    monkeypatch.setattr(Evaluator, "after", dying)
    with pytest.raises(Killed):
        carry_out(small_recipe(), tmp_path)
    monkeypatch.setattr(Evaluator, "after", after)
    carry_out(small_recipe(), tmp_path)
    assert final_state(tmp_path / "foundation") == final_state(uninterrupted)


def test_stage_by_stage_equals_all_at_once(uninterrupted, tmp_path):
    for stage in (*STAGES, "pretrain"):  # a stage that is done is not done again
        carry_out(small_recipe(), tmp_path, last=stage)
    assert final_state(tmp_path / "foundation") == final_state(uninterrupted)


def test_a_damaged_checkpoint_costs_steps_but_no_bits(uninterrupted, tmp_path):
    carry_out(small_recipe(), tmp_path, last="dsa-warmup")
    newest = tmp_path / "foundation" / "checkpoints" / "dsa-warmup-000005" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    carry_out(small_recipe(), tmp_path)
    assert final_state(tmp_path / "foundation") == final_state(uninterrupted)


def test_without_its_checkpoints_a_run_begins_anew(uninterrupted, tmp_path):
    folder = tmp_path / "foundation"
    shutil.copytree(uninterrupted, folder)
    shutil.rmtree(folder / "checkpoints")
    evaluation = json.loads((folder / "evaluation.json").read_text())
    evaluation["measured"]["pretrain/dense"]["nats_per_byte"] = 0.0  # as another text or another version would have given
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    carry_out(small_recipe(), tmp_path)
    assert final_state(folder) == final_state(uninterrupted)


def test_another_recipe_does_not_get_into_the_folder(uninterrupted):
    with pytest.raises(RecipeError, match="differs in seed, stages.pretrain.muon_lr.*choose another name"):
        carry_out(small_recipe("seed=5", "stages.pretrain.muon_lr=0.5"), uninterrupted.parent)


def test_a_preset_that_has_changed_is_found_out(uninterrupted, tmp_path, monkeypatch, capsys):
    shutil.copytree(uninterrupted, tmp_path / "foundation")
    theta = {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}  # no shape shows it
    monkeypatch.setitem(config._PRESETS, "tiny", config._PRESETS["tiny"] | theta)
    with pytest.raises(ValueError, match="of another configuration than the recipe's preset has in this version"):
        carry_out(small_recipe(), tmp_path)
    assert main(["generate", "--run", str(tmp_path / "foundation")]) == 1
    assert "of another configuration" in capsys.readouterr().err


def test_two_processes_do_not_share_a_folder(tmp_path):
    run = open_run(small_recipe(), tmp_path)
    with pytest.raises(ValueError, match="in use by another glm5 process"):
        open_run(small_recipe(), tmp_path)
    run.close()
    open_run(small_recipe(), tmp_path).close()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "total_loss", lambda losses, stage: losses["lm"] * float("nan"))
    with pytest.raises(
        TrainingError, match="stage pretrain, step 0: the loss is nan.*lower the learning rates of stages.pretrain"
    ):
        carry_out(small_recipe(), tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_stops_the_run_and_its_checkpoint(tmp_path, monkeypatch, value):
    """In the step before a checkpoint, with a loss that shows nothing."""
    calls, total_loss = {"count": 0}, loop.total_loss

    def spoil(gradient):
        gradient = gradient.clone()
        gradient.view(-1)[-1] = value
        return gradient

    def planted(losses, stage):
        calls["count"] += 1
        if calls["count"] == 4:
            planted.parameter.register_hook(spoil)
        return total_loss(losses, stage)

    recipe = small_recipe()
    prepare(recipe)
    run = open_run(recipe, tmp_path)
    model = build_model(recipe)
    planted.parameter = model.model.layers[1].self_attn.o_proj.weight
    monkeypatch.setattr(loop, "total_loss", planted)
    message = (
        r"stage pretrain, step 3: the gradient is not finite in model.layers.1.self_attn.o_proj.weight and "
        r"0 other parameters.*lower the learning rates of stages.pretrain"
    )
    with pytest.raises(TrainingError, match=message):
        run_stages(run, model, say=lambda _: None)
    run.close()
    assert all(p.isfinite().all() for p in model.parameters())
    assert [checkpoint.name for checkpoint in run.store.list()] == ["pretrain-000002"]


@pytest.mark.slow
def test_kill_9_at_random_moments_ends_with_the_same_bits(uninterrupted, tmp_path):
    """The real thing: processes killed at moments spread over start, training, checkpoint writing and evaluation."""
    script = "import sys; from glm5.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "run", "foundation", *SMALL, "--runs", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    folder, kills = Path(tmp_path) / "foundation", 0
    for attempt in range(40):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and not (folder / "metrics.jsonl").exists():
            time.sleep(0.02)
        try:
            _, error = process.communicate(timeout=(0.1 + 0.17 * (attempt % 9)) * 2 ** (attempt // 9))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, error.decode()
        break
    assert kills >= 3 and process.returncode == 0
    assert final_state(folder) == final_state(uninterrupted)


LONG = ["evaluation.longctx.lengths=[160, 220]", "evaluation.longctx.items=2"]


def test_long_contexts_are_asked_after_every_stage_if_the_recipe_says_so(tmp_path):
    tasks = 'evaluation.longctx.tasks=["niah-single"]'
    results = carry_out(small_recipe(*LONG, tasks), tmp_path)
    forms = {stage: each["attention"] for stage, each in results["longctx"].items()}
    assert forms == {"pretrain": "dense", "midtrain": "dense", "dsa-warmup": "sparse", "dsa-sparse": "sparse"}
    for each in results["longctx"].values():
        assert {length: list(scores) for length, scores in each["scores"].items()} == {
            length: ["niah-single", "average"] for length in ("160", "220")
        }
    assert json.loads((tmp_path / "foundation" / "evaluation.json").read_text())["longctx"] == results["longctx"]


def test_long_contexts_want_somebody_who_asks(tmp_path):
    recipe = small_recipe(*LONG)
    prepare(recipe)
    run = open_run(recipe, tmp_path)
    with pytest.raises(ValueError, match="evaluation.longctx.lengths"):
        run_stages(run, build_model(recipe), say=lambda _: None)
    run.close()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["evaluation.longctx.lengths=[9000]"], r"evaluation.longctx.lengths\[0\]: 9000 tokens"),
        (["evaluation.longctx.lengths=[60]"], "evaluation.longctx: an item of niah-single|evaluation.longctx: .* needs"),
        ([*LONG, 'evaluation.longctx.tasks=["niah"]'], "evaluation.longctx: no task 'niah'"),
        ([*LONG, "evaluation.longctx.shape.needle=3"], "evaluation.longctx: .*needle"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused_at_the_start(overrides, said):
    with pytest.raises(RecipeError, match=said):
        build_model(small_recipe(*overrides))
