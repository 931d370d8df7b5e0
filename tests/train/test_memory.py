"""Computing again and moving away change no bit of losses and gradients; what moves, and in what order, can be seen."""

import gc
import os
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5.recipes import RecipeError, load_recipe
from glm5.report import read_metrics
from glm5.train import offload as module
from glm5.train.loop import accumulate
from glm5.train.offload import Offload
from glm5.train.parameters import make_optimizers
from glm5.train.stages import KINDS
from tests.model import shapes
from tests.train.test_accumulation import Packs, small_model, stage_of_kind
from tests.train.test_run import carry_out, final_state, small_recipe

ALL_KEYS = dict(balance_weight=0.5, z_loss=0.1)
SHARING = dict(
    index_topk_freq=2, index_share_for_mtp_iteration=True
)  # layers and drafts that reuse an earlier one's indices


def gradients(stage, checkpointing="none", offload=None, dtype=torch.float32, **changes):
    """(losses, load, gradients by name) of a step of two packs."""
    model = shapes.model(dtype=dtype, vocab_size=320, **changes)
    stage.form.give(model)
    make_optimizers(model, stage)
    model.checkpointing = checkpointing
    saving = (offload.saving,) if offload else ()
    shown, load = accumulate(stage, model, [Packs().batch(0, 2)], lambda loss, shown: None, *saving)
    return shown, load, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got, want):
    assert got[0] == want[0] and torch.equal(got[1], want[1]) and got[2].keys() == want[2].keys()
    for name, gradient in want[2].items():
        assert torch.equal(got[2][name], gradient), name


@settings(max_examples=20, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    checkpointing=st.sampled_from(["none", "layers"]),
    where=st.sampled_from([None, "host", "file"]),
    least=st.sampled_from([0, 1000, 1 << 30]),
    prefetch=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    sharing=st.booleans(),
)
def test_no_policy_changes_a_bit(kind, checkpointing, where, least, prefetch, dtype, sharing):
    stage, changes = stage_of_kind(kind, **ALL_KEYS), SHARING if sharing else {}
    keeper = Offload(where, least_bytes=least, prefetch=prefetch) if where else None
    got = gradients(stage, checkpointing, keeper, dtype, **changes)
    assert_same(got, gradients(stage, dtype=dtype, **changes))
    if keeper:
        assert keeper.held == 0 and (keeper.bytes["out"] > 0) == (least < 1 << 30)
        keeper.close()


@pytest.mark.parametrize("kind", ["dsa-warmup", "dsa-sparse"])
def test_a_layer_that_shares_indices_is_computed_again_with_those_it_had(kind):
    stage = stage_of_kind(kind, **ALL_KEYS)
    assert_same(gradients(stage, "layers", **SHARING), gradients(stage, **SHARING))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_recomputing_keeps_the_inputs_of_layers_alone(kind):
    """Counted by the hooks: bytes that autograd is asked to keep."""
    kept = {}
    for checkpointing in ("none", "layers"):
        keeper = Offload("host", shapes.model().parameters(), least_bytes=1)
        gradients(stage_of_kind(kind), checkpointing, keeper)
        kept[checkpointing] = keeper.peak
        keeper.close()
    assert 0 < kept["layers"] < kept["none"] / (2 if kind == "dsa-warmup" else 3)


def test_layers_run_twice_and_the_rest_once(monkeypatch):
    calls = {}
    for checkpointing in ("none", "layers"):
        count = calls[checkpointing] = []
        model = small_model(stage_of_kind("pretrain"))
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(lambda *_, count=count: count.append("layer"))
        model.model.embed_tokens.register_forward_hook(lambda *_, count=count: count.append("embedding"))
        model.checkpointing = checkpointing
        accumulate(stage_of_kind("pretrain"), model, [Packs().batch(0, 2)], lambda loss, shown: None)
    assert calls["layers"].count("layer") == 2 * calls["none"].count("layer") == 2 * 5  # three layers, two drafts
    assert calls["layers"].count("embedding") == calls["none"].count("embedding")


class Chain(torch.autograd.Function):
    """Saves a tensor of its own."""

    @staticmethod
    def forward(ctx, x, kept):
        ctx.save_for_backward(kept)
        return x + 1

    @staticmethod
    def backward(ctx, dy):
        (kept,) = ctx.saved_tensors
        return dy * kept.sum(), None


@pytest.mark.parametrize("prefetch", [0, 1, 2])
@pytest.mark.parametrize("where", ["host", "file"])
def test_tensors_leave_in_order_and_come_back_in_reverse(where, prefetch):
    keeper = Offload(where, least_bytes=1, prefetch=prefetch)
    x = torch.ones(1, requires_grad=True)
    own = [torch.full((10 + i,), 1 + i / 64) for i in range(5)]
    gone = [weakref.ref(t) for t in own]
    with keeper.saving():
        y = x
        for i in range(5):
            y = Chain.apply(y, own[i])
        want = 1.0
        for each in own:
            want *= float(each.sum())
        del each
        own.clear()
        gc.collect()
        assert all(ref() is None for ref in gone)  # the originals are free, the copies wait
        assert keeper.held == keeper.peak == keeper.bytes["out"] == sum(4 * (10 + i) for i in range(5))
        y.backward()
    assert x.grad.item() == pytest.approx(want, rel=1e-6)
    events = [(what, number) for what, number, _ in keeper.events]
    assert events[:5] == [("out", i) for i in range(5)]
    assert [n for what, n in events if what == "in"] == [4, 3, 2, 1, 0]
    assert [n for what, n in events if what == "fetch"] == ([3, 2, 1, 0] if prefetch else [])
    for number in range(4) if prefetch else ():
        assert events.index(("fetch", number)) < events.index(("in", number))
    assert keeper.bytes["in"] == keeper.bytes["out"] and keeper.held == 0
    if where == "file":
        size = os.fstat(keeper._file.fileno()).st_size
        assert size == keeper.peak
        with keeper.saving():  # the next step writes over it
            Chain.apply(x, torch.ones(10)).backward()
        assert os.fstat(keeper._file.fileno()).st_size == size
    keeper.close()


def test_what_is_saved_twice_waits_once_and_what_stays_does_not_move():
    keeper = Offload("host", [weight := torch.ones(50, requires_grad=True)], least_bytes=1)
    x = torch.ones(1, requires_grad=True)
    with keeper.saving():
        activation, other = torch.arange(50.0), torch.arange(50.0)
        y = Chain.apply(Chain.apply(x, activation), activation)
        y = Chain.apply(y, weight[10:])
        assert [what for what, *_ in keeper.events] == ["out"]
        activation.add_(1)  # another value: another copy
        y = Chain.apply(Chain.apply(y, activation), other)
        y.backward()
    assert keeper.bytes["out"] == 3 * 200 and [n for what, n, _ in keeper.events if what == "in"] == [2, 1, 0, 0]
    assert x.grad.item() == pytest.approx(1225 * 1275 * 40 * 1225**2, rel=1e-5)
    keeper.close()


def test_a_full_disk_says_what_to_do(monkeypatch):
    keeper = Offload("file", least_bytes=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "pwrite", full)
    with pytest.raises(ValueError, match="offload to a file in .*: No space left on device; make room, or set TMPDIR"):
        with keeper.saving():
            Chain.apply(torch.ones(1, requires_grad=True), torch.ones(9))
    assert keeper.held == 0
    keeper.close()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="where is 'disk', want 'host' or 'file'"):
        Offload("disk")
    with pytest.raises(ValueError, match="checkpointing is 'all', want 'none' or 'layers'"):
        shapes.model().checkpointing = "all"
    with pytest.raises(RecipeError, match="stages.pretrain.checkpointing: got 'all'"):
        load_recipe("foundation", ["stages.pretrain.checkpointing=all"])


def test_a_run_that_saves_memory_ends_with_the_bits_of_one_that_does_not(tmp_path):
    keys = ("checkpointing=layers", "offload=file")
    saving = [f"stages.{stage}.{key}" for stage in ("pretrain", "dsa-warmup", "dsa-sparse") for key in keys]
    for name, keys in (("plain", []), ("saving", saving)):
        carry_out(small_recipe(*keys), tmp_path / name)
    (*plain, _), (*saved, rows) = (final_state(tmp_path / name / "foundation") for name in ("plain", "saving"))
    assert plain == saved
    assert all("offloaded" in r for r in rows if r["stage"] == "pretrain" and "lm" in r)
    assert not any("offloaded" in r for r in read_metrics(tmp_path / "plain" / "foundation" / "metrics.jsonl"))
