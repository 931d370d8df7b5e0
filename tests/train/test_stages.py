"""Stages: what each makes of the model, what it hands on, and that a kill at any boundary between them costs no bit."""

import re
import typing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from glm5 import Glm5ForCausalLM, ops
from glm5.cli.main import main
from glm5.data import ByteTokenizer
from glm5.model.int4 import quantized_experts
from glm5.model.int4_formats import CompressedTensorsInt4, from_compressed_tensors
from glm5.recipes import Recipe, RecipeError, StageRecipe, load_recipe
from glm5.train import loop
from glm5.train.run import build_model, load_run, open_run
from glm5.train.stages import KINDS, ModelForm, stage_of
from tests.model import shapes
from tests.train.test_run import SMALL_MODEL, Killed, carry_out, final_state, small_recipe

THETA = 2e4  # the preset has 1e6
LADDER_THETAS = {"pretrain": 1e4, "midtrain-1k": 1e6}  # 1.6e7 from midtrain-4k on


def ladder(*overrides) -> Recipe:
    """The recipe ``tiny`` at a very small size: every kind of stage, three updates each, two rungs of mid-training."""
    names, lengths = list(load_recipe("tiny").stages), (32, 64, 128, 128, 128, 128)
    keys = ("steps=3", "packs_per_step=2", "checkpoint_every=2", "validate_every=2")
    small = [f"stages.{name}.{key}" for name in names for key in keys]
    small += [f"stages.{name}.sequence_length={length}" for name, length in zip(names, lengths, strict=True)]
    small += ["evaluation.sequence_length=128", "evaluation.packs=2", "evaluation.sample_tokens=4"]
    return load_recipe("tiny", [*SMALL_MODEL, *small, *overrides])


STAGES = tuple(ladder().stages)


def test_the_schema_knows_the_kinds_that_there_are():
    assert set(typing.get_args(StageRecipe.model_fields["kind"].annotation)) == set(KINDS)


# ---- the form of the model


@given(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=6), st.data())
def test_a_form_is_handed_on_until_a_stage_changes_it(kinds, data):
    """Against a plain account of the rules."""
    stages, want = {}, []
    attention, theta, group = "dense", None, None
    for i, kind in enumerate(kinds):
        extra = {}
        if kind == "midtrain":
            extra["rope_theta"] = data.draw(st.sampled_from([0.0, 1e4, 5e5]))
            theta = extra["rope_theta"] or theta
        elif kind == "sft":
            extra["int4_group_size"] = data.draw(st.sampled_from([0, 32, 64, 128]))
            group = extra["int4_group_size"] or None
        else:
            attention = "sparse" if kind == "dsa-sparse" else "dense"
        stages[f"s{i}"] = dict(kind=kind, steps=1) | extra
        want.append(ModelForm(attention, theta, group))
    recipe = small_recipe().model_copy(update={"stages": {n: StageRecipe(**s) for n, s in stages.items()}})
    assert [stage_of(recipe, name).form for name in stages] == want
    assert [stage_of(recipe, name).before for name in stages] == [ModelForm(), *want[:-1]]


@pytest.mark.parametrize(
    "kind, key, value, owner",
    [("pretrain", "rope_theta", 1e4, "midtrain"), ("dsa-sparse", "int4_group_size", 32, "sft")],
)
def test_a_key_of_another_kind_is_refused(kind, key, value, owner):
    overrides = [f"stages.{kind}.{key}={value}"]
    with pytest.raises(RecipeError, match=f"stages.{kind}: {key} is a key of stages of kind {owner}, not {kind}"):
        small_recipe(*overrides)


def test_a_group_that_does_not_divide_the_experts_is_refused_at_once():
    recipe = small_recipe("stages.sft.steps=1", "stages.sft.int4_group_size=64")
    with pytest.raises(RecipeError, match="stages.sft.int4_group_size is 64, want 32, 64, 128 or -1 .* hidden_size, 32"):
        build_model(recipe)


# ---- rope theta


@pytest.mark.parametrize("form", shapes.FORMS)
def test_a_model_turned_to_a_base_is_the_model_built_with_it(form):
    tokens = shapes.random_tokens(2, 40)
    turned = shapes.model(form)
    plain = turned(tokens).logits
    turned.set_rope_theta(THETA)
    built = shapes.model(form, rope_parameters={"rope_theta": THETA, "rope_type": "default"})
    assert turned.config == built.config and turned.model.config is turned.config
    assert torch.equal(turned(tokens).logits, built(tokens).logits)
    assert not torch.equal(turned(tokens).logits, plain)
    turned.set_rope_theta(shapes.config().rope_theta)
    assert torch.equal(turned(tokens).logits, plain)


@pytest.mark.parametrize("theta", [0, -1.0, None, "big"])
def test_a_base_that_is_none_is_refused(theta):
    model = shapes.model()
    with pytest.raises(ValueError, match="rope_parameters is .* a number > 0 for rope_theta"):
        model.set_rope_theta(theta)
    assert model.config == shapes.config()


def test_the_base_comes_back_from_a_directory(tmp_path):
    model = shapes.model()
    model.set_rope_theta(THETA)
    model.save_pretrained(tmp_path)
    back, tokens = Glm5ForCausalLM.from_pretrained(tmp_path, attention="dense"), shapes.random_tokens(1, 20)
    assert back.config.rope_theta == THETA and torch.equal(back(tokens).logits, model(tokens).logits)


# ---- int4


@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_sees_the_bits_that_are_exported(group_size, dtype):
    """A model whose experts hold the dequantised export has the very logits of the one that fakes them; prepacking keeps
    the codes and scales."""
    changes = dict(hidden_size=64, moe_intermediate_size=128)
    model, plain = (shapes.model("sparse", dtype, **changes) for _ in range(2))
    model.int4_group_size = group_size
    exported = quantized_experts(model, group_size)
    views = dict(plain.named_modules())
    for name, weight in exported.items():
        prefix, k, projection = name.rsplit(".", 2)
        experts, width = views[prefix], plain.config.moe_intermediate_size
        rows = {"gate_proj": slice(0, width), "up_proj": slice(width, None), "down_proj": slice(None)}[projection]
        whole = experts.down_proj if projection == "down_proj" else experts.gate_up_proj
        unpacked = ops.w4a8_unpack(ops.w4a8_prepack(*weight))
        assert all(torch.equal(a, b) for a, b in zip(unpacked[:2], weight[:2], strict=True)) and unpacked[2] is None
        with torch.no_grad():
            whole[int(k), rows] = ops.dequantize_int4(*weight, dtype)
    tokens = shapes.random_tokens(2, 30)
    assert len(exported) == 3 * plain.config.n_routed_experts * len(plain.moe_layers())
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    model.int4_group_size = None
    assert not torch.equal(model(tokens).logits, plain(tokens).logits)


def test_the_gradient_passes_straight_through():
    """It is the gradient at the quantised weights, handed to the weights themselves, and nobody else is quantised."""
    batch = shapes.pack(*(shapes.random_tokens(n, seed=n) for n in (20, 9)))
    model, plain = (shapes.model(hidden_size=64, moe_intermediate_size=64) for _ in range(2))
    with torch.no_grad():
        for layer in plain.moe_layers():
            for p in (layer.experts.gate_up_proj, layer.experts.down_proj):
                p.copy_(ops.fake_quantize_int4(p, 32))
    model.int4_group_size = 32
    for each in (model, plain):
        each.losses(batch, mtp_depth=1)["lm"].backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(p.grad, q.grad)), name


@pytest.mark.parametrize("size", [0, 16, 48, 128, -2])
def test_a_group_size_that_cannot_be_is_refused(size):
    model = shapes.model(hidden_size=64, moe_intermediate_size=64)
    with pytest.raises(ValueError, match=f"int4_group_size is {size}, want 32, 64, 128 or -1 .* hidden_size, 64"):
        model.int4_group_size = size
    assert model.int4_group_size is None


# ---- data


def test_a_stage_that_does_not_say_which_domain_or_says_a_wrong_one_is_refused(tmp_path):
    for overrides, message in [
        (["stages.sft.mix={}"], "stages.sft.mix is missing: tiny has chat, code, say how much of each"),
        (["stages.sft.mix={tchat=1}"], "stages.sft.mix names 'tchat'; .*tiny.* chat, code"),
        (["evaluation.domain=books"], "evaluation.domain: 'books' has no held-out part"),
    ]:
        with pytest.raises(RecipeError, match=message):
            open_run(ladder(*overrides), tmp_path)


def test_sft_learns_what_an_assistant_samples_and_nothing_of_a_wrong_step(tmp_path):
    """Against the conversations themselves, read back from the packs."""
    run = open_run(ladder("stages.sft.mix={chat=1.0}", "stages.sft.sequence_length=2048"), tmp_path)
    batch = run.train_dataset("sft").batch(0, 8, run.first_pack("sft"))
    run.close()
    learnt = torch.cat([torch.tensor([False]), batch.targets[:-1] >= 0])
    assert torch.equal(batch.targets[:-1][learnt[1:]], batch.tokens[1:][learnt[1:]])
    tokenizer = ByteTokenizer()
    texts = []
    for begin in batch.ks.unique().tolist():
        rows = (batch.ks == begin).nonzero().squeeze(1)
        text = "".join(tokenizer.decode([t], skip_special=False) if t > 255 else chr(t) for t in batch.tokens[rows].tolist())
        marks = "".join(("+" if k else "-") * len(tokenizer.decode([t], skip_special=False) if t > 255 else "x")
                        for t, k in zip(batch.tokens[rows].tolist(), learnt[rows].tolist(), strict=True))  # fmt: skip
        texts.append((text, marks))
    wrong_calls = wrong_answers = modes = 0
    for text, marks in texts:
        for user in re.finditer(r"<\|user\|>([^<]+)", text):
            assert "+" not in marks[user.start(1) : user.end(1)]
        for call in re.finditer(r"<tool_call>add<arg_key>a</arg_key><arg_value>\d+</arg_value></tool_call>", text):
            wrong_calls += 1
            assert "+" not in marks[call.start() : call.end()]
        for answer in re.finditer(r"</think>(\d+)<\|user\|>Count again", text):
            wrong_answers += 1
            assert "+" not in marks[answer.start(1) : answer.end(1)]
        for result in re.finditer(r"<tool_response>.*?</tool_response>", text):
            assert "+" not in marks[result.start() : result.end()]
        modes |= 1 if "<|assistant|><think>" in text else 2
    assert wrong_calls > 3 and wrong_answers > 3 and modes == 3
    assert 0.1 < float(learnt.float().mean()) < 0.6


# ---- whole runs


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    carry_out(ladder(), runs)
    return runs / "tiny"


def test_every_stage_trains_and_is_measured(uninterrupted):
    name, files, evaluation, rows = final_state(uninterrupted, STAGES)
    assert name == "sft-000003" and set(files) == {f"{n}.safetensors" for n in ("model", "muon", "adamw", "indexer")}
    assert all(f'"{stage}/' in evaluation for stage in STAGES)
    steps = [(row["stage"], row["step"]) for row in rows if "lr_factor" in row]
    assert steps == [(stage, step) for stage in STAGES for step in (1, 2, 3)]
    model = load_run(uninterrupted)
    assert (model.attention, model.config.rope_theta, model.int4_group_size) == ("sparse", 1.6e7, 32)


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_a_boundary_and_resumed_it_ends_with_the_same_bits(uninterrupted, tmp_path, monkeypatch, stage):
    """In the first update of a stage, when its checkpoint is still the former's; and in its last, before its own."""
    total_loss = loop.total_loss
    for dies_at in (3 * STAGES.index(stage) + 1, 2 if stage == STAGES[0] else 3):
        calls = {"count": 0}

        def dying(*arguments, calls=calls, dies_at=dies_at):
            calls["count"] += 1
            if calls["count"] == dies_at:
                raise Killed
            return total_loss(*arguments)

        monkeypatch.setattr(loop, "total_loss", dying)
        with pytest.raises(Killed):
            carry_out(ladder(), tmp_path)
    monkeypatch.setattr(loop, "total_loss", total_loss)
    carry_out(ladder(), tmp_path)
    assert final_state(tmp_path / "tiny", STAGES) == final_state(uninterrupted, STAGES)


def test_stage_by_stage_equals_all_at_once(uninterrupted, tmp_path):
    for stage in STAGES:
        carry_out(ladder(), tmp_path, last=stage)
        form, model = stage_of(ladder(), stage).form, load_run(tmp_path / "tiny")
        assert (model.attention, model.int4_group_size) == (form.attention, form.int4_group_size)
        assert model.config.rope_theta == LADDER_THETAS.get(stage, 1.6e7)
    assert final_state(tmp_path / "tiny", STAGES) == final_state(uninterrupted, STAGES)


def test_a_run_that_learnt_int4_is_exported_as_it_learnt(uninterrupted, tmp_path, capsys):
    assert main(["convert", str(uninterrupted), str(tmp_path / "int4"), "--to", "int4"]) == 0
    stored = load_file(tmp_path / "int4" / "model.safetensors")
    want = quantized_experts(load_run(uninterrupted), 32)
    for name, weight in want.items():
        form = CompressedTensorsInt4(*(stored[f"{name}.weight_{part}"] for part in ("packed", "scale", "shape")), None)
        got = from_compressed_tensors(form)
        assert torch.equal(got.packed, weight.packed) and torch.equal(got.scale, weight.scale), name
    assert f"{next(iter(want))}.weight" not in stored
