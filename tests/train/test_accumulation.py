"""What a step's gradient is made of: parts of a batch, a limit on its norm, the routers' losses; and the mean of weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5.cli.main import main
from glm5.data import Batch
from glm5.model.layers import router_losses
from glm5.model.pretrained import load_pretrained
from glm5.recipes import RecipeError, StageRecipe, load_recipe
from glm5.train.loop import StageState, accumulate, gradient_norm, total_loss, train_stage
from glm5.train.metrics import MetricsLog
from glm5.train.parameters import averaged, make_optimizers
from glm5.train.run import load_run
from glm5.train.stages import KINDS, ModelForm
from tests.model import shapes
from tests.train.test_run import carry_out, final_state, small_recipe

LENGTH = 24


class Packs:
    """A dataset of packs of a few documents each, some of one token: parts of a step differ in their counts of targets."""

    def __init__(self, seed: int = 0):
        self.seed = seed

    def batch(self, step: int, packs_per_step: int, first_pack: int = 0) -> Batch:
        documents = []
        for number in range(first_pack + step * packs_per_step, first_pack + (step + 1) * packs_per_step):
            generator = torch.Generator().manual_seed(1000 * self.seed + number)
            cuts = torch.randperm(LENGTH - 1, generator=generator)[: number % 4 * 3].sort().values + 1
            tokens = torch.randint(0, 256, (LENGTH,), generator=generator)
            documents += tokens.tensor_split(cuts)
        return Batch(**shapes.pack(*documents))


def stage_of_kind(kind: str, **keys):
    recipe = StageRecipe(kind=kind, steps=3, sequence_length=LENGTH, packs_per_step=4, mtp_depth=2, **keys)
    return KINDS[kind](recipe, ModelForm("sparse" if kind in ("dsa-sparse", "sft") else "dense"))


def small_model(stage, dtype=torch.float32):
    model = shapes.model(dtype=dtype, vocab_size=320)
    stage.form.give(model)
    return model


def gradient(stage, parts: int, data: Packs, dtype=torch.float32):
    """(losses, load, gradients by name) of a step of four packs in `parts` parts."""
    model = small_model(stage, dtype)
    make_optimizers(model, stage)
    for p in model.parameters():
        p.grad_dtype = torch.float32 if parts > 1 else p.dtype
    batches = [data.batch(part, 4 // parts, 1) for part in range(parts)]
    shown, load = accumulate(stage, model, batches, lambda loss, shown: None)
    return shown, load, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 99), parts=st.sampled_from([2, 4]), kind=st.sampled_from(sorted(KINDS)))
def test_parts_give_the_gradient_of_the_whole(seed, parts, kind):
    """Of every loss at once, though parts differ in how many targets, rows and drafts they have."""
    stage, data = stage_of_kind(kind, balance_weight=0.5, z_loss=0.1), Packs(seed)
    whole, whole_load, want = gradient(stage, 1, data)
    summed, load, got = gradient(stage, parts, data)
    assert summed.keys() == whole.keys() and summed == pytest.approx(whole, rel=1e-5)
    assert torch.equal(load, whole_load)
    assert got.keys() == want.keys()
    for name, each in want.items():
        difference = (got[name] - each).norm() / each.norm().clamp(min=1e-7)
        assert difference < 2e-5, (name, float(difference))


def test_the_mean_of_means_would_be_another_gradient():
    """The parts of this step do differ in their targets: the property above says something."""
    stage, data = stage_of_kind("pretrain"), Packs()
    counts = [stage.loss_counts(None or shapes.model(), data.batch(part, 1, 1))["lm"] for part in range(4)]
    assert len(set(counts)) > 1


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_counts_are_those_of_the_losses(kind):
    stage = stage_of_kind(kind)
    model, batch = small_model(stage), Packs().batch(0, 3)
    losses, counts = stage.losses(model, batch), stage.loss_counts(model, batch)
    assert counts["lm"] == losses["num_targets"] and counts["indexer_kl"] == losses["indexer_rows"]
    assert len(counts["mtp"]) == 2 and counts["lm"] > counts["mtp"][0] > counts["mtp"][1] > 0


def test_bf16_parts_are_summed_in_float32():
    stage = stage_of_kind("pretrain")
    assert {g.dtype for g in gradient(stage, 4, Packs(), torch.bfloat16)[2].values()} == {torch.float32}
    assert {g.dtype for g in gradient(stage, 1, Packs(), torch.bfloat16)[2].values()} == {torch.bfloat16}


def train(stage, folder, dtype=torch.float32, state=None, saved=None):
    """The model after the stage, and the rows of its metrics."""
    model = small_model(stage, dtype)
    log = MetricsLog(folder / "metrics.jsonl")
    rows, write = [], log.write
    log.write = lambda **row: (rows.append(row), write(**row))
    validate = lambda: sum(p.detach().double().abs().sum().item() for p in model.parameters())  # noqa: E731
    train_stage(model, "it", stage, Packs(), 0, state or StageState(), log, saved or (lambda state: None), validate)
    log.close()
    return model, rows


def test_a_clipped_gradient_has_the_limit_as_its_norm(tmp_path):
    plain, limited = (stage_of_kind("pretrain", clip_norm=limit) for limit in (0.0, 1e-3))
    _, rows = train(plain, tmp_path)
    data = Packs()
    model = small_model(plain)
    optimizers = make_optimizers(model, plain)
    accumulate(plain, model, [data.batch(0, 4, 0)], lambda loss, shown: None)
    norm, spoiled = gradient_norm(optimizers)
    want = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert not spoiled and norm == pytest.approx(float(want), rel=1e-6) == rows[0]["gradient_norm"]

    seen = []
    Adam = type(optimizers["adamw"][0])
    original = Adam.step

    def looking(self, *arguments):
        seen.append(self.parameters)
        norms.append(float(torch.cat([p.grad.double().flatten() for p in self.parameters.values()]).norm()))
        original(self, *arguments)

    norms = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Adam, "step", looking)
        _, rows = train(limited, tmp_path)
    assert rows[0]["gradient_norm"] == pytest.approx(float(want), rel=1e-6)  # what is logged is the norm before
    assert 0 < norms[0] <= 1e-3 * (1 + 1e-6)


def test_a_limit_that_is_not_reached_changes_no_bit(tmp_path):
    free, _ = train(stage_of_kind("pretrain"), tmp_path)
    limited, _ = train(stage_of_kind("pretrain", clip_norm=1e6), tmp_path)
    for (name, a), b in zip(free.named_parameters(), limited.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_follows_the_masters(tmp_path, dtype):
    stage, decay = stage_of_kind("pretrain", ema=0.75, validate_every=1), 0.75
    model = small_model(stage, dtype)
    optimizers = make_optimizers(model, stage)
    masters = lambda: {n: p.detach().float().clone() for n, p in model.named_parameters()}  # noqa: E731
    means = masters()
    for optimizer, _ in optimizers.values():
        for n, mean in optimizer.averages().items():
            assert torch.equal(mean, means[n]), n
    accumulate(stage, model, [Packs().batch(0, 4)], lambda loss, shown: None)
    for optimizer, lr in optimizers.values():
        optimizer.step(0, lr)
    after, held = masters(), {}
    for optimizer, _ in optimizers.values():
        held |= optimizer.averages()
    assert held.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for n, mean in held.items():
        tolerance = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(mean, decay * means[n] + (1 - decay) * after[n], **tolerance)

    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with averaged(model, optimizers):
        assert all(torch.equal(p, held[n].to(dtype)) for n, p in model.named_parameters() if n in held)
        assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    _, rows = train(stage, tmp_path, dtype)
    assert all(row["validation_ema"] != row["validation"] for row in rows if "validation" in row)
    assert any("validation" in row for row in rows)


OPTIONS = ("micro_batches=2", "clip_norm=0.05", "ema=0.5", "balance_weight=0.01", "z_loss=0.001")
CHANGED = [f"stages.{name}.{key}" for name in ("pretrain", "dsa-sparse") for key in OPTIONS]


def test_killed_with_all_of_it_and_resumed_it_ends_with_the_same_bits(tmp_path, monkeypatch, capsys):
    recipe = small_recipe(*CHANGED)
    carry_out(recipe, tmp_path / "a")
    calls = {"count": 0}

    def dying(*arguments):
        calls["count"] += 1
        if calls["count"] in (6, 8):  # in the second part of a step; and, resumed, in a later one
            raise KeyboardInterrupt
        return total_loss(*arguments)

    monkeypatch.setattr("glm5.train.loop.total_loss", dying)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            carry_out(recipe, tmp_path / "b")
    carry_out(recipe, tmp_path / "b")
    folder = tmp_path / "a" / "foundation"
    assert final_state(tmp_path / "b" / "foundation") == final_state(folder)

    plain, mean = load_run(folder), load_run(folder, average=True)
    assert any(not torch.equal(p, q) for p, q in zip(plain.parameters(), mean.parameters(), strict=True))
    assert main(["convert", str(folder), str(tmp_path / "hf"), "--ema"]) == 0
    exported = load_pretrained(type(plain), tmp_path / "hf")
    for (name, p), q in zip(mean.named_parameters(), exported.parameters(), strict=True):
        assert torch.equal(p, q), name
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "again"), "--ema"]) == 1
    assert "--ema is for run folders" in capsys.readouterr().err


def test_a_run_without_an_average_says_so(tmp_path):
    carry_out(small_recipe(), tmp_path, last="pretrain")
    with pytest.raises(ValueError, match=r"keeps no average of the weights: stages\.pretrain\.ema is 0"):
        load_run(tmp_path / "foundation", average=True)


@settings(max_examples=20, deadline=None)
@given(
    sequences=st.integers(1, 3), length=st.integers(1, 9), experts=st.integers(2, 6), seed=st.integers(0, 99), data=st.data()
)
def test_router_losses_are_the_papers(sequences, length, experts, seed, data):
    """Against loops over sequences and experts in float64, gradient and all."""
    topk = data.draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(sequences * length, experts, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = logits.topk(topk).indices.int()
    balance, z = router_losses(logits, ids, length)
    want = 0
    for s in range(sequences):
        scores = logits[s * length : (s + 1) * length].sigmoid()
        chosen = ids[s * length : (s + 1) * length]
        for e in range(experts):
            f = experts / (topk * length) * (chosen == e).sum()
            p = (scores[:, e] / scores.sum(1)).sum() / length
            want = want + f * p / sequences
    torch.testing.assert_close(balance, want)
    torch.testing.assert_close(z, logits.exp().sum(1).log().square().mean())
    for ours, theirs in zip(
        *(torch.autograd.grad(loss, logits, retain_graph=True) for loss in (balance, want)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_even_routing_costs_one_a_layer():
    logits = torch.zeros(12, 4)
    ids = torch.arange(24).view(12, 2) % 4
    assert router_losses(logits, ids.int(), 6)[0] == pytest.approx(1.0)
    skewed = torch.tensor([[3.0, 3.0, -3.0, -3.0]]).expand(12, 4)
    assert router_losses(skewed, torch.tensor([[0, 1]]).expand(12, 2).int(), 6)[0] > 1.7


def test_the_balance_loss_reaches_routers_through_every_layer():
    stage = stage_of_kind("pretrain", balance_weight=0.5)
    model, batch = small_model(stage), Packs().batch(0, 2)
    losses = stage.losses(model, batch)
    losses["balance"].backward()
    for layer in model.moe_layers():
        assert layer.gate.weight.grad.abs().sum() > 0
    assert total_loss(losses, stage.recipe) > total_loss(losses | {"balance": None}, stage.recipe)
    assert stage_of_kind("pretrain").losses(model, batch)["balance"] is None
    assert stage_of_kind("dsa-warmup", balance_weight=0.5).losses(model, batch)["balance"] is None
    with pytest.raises(ValueError, match="router_sequence_length is 7, want a divisor of the 48 tokens"):
        model.losses(batch, router_sequence_length=7)


def test_parts_that_are_not_whole_packs_are_refused():
    with pytest.raises(RecipeError, match="micro_batches is 3, want a divisor of packs_per_step, 4"):
        load_recipe("foundation", ["stages.pretrain.micro_batches=3"])
