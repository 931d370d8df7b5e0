"""Losses: gradients against a float64 model on the references, who trains when, MTP targets, the router's bias."""

import pytest
import torch

from glm5 import Glm5ForCausalLM, reference
from glm5.model import attention, causal_lm, layers
from glm5.model.causal_lm import mtp_targets
from tests.model import shapes
from tests.ops.properties import same_bits


def batch(seed: int = 0):
    return shapes.pack(*(shapes.random_tokens(n, seed=seed + n) for n in (40, 3, 57)))


def total(losses):
    terms = [losses["lm"], *losses["mtp"]] + ([losses["indexer_kl"]] if losses["indexer_kl"] is not None else [])
    return sum(t * (i + 1) for i, t in enumerate(terms))


def gradients(model, stage):
    model.zero_grad()
    losses = model.losses(batch(), indexer=stage)
    (losses["indexer_kl"] if stage == "warmup" else total(losses)).backward()
    return losses, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("stage", ["none", "warmup", "sparse"])
@pytest.mark.parametrize("shared", [False, True], ids=["every_layer_indexed", "index_share"])
def test_gradients_are_those_of_a_float64_model_on_the_references(stage, shared, monkeypatch):
    changes = {"indexer_types": ("full", "shared", "full"), "index_share_for_mtp_iteration": True} if shared else {}
    ours = shapes.model(**changes)
    chosen = []

    def record(selection):
        chosen.append(selection.indices)
        return selection.indices

    with ours.selecting(record):
        got, got_grads = gradients(ours, stage)

    theirs = Glm5ForCausalLM(ours.config, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    for module in (attention, causal_lm, layers):
        monkeypatch.setattr(module, "ops", reference)
    with theirs.selecting(lambda selection: chosen.pop(0)):
        want, want_grads = gradients(theirs, stage)

    assert not chosen
    assert torch.equal(got["expert_load"], want["expert_load"])
    if stage == "warmup":  # trains on the KL alone
        assert got["lm"] is None and got["mtp"] == []
    else:
        torch.testing.assert_close(
            torch.stack([got["lm"], *got["mtp"]]).double(), torch.stack([want["lm"], *want["mtp"]]), rtol=1e-5, atol=0
        )
    torch.testing.assert_close(got["indexer_kl"], want["indexer_kl"], rtol=1e-4, atol=0, check_dtype=False)
    for name, gradient in want_grads.items():
        assert (gradient is None) == (got_grads[name] is None), name
        if gradient is not None:
            error = (got_grads[name].double() - gradient).norm() / gradient.norm().clamp(min=1e-12)
            assert error < 1e-4, f"{name}: {error:.2g}"


@pytest.mark.parametrize("stage, indexers, rest", [("none", False, True), ("warmup", True, False), ("sparse", True, True)])
def test_each_stage_trains_what_it_should(stage, indexers, rest):
    model = shapes.model()
    gradients(model, stage)
    assert {p.grad is not None for p in model.indexer_parameters()} == {indexers}
    assert {p.grad is not None for p in model.backbone_parameters()} == {rest}
    assert len(list(model.indexer_parameters())) + len(list(model.backbone_parameters())) == len(list(model.parameters()))


def test_the_two_losses_of_the_sparse_stage_do_not_mix():
    model = shapes.model("sparse")
    _, plain = gradients(model, "none")
    model.zero_grad()
    losses = model.losses(batch(), indexer="sparse")
    losses["indexer_kl"].backward(retain_graph=True)
    assert all(p.grad is None for p in model.backbone_parameters())
    model.zero_grad()
    (total(losses) - losses["indexer_kl"] * 5).backward()
    for name, p in model.named_parameters():
        if ".indexer." not in name:
            torch.testing.assert_close(p.grad, plain[name], msg=name)


def test_losses_are_reproducible_and_need_no_graph_to_evaluate():
    model = shapes.model("sparse")
    losses, first = gradients(model, "sparse")
    _, second = gradients(model, "sparse")
    assert all(same_bits(a, second[name]) for name, a in first.items())
    with torch.no_grad():
        evaluated = model.losses(batch(), indexer="sparse")
    assert evaluated["indexer_kl"].grad_fn is None
    assert same_bits(evaluated["lm"], losses["lm"]) and same_bits(evaluated["indexer_kl"], losses["indexer_kl"])


def test_losses_are_mean_log_probabilities():
    model, b = shapes.model(), batch()
    losses = model.losses(b)
    logp = model.target_logprobs(b)
    ids = b["tokens"][:40][None]
    logits = torch.log_softmax(model(ids, mtp_depth=2).logits[0], -1)
    torch.testing.assert_close(logp[:39], logits[torch.arange(39), ids[0, 1:]])
    assert losses["num_targets"] == 39 + 2 + 56 and logp[39] == 0
    torch.testing.assert_close(losses["lm"], -logp.sum() / 97)
    # Depth 1 has no target for the last two tokens of a document.
    per_document = []
    for document in (b["tokens"][:40], b["tokens"][40:43], b["tokens"][43:]):
        drafted = torch.log_softmax(model(document[None], mtp_depth=1).mtp_logits[0][0], -1)
        per_document.append(drafted[torch.arange(len(document) - 2), document[2:]])
    torch.testing.assert_close(losses["mtp"][0], -torch.cat(per_document).mean())


def test_mtp_targets_stay_inside_their_document():
    b = shapes.pack(torch.arange(4), torch.arange(10, 12), torch.arange(20, 25))
    assert mtp_targets(b["targets"], b["positions"], b["ks"], 1).tolist() == [2, 3, *[-100] * 4, 22, 23, 24, -100, -100]
    assert mtp_targets(b["targets"], b["positions"], b["ks"], 3).tolist() == [*[-100] * 6, 24, *[-100] * 4]
    assert mtp_targets(b["targets"], b["positions"], b["ks"], 30).tolist() == [-100] * 11
    # Two documents whose positions run on, as the chunks of one would.
    ks = torch.tensor([0, 0, 2, 2], dtype=torch.int32)
    assert mtp_targets(torch.arange(4), torch.arange(4), ks, 1).tolist() == [1, -100, 3, -100]
    masked = b["targets"].clone()
    masked[7] = -100
    assert mtp_targets(masked, b["positions"], b["ks"], 1)[6] == -100


def test_mtp_loss_does_not_feel_the_next_document():
    model = shapes.model()
    a, b, c = (shapes.random_tokens(20, seed=s) for s in range(3))
    first, second = model.losses(shapes.pack(a, b)), model.losses(shapes.pack(a, c))
    alone = [model.losses(shapes.pack(x)) for x in (a, b, c)]
    for d in range(3):
        torch.testing.assert_close(first["mtp"][d], (alone[0]["mtp"][d] + alone[1]["mtp"][d]) / 2)
        torch.testing.assert_close(second["mtp"][d], (alone[0]["mtp"][d] + alone[2]["mtp"][d]) / 2)


def test_a_shared_layer_reuses_the_nearest_earlier_full_layers_indices():
    model = shapes.model("sparse", num_hidden_layers=5, indexer_types=("full", "full", "shared", "shared", "full"))
    assert [layer.self_attn.indexer is not None for layer in model.model.layers] == [True, True, False, False, True, True]
    b = batch()
    _, seen = model.hidden_states(b["tokens"], b["positions"], b["ks"], b["ke"], collect_indexer=True)
    assert [s.layer for s in seen] == [0, 1, 2, 3, 4]
    assert torch.equal(seen[1].indices, seen[2].indices) and torch.equal(seen[1].indices, seen[3].indices)
    assert not torch.equal(seen[0].indices, seen[1].indices) and not torch.equal(seen[4].indices, seen[3].indices)


@pytest.mark.parametrize("share, layers", [(False, [0, 1, 2, 3, 3, 3]), (True, [0, 1, 2, 3])])
def test_later_mtp_steps_index_anew_unless_they_share(share, layers):
    model = shapes.model("sparse", index_share_for_mtp_iteration=share)
    asked = []

    def record(selection):
        asked.append(selection.layer)
        return selection.indices

    with model.selecting(record):
        model.losses(batch(), mtp_depth=3)
    assert asked == layers


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_rows_without_keys_do_not_count_in_the_kl(stage):
    model, b = shapes.model(), batch()
    losses = model.losses(b, mtp_depth=0, indexer=stage)
    padded = {k: torch.cat([v, v[:1].expand(50)]) for k, v in b.items()}
    padded["ke"][-50:] = 0
    torch.testing.assert_close(model.losses(padded, mtp_depth=0, indexer=stage)["indexer_kl"], losses["indexer_kl"])


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
@pytest.mark.parametrize("share", [False, True], ids=["every_step_indexed", "index_share"])
def test_the_kl_does_not_feel_the_next_document_either(stage, share):
    """Rows of an MTP step that read a token of another document, or none, are no lesson for the indexer."""
    model = shapes.model(index_share_for_mtp_iteration=share)
    a, b, c = (shapes.random_tokens(20, seed=s) for s in range(3))
    alone = [model.losses(shapes.pack(x), indexer=stage) for x in (a, b, c)]
    rows = 3 * 20 + 19 + 18 + 17
    assert [int(losses["indexer_rows"]) for losses in alone] == [rows] * 3
    for second in (1, 2):
        losses = model.losses(shapes.pack(a, (a, b, c)[second]), indexer=stage)
        assert losses["indexer_rows"] == 2 * rows
        torch.testing.assert_close(losses["indexer_kl"], (alone[0]["indexer_kl"] + alone[second]["indexer_kl"]) / 2)
    # Nor does what the last token of a pack stands in for count: a padding document there changes nothing.
    padded = model.losses(shapes.pack(a, c[:1]), indexer=stage, mtp_depth=3)
    torch.testing.assert_close(padded["indexer_kl"] * padded["indexer_rows"], alone[0]["indexer_kl"] * rows)


def test_load_counts_every_choice_and_the_bias_evens_it_out():
    model, b = shapes.model(), batch()
    load = model.losses(b, mtp_depth=2)["expert_load"]
    tokens = len(b["tokens"])
    assert load.shape == (3, 6) and load.sum(1).tolist() == [tokens * 2, tokens * 2, tokens * 2 * 2]
    model.update_router_bias(load, 0.01)
    bias = model.moe_layers()[0].gate.e_score_correction_bias
    assert torch.equal(bias, 0.01 * torch.sign(load[0].float().mean() - load[0]))
    before = load.float().std(1)
    for _ in range(60):
        load = model.losses(b, mtp_depth=2)["expert_load"]
        model.update_router_bias(load, 0.01)
    assert (load.float().std(1) < before / 2).all()
    with pytest.raises(ValueError, match="load has shape"):
        model.update_router_bias(load[:2], 0.01)


def test_an_unused_mtp_layer_keeps_its_bias():
    model = shapes.model()
    model.update_router_bias(model.losses(batch(), mtp_depth=0)["expert_load"], 0.01)
    assert (model.moe_layers()[-1].gate.e_score_correction_bias == 0).all()


def test_a_batch_without_targets_has_loss_zero():
    b = batch()
    b["targets"] = torch.full_like(b["targets"], -100)
    losses = shapes.model().losses(b)
    assert losses["lm"] == 0 and losses["num_targets"] == 0 and all(m == 0 for m in losses["mtp"])


def test_unknown_stage_and_form_are_named():
    with pytest.raises(ValueError, match="indexer is 'warm'"):
        shapes.model().losses(batch(), indexer="warm")
    with pytest.raises(ValueError, match="attention is 'flash'"):
        shapes.model("flash")
    with pytest.raises(ValueError, match="mtp_depth is 1"):
        shapes.model(num_nextn_predict_layers=0).losses(batch(), mtp_depth=1)
    with pytest.raises(ValueError, match="input_ids has shape"):
        shapes.model()(torch.arange(3))
