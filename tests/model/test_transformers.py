"""The model against Transformers' GlmMoeDsa (5.23), weights passing through a checkpoint directory.

Two differences are by design, and the tests step around them:
* Ties: which of several equal scores at the boundary of the top-k gets in, we decide by index and ``torch.topk`` does not.
  ReLU makes exact zeros common. Index sets are compared where the boundary is clear, and Transformers' own sets are then
  attended to by both, so that one tie does not hide what comes after it.
* Padding rows: ours attend to nothing; theirs attend to whatever the mask leaves. Only rows of tokens are compared.
"""

import pytest
import torch

pytest.importorskip("transformers.models.glm_moe_dsa", reason="needs: pip install -c constraints.txt transformers")

from transformers import GlmMoeDsaForCausalLM  # noqa: E402

from glm5.model.batches import flat_rows  # noqa: E402
from tests.model import shapes  # noqa: E402
from tests.model import transformers_models as tm  # noqa: E402

CONFIG = pytest.mark.parametrize("name", tm.CONFIGS)


def both(tmp_path, name="plain", **changes):
    model = tm.theirs(**tm.CONFIGS[name] | changes)
    return model, tm.ours(model, tmp_path)


def compare(model, mine, ids, real=None, **inputs):
    """Logits, hidden states, index sets and router choices of both on a batch. Returns Transformers' output and ours."""
    batch, time = ids.shape
    real = torch.ones(batch * time, dtype=torch.bool) if real is None else real.reshape(-1)
    with torch.no_grad(), tm.recorded(model) as record:
        want = model(ids, output_hidden_states=True, **inputs)
    choice = tm.TheirChoice(record, batch, time, real)
    routed = {}
    handles = [
        layer.mlp.gate.register_forward_hook(lambda module, args, out, i=i: routed.update({i: out}))
        for i, layer in enumerate(mine.model.layers)
        if hasattr(layer.mlp, "gate")
    ]
    with torch.no_grad(), mine.selecting(choice):
        got = mine(ids, output_hidden_states=True, **inputs)
    for handle in handles:
        handle.remove()

    assert len(got.hidden_states) == len(want.hidden_states)
    for ours, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
        close(ours, theirs, real)
    close(got.logits, want.logits, real)
    for number, ((_, weights, experts),) in record["router"].items():
        our_weights, our_experts = routed[number]
        order, our_order = experts.sort(1), our_experts.sort(1)
        assert torch.equal(order.values[real].int(), our_order.values[real])
        torch.testing.assert_close(
            our_weights.gather(1, our_order.indices)[real], weights.gather(1, order.indices)[real], rtol=1e-4, atol=1e-5
        )
    if time > mine.config.index_topk:
        assert choice.compared > 0
    return want, got


def close(ours, theirs, real):
    ours, theirs = ours.flatten(0, 1)[real], theirs.flatten(0, 1)[real]
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@CONFIG
def test_prefill(tmp_path, name):
    compare(*both(tmp_path, name), shapes.random_tokens(2, 70))


@pytest.mark.parametrize("time", [1, 2, 15, 16, 17])
def test_prefill_around_the_top_k(tmp_path, time):
    compare(*both(tmp_path), shapes.random_tokens(2, time))


def test_prefill_against_sdpa(tmp_path):
    model, mine = both(tmp_path, attention="sdpa")
    compare(model, mine, shapes.random_tokens(2, 50))


@pytest.mark.parametrize("name", ["plain", "index_share", "yarn_mscale", "topk_all"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("placed", [False, True], ids=["columns", "own positions"])
def test_padding(tmp_path, name, side, placed):
    mask = torch.ones(3, 60, dtype=torch.long)
    for row, width in ((0, 7), (2, 41)):
        mask[row, slice(width) if side == "left" else slice(60 - width, None)] = 0
    inputs = {"attention_mask": mask}
    if placed:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    compare(*both(tmp_path, name), shapes.random_tokens(3, 60), real=mask.bool(), **inputs)


@pytest.mark.parametrize("name", ["plain", "index_share", "topk_all"])
def test_packed_documents(tmp_path, name):
    lengths = ((20, 1, 39), (60,)), ((5, 55), (30, 30))
    for pair in lengths:
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in pair])
        inputs = {"position_ids": positions}
        model, mine = both(tmp_path, name)
        model.config.use_cache = False  # with a cache Transformers does not look for documents
        compare(model, mine, shapes.random_tokens(2, 60), **inputs)


@pytest.mark.parametrize("name", ["plain", "index_share", "topk_all", "yarn"])
def test_chunked_prefill(tmp_path, name):
    model, mine = both(tmp_path, name)
    ids = shapes.random_tokens(2, 60)
    with torch.no_grad(), tm.recorded(model) as record:
        cache, parts = None, []
        for chunk in ids.split([13, 1, 26, 20], 1):
            out = model(chunk, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    choice = tm.TheirChoice(record, 2, 60, torch.ones(120, dtype=torch.bool))
    with torch.no_grad(), mine.selecting(choice):
        close(mine(ids).logits, torch.cat(parts, 1), choice.real)


@pytest.mark.parametrize("name", ["plain", "index_share", "groups", "tied", "attention_bias", "topk_all", "yarn"])
def test_generation(tmp_path, name):
    model, mine = both(tmp_path, name, index_n_heads=32)  # ties are rare
    prompt = shapes.random_tokens(2, 24)
    want = model.generate(prompt, max_new_tokens=24, do_sample=False)
    assert torch.equal(mine.generate(prompt, 24, chunk=10), want)


def test_generation_with_left_padding(tmp_path):
    model, mine = both(tmp_path, index_n_heads=32)
    prompt, mask = shapes.random_tokens(3, 24), torch.ones(3, 24, dtype=torch.long)
    mask[0, :9] = mask[2, :23] = 0
    want = model.generate(prompt, attention_mask=mask, max_new_tokens=16, do_sample=False)
    assert torch.equal(mine.generate(prompt, 16, attention_mask=mask, chunk=10), want)
    alone = mine.generate(prompt[0, 9:], 16)
    assert torch.equal(alone[15:], want[0, 24:])


@pytest.mark.parametrize(
    "name", ["plain", "index_share", "groups", "tied", "attention_bias", "no_shared_expert", "topk_all"]
)
def test_loss_and_gradients(tmp_path, name):
    model, mine = both(tmp_path, name)
    ids = shapes.random_tokens(2, 50)
    labels = ids.clone()
    labels[0, :10] = labels[1, 30:33] = -100
    with tm.recorded(model) as record:
        want = model(ids, labels=labels).loss
    want.backward()
    with mine.selecting(tm.TheirChoice(record, 2, 50, torch.ones(100, dtype=torch.bool))):
        got = mine(ids, labels=labels).loss
    got.backward()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    theirs = dict(model.named_parameters())
    compared = 0
    for parameter_name, parameter in mine.named_parameters():
        gradient = theirs[parameter_name].grad
        if gradient is None:
            assert parameter.grad is None or not parameter.grad.any(), parameter_name
            continue
        scale = gradient.abs().max().clamp(min=1e-6)
        assert (parameter.grad - gradient).abs().max() <= 1e-4 * scale, parameter_name
        compared += 1
    assert compared > 30


@CONFIG
def test_weights_go_back(tmp_path, name):
    model, mine = both(tmp_path / "there", name)
    mine.save_pretrained(tmp_path / "back", max_shard_bytes=50_000)
    again = GlmMoeDsaForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager", dtype="auto").eval()
    left, right = model.state_dict(), again.state_dict()
    assert left.keys() == right.keys()
    for tensor_name in left:
        assert torch.equal(left[tensor_name], right[tensor_name]), tensor_name
    ids = shapes.random_tokens(1, 30)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_bf16(tmp_path):
    model = tm.theirs().bfloat16()
    mine = tm.ours(model, tmp_path)
    assert mine.lm_head.weight.dtype == torch.bfloat16
    ids = shapes.random_tokens(2, 70)
    with torch.no_grad():
        exact = model.float()(ids).logits  # the weights are bf16 numbers still
        got = mine(ids).logits
        rounded = model.bfloat16()(ids).logits.float()
    ours, theirs = ((x - exact).norm() / exact.norm() for x in (got, rounded))
    assert ours < 1.2 * theirs


# ---- the batch forms, without Transformers' numbers


def test_padding_rows_see_nothing():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    positions, ks, ke = flat_rows(2, 4, mask, None, mask.device)
    assert positions.tolist() == [0, 1, 2, 3] * 2
    assert (ke - ks).tolist() == [0, 0, 1, 2, 1, 2, 3, 0]
    assert ks[2:4].tolist() == [2, 2] and ks[4:7].tolist() == [4] * 3
