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

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from transformers import GlmMoeDsaForCausalLM  # noqa: E402

from glm5 import Glm5ForCausalLM  # noqa: E402
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
        our_weights, our_experts = routed[number][:2]
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


@st.composite
def configurations(draw) -> dict:
    """Any small model that Transformers can run, within the rope types that there are here."""

    def number(low, high):
        return draw(st.integers(low, high))

    layers, heads, groups, rope = number(1, 4), number(1, 5), number(1, 3), 2 * number(1, 8)
    per_group = number(2, 4)
    kept = number(1, groups)
    config = dict(
        vocab_size=number(8, 200),
        hidden_size=number(8, 70),
        intermediate_size=number(1, 70),
        moe_intermediate_size=number(1, 50),
        num_hidden_layers=layers,
        first_k_dense_replace=number(0, layers + 1),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=number(1, 40),
        kv_lora_rank=number(1, 40),
        qk_nope_head_dim=number(1, 40),
        qk_rope_head_dim=rope,
        v_head_dim=number(1, 40),
        index_n_heads=number(1, 33),
        index_head_dim=rope + number(0, 30),
        index_topk=number(1, 50),
        n_group=groups,
        topk_group=kept,
        n_routed_experts=groups * per_group,
        num_experts_per_tok=number(1, kept * per_group),
        n_shared_experts=number(0, 3),
        experts_implementation="eager",  # its default wants sizes that are multiples of 4
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5, 0.3])),
        attention_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        max_position_embeddings=draw(st.sampled_from([64, 100, 2048])),
    )
    kinds = st.lists(st.sampled_from(["full", "shared"]), min_size=layers - 1, max_size=layers - 1)
    config |= draw(
        st.one_of(
            st.just({}),
            kinds.map(lambda rest: {"indexer_types": ["full", *rest]}),
            kinds.map(lambda rest: {"index_topk_pattern": "F" + "".join(k[0].upper() for k in rest)}),
            st.builds(
                lambda f, o: {"index_topk_freq": f, "index_skip_topk_offset": o}, st.integers(0, 4), st.integers(1, 4)
            ),
        )
    )
    if draw(st.booleans()):
        config["mlp_layer_types"] = draw(st.lists(st.sampled_from(["dense", "sparse"]), min_size=layers, max_size=layers))
    theta, factor = draw(st.sampled_from([1e2, 1e4, 8e6])), draw(st.sampled_from([1.0, 2.0, 40.0]))
    yarn = st.fixed_dictionaries(
        {"rope_type": st.just("yarn"), "original_max_position_embeddings": st.sampled_from([32, 64, 1024])},
        optional={
            "beta_fast": st.sampled_from([4.0, 32.0]),
            "beta_slow": st.sampled_from([0.5, 1.0]),
            "mscale": st.sampled_from([0.7, 1.0]),
            "mscale_all_dim": st.sampled_from([0.7, 1.0]),
            "attention_factor": st.sampled_from([1.0, 1.3]),
            "truncate": st.booleans(),
        },
    )
    config["rope_parameters"] = {"rope_theta": theta} | draw(
        st.one_of(
            st.just({"rope_type": "default"}),
            st.just({"rope_type": "linear", "factor": factor}),
            yarn.map(lambda rope: rope | {"factor": factor}),
        )
    )
    return config


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(configurations(), st.integers(1, 60), st.integers(0, 2**16))
def test_any_configuration(tmp_path_factory, config, time, seed):
    model = tm.theirs(seed, **config)
    mine = tm.ours(model, tmp_path_factory.mktemp("checkpoint"))
    compare(model, mine, torch.randint(0, config["vocab_size"], (2, time)))


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


@pytest.mark.parametrize("name", ["plain", "tied"])
def test_shards_that_transformers_wrote(tmp_path, name):
    model, mine = both(tmp_path / "one", name)
    model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    again = Glm5ForCausalLM.from_pretrained(tmp_path / "many")
    for tensor_name, tensor in mine.state_dict().items():
        assert torch.equal(again.state_dict()[tensor_name], tensor), tensor_name


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
