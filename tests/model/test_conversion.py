"""glm5 convert's work: every form into every other, bit for bit where it can be, and what lies beside the weights."""

import json

import pytest
import torch
from safetensors.torch import load_file

from glm5 import Glm5ForCausalLM, ops
from glm5.model.conversion import convert_checkpoint
from glm5.model.int4_formats import CompressedTensorsInt4, from_compressed_tensors
from glm5.model.pretrained import checkpoint_views
from tests.model.checkpoints import (
    FP8_SHAPES,
    assert_same,
    change_tensors,
    contents,
    fp8_folder,
    fuse_fp8_experts,
    randomized,
)


def tensors_of(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def assert_equal_files(a, b):
    left, right = tensors_of(a), tensors_of(b)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8)), name


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True, "num_nextn_predict_layers": 0, "n_shared_experts": 0}]
)
@pytest.mark.parametrize("shard", [10**9, 30_000])
def test_hf_to_native_and_back(tmp_path, changes, shard):
    model = randomized(torch.bfloat16, **changes)
    model.save_pretrained(tmp_path / "hf")
    model.save_pretrained(tmp_path / "fused", fused_experts=True)
    convert_checkpoint(tmp_path / "hf", tmp_path / "native", "native", max_shard_bytes=shard)
    assert_equal_files(tmp_path / "native", tmp_path / "fused")
    assert_same(Glm5ForCausalLM.from_pretrained(tmp_path / "native"), model)
    convert_checkpoint(tmp_path / "native", tmp_path / "back", "hf", max_shard_bytes=shard)
    assert_equal_files(tmp_path / "back", tmp_path / "hf")
    for form in ("native", "back"):
        assert json.loads((tmp_path / form / "config.json").read_text()) == json.loads(
            (tmp_path / "hf/config.json").read_text()
        )


@pytest.mark.parametrize("fused", [False, True], ids=["per expert", "fused"])
def test_to_fp8_and_back(tmp_path, fused):
    model = randomized(torch.bfloat16, **FP8_SHAPES)
    model.save_pretrained(tmp_path / "a", fused_experts=fused)
    convert_checkpoint(tmp_path / "a", tmp_path / "fp8", "fp8")
    stored = tensors_of(tmp_path / "fp8")
    assert stored["model.layers.1.mlp.experts.2.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert stored["model.layers.1.self_attn.indexer.wk.weight"].dtype == torch.float8_e4m3fn
    for kept in ("lm_head", "model.embed_tokens", "model.layers.1.mlp.gate", "model.layers.3.eh_proj"):
        assert stored[f"{kept}.weight"].dtype == torch.bfloat16
    quantisation = json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]
    assert quantisation["quant_method"] == "fp8" and "lm_head" in quantisation["modules_to_not_convert"]

    near = Glm5ForCausalLM.from_pretrained(tmp_path / "fp8")
    for name, weight in model.state_dict().items():
        got = near.state_dict()[name].float()
        assert (got - weight.float()).norm() <= 0.04 * weight.float().norm(), name
    # From here on every step is exact.
    convert_checkpoint(tmp_path / "fp8", tmp_path / "again", "fp8")
    assert_equal_files(tmp_path / "again", tmp_path / "fp8")
    convert_checkpoint(tmp_path / "fp8", tmp_path / "wide", "native")
    assert_same(Glm5ForCausalLM.from_pretrained(tmp_path / "wide"), near)
    assert "quantization_config" not in json.loads((tmp_path / "wide/config.json").read_text())


@pytest.mark.parametrize("form", ["hf", "native"])
def test_fp8_experts_in_one_piece(tmp_path, form):
    randomized(torch.bfloat16, **FP8_SHAPES).save_pretrained(tmp_path / "a")
    change_tensors(tmp_path / "a", fuse_fp8_experts)
    convert_checkpoint(tmp_path / "a", tmp_path / "b", form)
    assert_same(Glm5ForCausalLM.from_pretrained(tmp_path / "b"), Glm5ForCausalLM.from_pretrained(tmp_path / "a"))


def test_a_head_of_its_own_in_the_mtp_layer_is_not_dropped_silently(tmp_path):
    randomized().save_pretrained(tmp_path / "a")
    head = "model.layers.3.shared_head.head.weight"
    change_tensors(tmp_path / "a", lambda tensors: tensors | {head: tensors["lm_head.weight"].clone()})
    convert_checkpoint(tmp_path / "a", tmp_path / "b", "hf")
    change_tensors(tmp_path / "a", lambda tensors: tensors | {head: tensors["lm_head.weight"] + 1})
    with pytest.raises(ValueError, match="shared_head.head.weight differs from lm_head.weight"):
        convert_checkpoint(tmp_path / "a", tmp_path / "b", "hf")


def test_dtype(tmp_path):
    fp8_folder(tmp_path / "fp8")
    convert_checkpoint(tmp_path / "fp8", tmp_path / "wide", "hf", dtype=torch.float32)
    assert all(t.dtype == torch.float32 for t in tensors_of(tmp_path / "wide").values())
    assert_same(
        Glm5ForCausalLM.from_pretrained(tmp_path / "wide"),
        Glm5ForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32),
    )


def test_files_beside_the_weights_come_along(tmp_path):
    randomized().save_pretrained(tmp_path / "a", max_shard_bytes=50_000)
    (tmp_path / "a/tokenizer.json").write_text("{}")
    (tmp_path / "a/chat_template.jinja").write_text("hello")
    convert_checkpoint(tmp_path / "a", tmp_path / "b", "hf")
    assert set(contents(tmp_path / "b")) == {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}


@pytest.mark.parametrize("fused", [False, True], ids=["per expert", "fused"])
@pytest.mark.parametrize("group_size", [32, -1])
def test_int4_experts_are_those_that_training_computed_with(tmp_path, fused, group_size):
    """Read back by compressed-tensors' rules and dequantised, the export gives the logits of the model in training."""
    model = randomized(torch.bfloat16, hidden_size=96, moe_intermediate_size=64)
    model.save_pretrained(tmp_path / "a", fused_experts=fused)
    convert_checkpoint(tmp_path / "a", tmp_path / "int4", "int4", group_size=group_size)
    stored, plain = tensors_of(tmp_path / "int4"), checkpoint_views(model)
    packed = [name.removesuffix("_packed") for name in stored if name.endswith(".weight_packed")]
    assert packed and all(".mlp.experts." in name for name in packed)
    assert set(packed) == {name for name in plain if ".mlp.experts." in name}
    for name, tensor in plain.items():
        if name not in packed:
            assert torch.equal(stored[name], tensor), name

    read_back = Glm5ForCausalLM.from_pretrained(tmp_path / "a", attention="dense")
    views = checkpoint_views(read_back)
    for name in packed:
        form = CompressedTensorsInt4(stored[name + "_packed"], stored[name + "_scale"], stored[name + "_shape"], None)
        views[name].copy_(ops.dequantize_int4(*from_compressed_tensors(form)))
    tokens = torch.arange(20)[None]
    model.attention, model.int4_group_size = "dense", group_size
    assert torch.equal(model(tokens).logits, read_back(tokens).logits)

    config = json.loads((tmp_path / "int4/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["format"] == "pack-quantized"
    assert {"lm_head", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.gate"} <= set(config["ignore"])
    assert not any(".mlp.experts." in name for name in config["ignore"])
    with pytest.raises(ValueError, match="quant_method 'compressed-tensors'"):
        Glm5ForCausalLM.from_pretrained(tmp_path / "int4")
    with pytest.raises(ValueError, match="int4_group_size is 48"):
        convert_checkpoint(tmp_path / "a", tmp_path / "c", "int4", group_size=48)


def test_bad_requests_are_named(tmp_path):
    randomized().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="form is 'gguf', want one of hf, native, fp8, int4"):
        convert_checkpoint(tmp_path, tmp_path / "b", "gguf")
    with pytest.raises(ValueError, match="is the source itself"):
        convert_checkpoint(tmp_path, tmp_path, "native")
    with pytest.raises(ValueError, match="config.json cannot be read"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "b", "hf")
