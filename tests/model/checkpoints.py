"""Models and checkpoint folders for the tests of reading and writing them."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from glm5 import Glm5ForCausalLM
from glm5.model.fp8 import dequantize_fp8, quantize_fp8
from glm5.model.pretrained import checkpoint_views
from tests.model import shapes


def randomized(dtype=torch.float32, seed=0, **changes) -> Glm5ForCausalLM:
    """A small model in which no parameter has a value of its own making."""
    model = shapes.model("sparse", dtype, **changes)
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return model


def assert_same(a: Glm5ForCausalLM, b: Glm5ForCausalLM) -> None:
    spelt_out = [replace(c, indexer_types=c.layer_indexers, mlp_layer_types=c.layer_mlps) for c in (a.config, b.config)]
    assert spelt_out[0] == spelt_out[1]
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8)), name


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def change_tensors(folder: Path, change) -> None:
    """Rewrites the one file of a checkpoint with ``change(its tensors)``."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file)


# Not multiples of 128, and more than one block.
FP8_SHAPES = dict(hidden_size=136, intermediate_size=264, moe_intermediate_size=136, q_lora_rank=144, kv_lora_rank=136)


def fp8_folder(folder: Path, dtype=torch.bfloat16) -> Glm5ForCausalLM:
    """Writes a checkpoint whose attention and MLP weights are FP8; returns the model of their dequantised values."""
    model = randomized(dtype, **FP8_SHAPES)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    views = checkpoint_views(model)
    for name in list(tensors):
        if name.endswith("_proj.weight") and "weights_proj" not in name or name.endswith(("wq_b.weight", "wk.weight")):
            weight, scale = quantize_fp8(tensors[name])
            tensors[name], tensors[name + "_scale_inv"] = weight, scale
            views[name].copy_(dequantize_fp8(weight, scale, dtype))
    save_file(tensors, file)
    path = folder / "config.json"
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    return model


def fuse_fp8_experts(tensors: dict) -> dict:
    """Quantises each layer's experts in one piece; the numbers are not those of the experts one by one."""
    layers = {name.partition(".experts.")[0] for name in tensors if ".mlp.experts." in name}
    for layer in layers:

        def taken(part, layer=layer, tensors=tensors):
            return torch.stack([tensors.pop(f"{layer}.experts.{k}.{part}.weight").float() for k in range(6)])

        for kind, weight in (
            ("gate_up_proj", torch.cat([taken("gate_proj"), taken("up_proj")], 1)),
            ("down_proj", taken("down_proj")),
        ):
            whole, scale = quantize_fp8(weight)
            tensors |= {f"{layer}.experts.{kind}": whole, f"{layer}.experts.{kind}_scale_inv": scale}
    return tensors
