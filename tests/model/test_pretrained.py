"""Hugging Face directories: what is written is read back to the byte, and what does not fit is listed."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm5 import Glm5Config, Glm5ForCausalLM
from glm5.model.hf_config import config_from_hf, config_to_hf
from glm5.model.pretrained import PretrainedError, checkpoint_views
from glm5.model.safetensors_folder import CheckpointFilesError
from tests.model import shapes
from tests.model.checkpoints import assert_same, contents, randomized

CONFIGS = {
    "plain": {},
    "without MTP": {"num_nextn_predict_layers": 0},
    "tied": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "no shared expert": {"n_shared_experts": 0},
    "two shared experts": {"n_shared_experts": 2},
    "groups": {"n_group": 3, "topk_group": 2, "norm_topk_prob": False},
    "IndexShare": {"indexer_types": ("full", "shared", "full")},
    "sparse first": {"mlp_layer_types": ("sparse", "dense", "sparse"), "first_k_dense_replace": 1},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 512,
            "mscale_all_dim": 1.0,
        }
    },
}


@pytest.mark.parametrize("fused", [False, True], ids=["per expert", "fused"])
@pytest.mark.parametrize("shard", [10**9, 20_000], ids=["one file", "shards"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_round_trip_keeps_every_byte(tmp_path, name, shard, fused):
    model = randomized(**CONFIGS[name])
    model.save_pretrained(tmp_path / "a", max_shard_bytes=shard, fused_experts=fused)
    again = Glm5ForCausalLM.from_pretrained(tmp_path / "a")
    assert_same(model, again)
    assert again.attention == "sparse"
    again.save_pretrained(tmp_path / "b", max_shard_bytes=shard, fused_experts=fused)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert ("model.safetensors" in contents(tmp_path / "a")) == (shard == 10**9)


def test_experts_are_written_one_by_one_gate_and_up_apart(tmp_path):
    model = randomized()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    experts = model.model.layers[1].mlp.experts
    width = model.config.moe_intermediate_size
    for k in range(model.config.n_routed_experts):
        prefix = f"model.layers.1.mlp.experts.{k}."
        assert torch.equal(stored[prefix + "gate_proj.weight"], experts.gate_up_proj[k, :width])
        assert torch.equal(stored[prefix + "up_proj.weight"], experts.gate_up_proj[k, width:])
        assert torch.equal(stored[prefix + "down_proj.weight"], experts.down_proj[k])
    assert not any("gate_up_proj" in name for name in stored)


def test_dtypes(tmp_path):
    model = randomized(torch.bfloat16)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert stored["lm_head.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same(model, Glm5ForCausalLM.from_pretrained(tmp_path))
    wide = Glm5ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert wide.lm_head.weight.dtype == torch.float32 and torch.equal(wide.lm_head.weight, model.lm_head.weight.float())


def test_float32_router_and_indexer_weights_stay_beside_bf16(tmp_path):
    model = randomized(torch.bfloat16)
    for layer in model.model.layers:
        layer.self_attn.indexer.weights_proj.float()
    for moe in model.moe_layers():
        moe.gate.weight.data = moe.gate.weight.data.float() + 1e-5
    model.save_pretrained(tmp_path)
    again = Glm5ForCausalLM.from_pretrained(tmp_path)
    assert_same(model, again)
    ids = shapes.random_tokens(1, 40)
    assert torch.equal(model(ids, mtp_depth=1).logits, again(ids).logits)


def test_other_keys_of_the_config_come_back(tmp_path):
    model = randomized()
    model.extra_config = {"architectures": ["Other"], "transformers_version": "5.0", "_name": {"a": [1]}}
    model.save_pretrained(tmp_path)
    again = Glm5ForCausalLM.from_pretrained(tmp_path)
    assert again.extra_config == model.extra_config | {"model_type": "glm_moe_dsa", "dtype": "float32"}


# ---- config.json in its several forms


GLM_5 = """{"architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", "dtype": "bfloat16",
"vocab_size": 154880, "hidden_size": 6144, "num_hidden_layers": 78, "num_nextn_predict_layers": 1, "num_attention_heads": 64,
"num_key_value_heads": 64, "head_dim": 64, "q_lora_rank": 2048, "kv_lora_rank": 512, "qk_nope_head_dim": 192,
"qk_rope_head_dim": 64, "qk_head_dim": 256, "v_head_dim": 256, "index_n_heads": 32, "index_head_dim": 128,
"index_topk": 2048, "indexer_rope_interleave": true, "rope_interleave": true, "max_position_embeddings": 202752,
"rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}, "hidden_act": "silu", "intermediate_size": 12288,
"moe_intermediate_size": 2048, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1,
"first_k_dense_replace": 3, "moe_layer_freq": 1, "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc",
"scoring_func": "sigmoid", "norm_topk_prob": true, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-05,
"attention_bias": false, "attention_dropout": 0.0, "initializer_range": 0.02, "tie_word_embeddings": false,
"eos_token_id": [154820, 154827, 154829], "ep_size": 1, "pretraining_tp": 1, "use_cache": true}"""


def test_glm_5_config_is_the_preset():
    config, extra = config_from_hf(json.loads(GLM_5) | {"bos_token_id": None})
    assert config == Glm5Config.preset("glm-5")
    assert extra["pretraining_tp"] == 1 and "hidden_size" not in extra


def test_glm_5_2_config_is_the_preset():
    values = json.loads(GLM_5) | {
        "index_topk_freq": 4,
        "index_skip_topk_offset": 3,
        "index_topk_pattern": None,
        "index_share_for_mtp_iteration": True,
        "max_position_embeddings": 1048576,
        "rope_parameters": {"rope_theta": 8e6, "rope_type": "default"},
        "head_dim": 192,
        "bos_token_id": None,
    }
    assert config_from_hf(values)[0] == Glm5Config.preset("glm-5.2")
    kinds = list(Glm5Config.preset("glm-5.2").layer_indexers)
    assert config_from_hf(values | {"indexer_types": kinds})[0].layer_indexers == tuple(kinds)
    letters = "".join(kind[0].upper() for kind in kinds)
    assert config_from_hf(values | {"index_topk_pattern": letters, "index_topk_freq": 1})[0].layer_indexers == tuple(kinds)
    assert config_from_hf(values | {"index_topk_pattern": kinds, "index_topk_freq": 1})[0].layer_indexers == tuple(kinds)


@pytest.mark.parametrize("preset, indexers", [("glm-5", 79), ("glm-5.2", 22)])
def test_names_and_shapes_of_the_published_checkpoints(preset, indexers):
    """Computed here from the published sizes, without the model: every name of the index, MTP layer 78 included."""
    want = {name: (154880, 6144) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    want["model.norm.weight"] = (6144,)
    for i in range(79):
        layer, attention = f"model.layers.{i}.", f"model.layers.{i}.self_attn."
        want |= {layer + "input_layernorm.weight": (6144,), layer + "post_attention_layernorm.weight": (6144,)}
        want |= {
            attention + "q_a_proj.weight": (2048, 6144),
            attention + "q_a_layernorm.weight": (2048,),
            attention + "q_b_proj.weight": (64 * 256, 2048),
            attention + "kv_a_proj_with_mqa.weight": (576, 6144),
            attention + "kv_a_layernorm.weight": (512,),
            attention + "kv_b_proj.weight": (64 * (192 + 256), 512),
            attention + "o_proj.weight": (6144, 64 * 256),
        }
        if preset == "glm-5" or i < 2 or (i - 2) % 4 == 0:
            want |= {
                attention + "indexer.wq_b.weight": (32 * 128, 2048),
                attention + "indexer.wk.weight": (128, 6144),
                attention + "indexer.k_norm.weight": (128,),
                attention + "indexer.k_norm.bias": (128,),
                attention + "indexer.weights_proj.weight": (32, 6144),
            }
        if i >= 3:
            want |= {layer + "mlp.gate.weight": (256, 6144), layer + "mlp.gate.e_score_correction_bias": (256,)}
        experts = [f"experts.{k}." for k in range(256)] + ["shared_experts."] if i >= 3 else [""]
        width = 2048 if i >= 3 else 12288
        for expert in experts:
            want |= {f"{layer}mlp.{expert}{part}_proj.weight": (width, 6144) for part in ("gate", "up")}
            want[f"{layer}mlp.{expert}down_proj.weight"] = (6144, width)
    mtp = "model.layers.78."
    want |= {mtp + f"{part}.weight": (6144,) for part in ("enorm", "hnorm", "shared_head.norm")}
    want[mtp + "eh_proj.weight"] = (6144, 2 * 6144)

    views = checkpoint_views(Glm5ForCausalLM(Glm5Config.preset(preset), dtype=torch.bfloat16, device="meta"))
    assert {name: tuple(view.shape) for name, view in views.items()} == want
    assert sum("indexer.wk." in name for name in views) == indexers
    other = {name: v.dtype for name, v in views.items() if v.dtype != torch.bfloat16}
    assert set(other.values()) == {torch.float32} and all(name.endswith("e_score_correction_bias") for name in other)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_survives_its_hugging_face_form(name):
    config = shapes.config(**CONFIGS[name])
    again, _ = config_from_hf(json.loads(json.dumps(config_to_hf(config, {}))))
    assert again.layer_indexers == config.layer_indexers and again.layer_mlps == config.layer_mlps
    assert again == shapes.config(
        **CONFIGS[name] | {"indexer_types": config.layer_indexers, "mlp_layer_types": config.layer_mlps}
    )


def test_older_and_absent_keys():
    config, _ = config_from_hf({"rope_theta": 5e5, "first_k_dense_replace": 9, "num_hidden_layers": 2, "num_experts": 16})
    assert config.rope_theta == 5e5 and config.layer_mlps == ("dense", "dense") and config.n_routed_experts == 16
    assert (config.bos_token_id, config.eos_token_id, config.num_nextn_predict_layers) == (0, 1, 0)
    assert config_from_hf({})[0].rope_theta == 1e4
    unread = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0, "factor": 2.0}
    assert config_from_hf({"rope_parameters": unread})[0].rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    scaled = {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 1e4, "max_position_embeddings": 4096}
    rope = config_from_hf(scaled)[0].rope_parameters
    assert rope == {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "llama"}, "model_type is 'llama', want 'glm_moe_dsa'"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"indexer_rope_interleave": False}, "indexer_rope_interleave is False"),
        ({"indexer_types": None, "index_topk_pattern": "FXS"}, "index_topk_pattern is 'FXS'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2}}, "rope_parameters is .* want a rope_type of"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "want a number > 0 for factor"),
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types is"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_configs_that_cannot_be_followed_are_named(tmp_path, change, words):
    randomized().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(PretrainedError, match=words):
        Glm5ForCausalLM.from_pretrained(tmp_path)


# ---- what does not fit


def test_everything_that_does_not_fit_is_in_one_error(tmp_path):
    randomized().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.self_attn.q_a_proj.weight"], tensors["model.layers.2.mlp.experts.3.up_proj.weight"]
    tensors["model.layers.0.rotary_emb.inv_freq"] = torch.zeros(4)
    tensors["lm_head.weight"] = torch.zeros(3, 5)
    tensors["model.norm.weight"] = torch.zeros(48, dtype=torch.int64)
    save_file(tensors, file)
    with pytest.raises(PretrainedError) as caught:
        Glm5ForCausalLM.from_pretrained(tmp_path)
    message = str(caught.value)
    for words in (
        "model.layers.0.self_attn.q_a_proj.weight is missing",
        "model.layers.2.mlp.experts.3.up_proj.weight is missing",
        "model.layers.0.rotary_emb.inv_freq is in model.safetensors and not in the model",
        "lm_head.weight has shape [3, 5], want [96, 48]",
        "model.norm.weight has dtype torch.int64",
    ):
        assert words in message
    assert message.count("\n") == 5


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(PretrainedError, match="config.json cannot be read: No such file"):
        Glm5ForCausalLM.from_pretrained(tmp_path)
    randomized().save_pretrained(tmp_path, max_shard_bytes=50_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-10])
    with pytest.raises(CheckpointFilesError, match=f"{shards[1].name} is damaged"):
        Glm5ForCausalLM.from_pretrained(tmp_path)
    shards[1].unlink()
    with pytest.raises(CheckpointFilesError, match=f"{shards[1].name} is missing; model.safetensors.index.json names it"):
        Glm5ForCausalLM.from_pretrained(tmp_path)
    shards[1].write_bytes(whole)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {"model.extra": shards[0].name}}))
    with pytest.raises(CheckpointFilesError, match="names tensors that are not there: model.extra"):
        Glm5ForCausalLM.from_pretrained(tmp_path)
    index.write_text("{")
    with pytest.raises(CheckpointFilesError, match="index.json is damaged"):
        Glm5ForCausalLM.from_pretrained(tmp_path)
    index.unlink()
    with pytest.raises(CheckpointFilesError, match="has neither model.safetensors nor"):
        Glm5ForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(PretrainedError, match="config.json is not JSON: not an object"):
        Glm5ForCausalLM.from_pretrained(tmp_path)


def test_unknown_options():
    with pytest.raises(ValueError, match="fp8 is 'int4'"):
        Glm5ForCausalLM.from_pretrained("nowhere", fp8="int4")
    with pytest.raises(ValueError, match="dtype is torch.float16, want one of torch.float32, torch.bfloat16"):
        Glm5ForCausalLM.from_pretrained("nowhere", dtype=torch.float16)


def test_an_mtp_layer_that_was_dropped_is_told_of(tmp_path):
    randomized().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if not n.startswith("model.layers.3.")}, file)
    with pytest.warns(UserWarning, match="layer 3 has no tensors; the model has no MTP layer"):
        model = Glm5ForCausalLM.from_pretrained(tmp_path)
    assert model.model.mtp is None


def test_repeated_embeddings_and_heads_must_be_the_shared_ones(tmp_path):
    model = randomized()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, file)
    assert_same(model, Glm5ForCausalLM.from_pretrained(tmp_path))
    tensors["model.layers.3.shared_head.head.weight"][3, 4] += 1
    save_file(tensors, file)
    with pytest.raises(PretrainedError, match="shared_head.head.weight differs from lm_head.weight"):
        Glm5ForCausalLM.from_pretrained(tmp_path)


def test_dtypes_that_torch_does_not_have_are_named(tmp_path):
    randomized().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    entry = header["model.norm.weight"]
    entry["dtype"], entry["shape"] = "U16", [96]  # the same bytes
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    with pytest.raises(PretrainedError, match="model.norm.weight has shape"):
        Glm5ForCausalLM.from_pretrained(tmp_path)
