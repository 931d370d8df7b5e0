"""The configuration: published sizes, the IndexShare rule, and errors that name the field."""

import pytest
import torch

from glm5 import Glm5Config, Glm5ForCausalLM
from tests.model import shapes


def counted(name: str, include_mtp: bool) -> int:
    return Glm5ForCausalLM(Glm5Config.preset(name), device="meta", dtype=torch.bfloat16).num_parameters(include_mtp)


def test_glm_5_has_its_published_size():
    assert counted("glm-5", include_mtp=False) == 743_911_218_432
    assert counted("glm-5", include_mtp=True) == 753_864_139_008


def test_glm_5_2_saves_the_indexers_of_its_shared_layers():
    layers = Glm5Config.preset("glm-5.2").layer_indexers
    assert [i for i, kind in enumerate(layers) if kind == "full"] == [0, 1, *range(2, 78, 4)]
    assert layers.count("shared") == 57
    assert counted("glm-5", True) - counted("glm-5.2", True) == 534_198_528


def test_tiny_and_small_are_an_order_of_magnitude_apart():
    tiny, small = counted("tiny", True), counted("small", True)
    assert 2e6 < tiny < 3e6 and 7 < small / tiny < 13


def test_parameters_have_the_names_of_a_hugging_face_checkpoint():
    names = set(shapes.model(num_hidden_layers=2).state_dict())
    attention = (
        "q_a_proj q_a_layernorm q_b_proj kv_a_proj_with_mqa kv_a_layernorm kv_b_proj o_proj indexer.wq_b indexer.wk "
        "indexer.k_norm indexer.weights_proj"
    ).split()
    block = {"input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.indexer.k_norm.bias"}
    block |= {f"self_attn.{n}.weight" for n in attention}
    dense = {f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    moe = {f"mlp.shared_experts.{n}_proj.weight" for n in ("gate", "up", "down")}
    moe |= {"mlp.gate.weight", "mlp.gate.e_score_correction_bias", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    mtp = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
    want = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer, parts in enumerate([block | dense, block | moe, block | moe | mtp]):
        want |= {f"model.layers.{layer}.{p}" for p in parts}
    assert names == want


def test_optional_parameters():
    names = set(shapes.model(tie_word_embeddings=True, n_shared_experts=0, num_nextn_predict_layers=0).state_dict())
    assert not any("lm_head" in n or "shared_experts" in n or "layers.3" in n for n in names)
    assert any(n.endswith("q_a_proj.bias") for n in shapes.model(attention_bias=True).state_dict())


def test_configuration_survives_a_dictionary():
    for name in ("tiny", "small", "glm-5", "glm-5.2"):
        config = Glm5Config.preset(name)
        assert Glm5Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": 6.0}, "hidden_size is 6.0, want an integer"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim is 15, want an even number"),
        ({"index_head_dim": 4}, "index_head_dim is 4"),
        ({"first_k_dense_replace": 9}, "first_k_dense_replace is 9"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
        ({"n_group": 3}, "n_group is 3"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters is"),
        ({"indexer_types": ["shared"] * 4}, "first layer that is 'full'"),
        ({"indexer_types": ["full"]}, "indexer_types is"),
    ],
)
def test_impossible_values_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        Glm5Config.preset("tiny", **changes)


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match="no preset 'medium'"):
        Glm5Config.preset("medium")
    with pytest.raises(ValueError, match="unknown field 'hidden'"):
        Glm5Config.from_dict({"hidden": 3})


def test_initial_weights_depend_on_seed_and_name_alone():
    a, b, other = shapes.model(), shapes.model(num_hidden_layers=2), shapes.model(seed=1)
    name = "model.layers.1.self_attn.q_a_proj.weight"
    assert torch.equal(a.state_dict()[name], b.state_dict()[name])
    assert not torch.equal(a.state_dict()[name], other.state_dict()[name])


def test_casting_the_model_leaves_the_router_bias_in_float32():
    model = shapes.model()
    bias = model.moe_layers()[0].gate.e_score_correction_bias
    bias.fill_(0.001)
    model.to(torch.bfloat16)
    bias = model.moe_layers()[0].gate.e_score_correction_bias
    assert bias.dtype == torch.float32 and (bias == torch.tensor(0.001)).all()
    assert model.lm_head.weight.dtype == torch.bfloat16
