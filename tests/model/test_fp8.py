"""FP8 checkpoints: weights in e4m3 with a scale for each 128 x 128 block, dequantised when read or kept as they are."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from glm5 import Glm5ForCausalLM
from glm5.model.fp8 import Fp8Experts, Fp8Linear, dequantize_fp8, quantize_fp8
from glm5.model.pretrained import PretrainedError
from glm5.model.safetensors_folder import SafetensorsFolder
from tests.model import shapes
from tests.model.checkpoints import FP8_SHAPES, assert_same, change_tensors, fp8_folder, fuse_fp8_experts, randomized


def test_fp8_weights_are_dequantised(tmp_path):
    want = fp8_folder(tmp_path)
    got = Glm5ForCausalLM.from_pretrained(tmp_path)
    assert_same(got, want)
    assert "quantization_config" not in got.extra_config


def test_fp8_weights_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("glm5.model.fp8._told", False)
    want = fp8_folder(tmp_path / "a")
    got = Glm5ForCausalLM.from_pretrained(tmp_path / "a", fp8="keep")
    attention, moe = got.model.layers[1].self_attn, got.model.layers[1].mlp
    assert isinstance(attention.kv_b_proj, Fp8Linear) and isinstance(moe.experts, Fp8Experts)
    ids = shapes.random_tokens(2, 30)
    with pytest.warns(UserWarning, match="dequantised on every use") as told:
        got(ids)
    assert len(told) == 1
    for form in ("sparse", "dense"):
        got.attention = want.attention = form
        assert torch.equal(got(ids, mtp_depth=2).mtp_logits[1], want(ids, mtp_depth=2).mtp_logits[1])
    got.attention = "sparse"
    got.save_pretrained(tmp_path / "b")
    first, second = (SafetensorsFolder(tmp_path / x) for x in "ab")
    with first, second:
        assert first.tensors == second.tensors
        for name in first.tensors:
            assert torch.equal(first.read(name).view(torch.uint8), second.read(name).view(torch.uint8))
    assert json.loads((tmp_path / "b/config.json").read_text())["quantization_config"]["quant_method"] == "fp8"


@pytest.mark.filterwarnings("ignore:FP8 weights are dequantised on every use")
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float8_e8m0fnu])
def test_narrow_fp8_scales(tmp_path, scale_dtype):
    """DeepSeek's later checkpoints have powers of two (ue8m0), some converters write bf16."""
    fp8_folder(tmp_path / "a")
    narrow = {}

    def change(tensors):
        for name in tensors:
            if name.endswith("_scale_inv"):
                narrow[name] = tensors[name].to(scale_dtype)
        return tensors | narrow

    change_tensors(tmp_path / "a", change)
    wide = Glm5ForCausalLM.from_pretrained(tmp_path / "a")
    name = "model.layers.1.self_attn.o_proj.weight"
    with SafetensorsFolder(tmp_path / "a") as stored:
        want = dequantize_fp8(stored.read(name), narrow[name + "_scale_inv"].float(), torch.bfloat16)
    assert torch.equal(wide.get_parameter(name), want)

    kept = Glm5ForCausalLM.from_pretrained(tmp_path / "a", fp8="keep")
    ids = shapes.random_tokens(1, 20)
    assert torch.equal(kept(ids).logits, wide(ids).logits)
    kept.save_pretrained(tmp_path / "b")
    for name, tensor in load_file(tmp_path / "b/model.safetensors").items():
        if name in narrow:
            assert tensor.dtype == scale_dtype and torch.equal(tensor.float(), narrow[name].float())
    kept.bfloat16()
    assert torch.equal(kept(ids).logits, wide(ids).logits)


def test_fp8_experts_in_one_piece(tmp_path):
    randomized(torch.bfloat16, **FP8_SHAPES).save_pretrained(tmp_path)
    change_tensors(tmp_path, fuse_fp8_experts)
    tensors = load_file(tmp_path / "model.safetensors")
    got = Glm5ForCausalLM.from_pretrained(tmp_path)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    want = dequantize_fp8(tensors[name], tensors[name + "_scale_inv"], torch.bfloat16)
    assert torch.equal(got.get_parameter(name), want)
    with pytest.raises(PretrainedError, match="gate_up_proj is FP8 and in one piece, .* fp8='dequantize'"):
        Glm5ForCausalLM.from_pretrained(tmp_path, fp8="keep")


@pytest.mark.filterwarnings("ignore:FP8 weights are dequantised on every use")
def test_kept_fp8_experts_are_written_one_by_one(tmp_path):
    fp8_folder(tmp_path / "a")
    model = Glm5ForCausalLM.from_pretrained(tmp_path / "a", fp8="keep")
    model.save_pretrained(tmp_path / "b", fused_experts=True)
    assert_same(Glm5ForCausalLM.from_pretrained(tmp_path / "b", fp8="keep"), model)


@pytest.mark.filterwarnings("ignore:FP8 weights are dequantised on every use")
def test_casting_a_model_leaves_its_fp8_weights(tmp_path):
    fp8_folder(tmp_path)
    model = Glm5ForCausalLM.from_pretrained(tmp_path, fp8="keep")
    linear = model.model.layers[1].self_attn.o_proj
    before = linear.weight.view(torch.uint8).clone(), linear.weight_scale_inv.clone()
    model.float()
    assert torch.equal(linear.weight.view(torch.uint8), before[0]) and torch.equal(linear.weight_scale_inv, before[1])
    assert linear.weight_scale_inv.dtype == torch.float32 and linear.full_weight().dtype == torch.float32
    assert model(shapes.random_tokens(1, 8)).logits.isfinite().all()
    model.bfloat16()
    assert torch.equal(linear.weight_scale_inv, before[1]) and linear.full_weight().dtype == torch.bfloat16


def test_fp8_scales_that_do_not_fit_are_listed(tmp_path):
    fp8_folder(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]
    name = "model.layers.1.mlp.experts.2.down_proj.weight_scale_inv"
    tensors[name] = tensors[name][:1]
    tensors["model.norm.weight_scale_inv"] = torch.ones(1)
    save_file(tensors, file)
    for fp8 in ("dequantize", "keep"):
        with pytest.raises(PretrainedError) as caught:
            Glm5ForCausalLM.from_pretrained(tmp_path, fp8=fp8)
        assert "up_proj.weight_scale_inv is missing" in str(caught.value)
        assert f"{name} is torch.float32 [1, 2], want [2, 2] in one of float32, bfloat16" in str(caught.value)
        assert "model.norm.weight_scale_inv is in model.safetensors and not in the model" in str(caught.value)


def test_other_quantisations_are_refused(tmp_path):
    fp8_folder(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for quantization in (
        {"quant_method": "gptq"},
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        {"quant_method": "fp8", "weight_block_size": None},
    ):
        path.write_text(json.dumps(values | {"quantization_config": quantization}))
        with pytest.raises(PretrainedError, match="quantization_config has quant_method"):
            Glm5ForCausalLM.from_pretrained(tmp_path)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.floats(1e-6, 1e6), st.integers(0, 2**32))
def test_fp8_quantisation_errs_by_at_most_half_a_step_of_its_block(rows, columns, size, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    weight[:, 0] = 0
    quantised, scale = quantize_fp8(weight)
    error = (dequantize_fp8(quantised, scale, torch.float32) - weight).abs()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128)
            # e4m3 has 3 bits of mantissa, and steps of 2^-9 below 2^-6.
            allowed = torch.maximum(weight[block].abs() * 2.0**-4, scale[i, j] * 2.0**-10) * 1.001
            assert (error[block] <= allowed).all()
