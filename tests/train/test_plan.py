"""The plan of a run: counts equal to the model's own, memory and operations by the properties they must have."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5 import Glm5Config, Glm5ForCausalLM
from glm5.recipes import RecipeError, load_recipe, recipe_names
from glm5.train.counts import Keys, active_parameters, parameters, token_flops
from glm5.train.parameters import make_optimizers
from glm5.train.plan import Layout, activations, memory, plan, stage_parameters
from glm5.train.schedule import lr_factor
from glm5.train.stages import stage_of

PRESETS = ("tiny", "small", "glm-5", "glm-5.2")
FORMS = (("dense", "none"), ("dense", "warmup"), ("sparse", "sparse"))
powers = st.integers(0, 3).map(lambda n: 2**n)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "changes", [{}, {"num_nextn_predict_layers": 0}, {"tie_word_embeddings": True, "attention_bias": True}]
)
def test_counts_are_the_models_own(preset, changes):
    config = Glm5Config.preset(preset, **changes)
    model = Glm5ForCausalLM(config, device="meta")
    assert sum(parameters(config).values()) == model.num_parameters()
    assert sum(parameters(config, include_mtp=False).values()) == model.num_parameters(include_mtp=False)
    assert parameters(config).get("indexers", 0) == sum(p.numel() for p in model.indexer_parameters())


def test_glm5_has_the_published_counts():
    config = Glm5Config.preset("glm-5")
    assert sum(parameters(config).values()) == 753_864_139_008
    assert sum(parameters(config, include_mtp=False).values()) == 743_911_218_432
    assert round(active_parameters(config) / 1e9, 2) == 39.88


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["pretrain", "dsa-warmup", "dsa-sparse"])
def test_states_of_one_process_are_what_its_optimizers_hold(dtype, name):
    recipe = load_recipe("foundation", [f"model.dtype={dtype}"])
    stage = stage_of(recipe, name)
    model = Glm5ForCausalLM(Glm5Config.preset("tiny"), dtype=getattr(torch, dtype), seed=0)
    optimizers = [optimizer for optimizer, _ in make_optimizers(model, stage).values()]
    parts = memory(model.config, Layout(), dtype, stage.form.attention, stage.indexer)
    learning = [p for optimizer in optimizers for p in optimizer.parameters.values()]

    assert parts["weights"] == sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert parts["gradients"] == sum(p.numel() * p.element_size() for p in learning)
    saved = sum(t.numel() * t.element_size() for o in optimizers for t in o.state_dict().values())
    masters = parts["masters"] if dtype == "bfloat16" else 0  # Muon's of float32 weights are there but are not saved
    assert masters + parts["momentum"] + parts["moments"] == saved


@given(powers, powers, powers, powers, st.sampled_from(FORMS))
@settings(deadline=None)
def test_more_ranks_hold_less(dp, tp, pp, cp, form):
    config = Glm5Config.preset("glm-5")
    layout = Layout(dp, tp, pp, ep=1, cp=cp)
    wider = Layout(2 * dp, tp, pp, ep=1, cp=cp)
    once, twice = (memory(config, each, "bfloat16", *form) for each in (layout, wider))
    for part in ("masters", "momentum", "moments"):
        assert twice[part] == pytest.approx(once[part] / 2)
    assert twice["weights"] == once["weights"]
    if layout.stage_ranks > 1:
        experts = memory(config, Layout(dp, tp, pp, layout.stage_ranks, cp), "bfloat16", *form)
        assert experts["weights"] < once["weights"]
        # fewer ranks share an expert's states, in the measure in which each holds fewer experts
        assert experts["masters"] == pytest.approx(once["masters"])


@given(st.integers(1, 78), st.sampled_from(PRESETS))
@settings(deadline=None, max_examples=30)
def test_a_pipeline_holds_every_layer_once(pp, preset):
    config = Glm5Config.preset(preset)
    pp = min(pp, config.num_hidden_layers)
    layout = Layout(pp=pp)
    assert [i for stage in layout.layers(config) for i in stage] == list(range(config.num_hidden_layers))
    lengths = [len(stage) for stage in layout.layers(config)]
    assert max(lengths) - min(lengths) <= 1
    held = sum(sum(stage.values()) for stage in stage_parameters(config, layout))
    copied = config.vocab_size * config.hidden_size if pp > 2 else 0  # the MTP block's embedding
    assert held == sum(parameters(config).values()) + copied


@given(st.sampled_from(PRESETS), st.integers(1, 300_000), st.sampled_from(FORMS), st.integers(0, 3))
@settings(deadline=None, max_examples=50)
def test_operations(preset, length, form, depth):
    config = Glm5Config.preset(preset)
    keys = Keys.of_one_document(length, config.index_topk)
    flops = token_flops(config, keys, attention=form[0], indexer=form[1], mtp_depth=depth)
    deeper = token_flops(config, keys, attention=form[0], indexer=form[1], mtp_depth=depth + 1)
    assert all(deeper[part] >= flops[part] for part in flops) and sum(deeper.values()) > sum(flops.values())
    assert keys.selected <= min(keys.visible, config.index_topk)
    assert (keys.selected == keys.visible) == (length <= config.index_topk)
    assert ("indexer" in flops) == (form[1] != "none")
    if form[1] == "none":  # what a token meets, three times two; keys beside it
        plain = token_flops(config, Keys(0, 0), mtp_depth=0)
        routed = 6 * (active_parameters(config) - parameters(config, include_mtp=False).get("indexers", 0))
        assert plain["projections"] + plain["experts"] == pytest.approx(routed, rel=2e-2)
        longer = token_flops(config, Keys(2 * keys.visible, keys.selected), mtp_depth=depth)
        assert longer["dense attention"] == pytest.approx(2 * flops["dense attention"])


def test_keys_are_counted_row_by_row():
    for length, topk in ((1, 3), (3, 3), (4, 3), (50, 7)):
        rows = [min(t + 1, topk) for t in range(length)]
        keys = Keys.of_one_document(length, topk)
        assert keys.selected == pytest.approx(sum(rows) / length) and keys.visible == (length + 1) / 2


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_activations_are_about_what_autograd_keeps(attention):
    recipe = load_recipe("foundation", ["stages.pretrain.packs_per_step=1", "stages.dsa-sparse.packs_per_step=1"])
    stage = stage_of(recipe, "pretrain" if attention == "dense" else "dsa-sparse")
    length = stage.recipe.sequence_length
    model = Glm5ForCausalLM(Glm5Config.preset("tiny"), dtype=torch.bfloat16, seed=0)
    stage.form.give(model)
    make_optimizers(model, stage)
    row = torch.arange(length, dtype=torch.int32)
    batch = {"tokens": row % 256, "targets": row.long() % 256, "positions": row, "ks": torch.zeros_like(row), "ke": row + 1}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = t, storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        losses = stage.losses(model, batch)
    measured = sum(size for _, size in kept.values())
    assert losses["lm"] is not None
    whole, _ = activations(model.config, Layout(), stage, "bfloat16")
    assert 0.6 < whole / measured < 1.6, (whole, measured)


@pytest.mark.parametrize(
    "text, message",
    [
        ("dp=0", "dp is '0', want an integer >= 1"),
        ("dp=two", "dp is 'two'"),
        ("xp=2", "'xp=2' is none of dp=, tp=, pp=, ep=, cp="),
        ("dp=2,dp=3", "'dp=3' is none of .* each at most once"),
        ("dp", "'dp' is none of"),
        ("tp=3", "tp=3 does not divide num_attention_heads, 64"),
        ("ep=3,dp=3", "ep=3 does not divide n_routed_experts, 256"),
        ("ep=8,dp=2", r"ep=8 does not divide dp \* tp \* cp, 2"),
        ("pp=79", "pp=79 is more than num_hidden_layers, 78"),
    ],
)
def test_bad_layouts_are_named(text, message):
    with pytest.raises(RecipeError, match=message):
        plan(load_recipe("glm-5"), Layout.parse(text))


def test_what_leaves_ranks_idle_is_said():
    text = plan(load_recipe("glm-5"), Layout.parse("dp=16,pp=8,cp=7"))
    assert "pp=8 does not divide 78 layers" in text
    assert "dsa-warmup: dp=16 does not divide 14 packs a step: 2 ranks idle" in text
    assert "pretrain: cp * tp = 7 does not divide length 4096" in text
    assert "warning" not in plan(load_recipe("foundation"))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_plan(name):
    recipe = load_recipe(name)
    text = plan(recipe)
    assert all(stage in text for stage in recipe.stages)


def test_a_plan_needs_no_torch():
    code = "import sys; from glm5.recipes import load_recipe as r; from glm5.train.plan import plan; plan(r('glm-5'))"
    subprocess.run([sys.executable, "-c", code + "; assert 'torch' not in sys.modules"], check=True)


def test_the_glm5_recipe_is_the_reports():
    recipe = load_recipe("glm-5")
    tokens = {name: stage.steps * stage.tokens_per_step for name, stage in recipe.stages.items()}
    pretrain = sum(count for name, count in tokens.items() if name.startswith("pretrain"))
    midtrain = sum(count for name, count in tokens.items() if name.startswith("midtrain"))
    assert pretrain == pytest.approx(27e12, rel=1e-3) and midtrain == pytest.approx(1.55e12, rel=1e-3)
    assert tokens["dsa-warmup"] == 2_838_528_000 and tokens["dsa-sparse"] == pytest.approx(20e9, rel=5e-3)

    def rate(name, step):
        stage = recipe.stages[name]
        return stage.muon_lr * lr_factor(step % stage.steps, stage)

    assert rate("pretrain", 2000) == pytest.approx(2e-4, rel=1e-3) and rate("pretrain-code", -1) == pytest.approx(4e-5)
    assert rate("midtrain-32k", 0) == pytest.approx(4e-5, rel=1e-3) and rate("midtrain-200k", -1) == pytest.approx(1e-5)
    names = list(recipe.stages)[:6]  # one curve: no jump where a stage ends
    for before, after in zip(names, names[1:], strict=False):
        assert rate(after, 0) == pytest.approx(rate(before, -1), rel=2e-2), (before, after)


def test_a_span_is_a_part_of_the_curve():
    stage = load_recipe("foundation").stages["pretrain"].model_copy(update={"warmup_steps": 0, "schedule": "cosine"})
    steps = stage.steps
    halves = [stage.model_copy(update={"steps": steps // 2, "schedule_span": span}) for span in ((0.0, 0.5), (0.5, 1.0))]
    whole = [lr_factor(step, stage) for step in range(steps)]
    parts = [lr_factor(step, half) for half in halves for step in range(steps // 2)]
    assert parts == pytest.approx(whole)
    with pytest.raises(RecipeError, match=r"schedule_span is \[0.5, 0.5\], want the second number above the first"):
        load_recipe("foundation", ["stages.pretrain.schedule_span=[0.5, 0.5]"])


def test_a_model_that_the_machine_cannot_hold_is_refused_at_once(tmp_path, capsys):
    from glm5.cli.main import main

    assert main(["run", "glm-5", "--runs", str(tmp_path)]) == 1
    assert "glm-5 needs 9,057 GB for its model and optimizers, this machine has" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main(["run", "foundation", "--layout", "dp=2", "--runs", str(tmp_path)]) == 1
    assert "--layout is for --dry-run" in capsys.readouterr().err
