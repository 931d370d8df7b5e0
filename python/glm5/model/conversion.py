"""A checkpoint directory into another form, tensor by tensor: in memory are one shard that is read and one to be written.

Forms: "hf", one tensor an expert and projection, as Transformers and the serving engines read it; "native", a layer's
experts fused as they are in memory; "fp8", as "hf" with e4m3 weights and a scale for every 128 x 128 block; "int4", as "hf"
with int4 weights in the routed experts (compressed-tensors "pack-quantized"), the bits that quantisation-aware training saw.
"""

import shutil
from functools import partial
from pathlib import Path

import torch

from glm5._files import TEMPORARY
from glm5.model.causal_lm import Glm5ForCausalLM
from glm5.model.fp8 import BLOCK, dequantize_fp8, quantize_fp8, scale_shape
from glm5.model.int4 import quantized, want_group_size
from glm5.model.int4_formats import to_compressed_tensors
from glm5.model.pretrained import SCALE, Progress, check_copies, checkpoint_views, opened_checkpoint, write_config
from glm5.model.safetensors_folder import INDEX, SafetensorsFolder, TensorToWrite, write_safetensors

FORMS = ("hf", "native", "fp8", "int4")

# What stays as it is in FP8: the head and the embedding, what decides choices, and the MTP layer's small projection.
_NOT_QUANTISED = ("lm_head", "weights_proj", "mlp.gate", "eh_proj", "embed_tokens")

_QUANTISATION = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


def convert_checkpoint(
    source: Path | str,
    target: Path | str,
    form: str,
    *,
    dtype: torch.dtype | None = None,
    group_size: int = 32,
    max_shard_bytes: int = 5_000_000_000,
    progress: Progress = lambda *_: None,
) -> None:
    """Writes the checkpoint in ``source`` to ``target``, with every other file that lies beside it (tokenizer, templates).

    Args:
        source: a directory that ``Glm5ForCausalLM.from_pretrained`` reads.
        target: another directory.
        form: "hf", "native", "fp8" or "int4".
        dtype: of what is not quantised; None keeps each tensor's own, and dequantised weights take config.json's.
        group_size: for "int4", how many inputs of an expert's output share a scale: 32, 64, 128, or -1 for all.
        max_shard_bytes, progress: as in ``save_pretrained``.

    Raises:
        ValueError: unknown form, target is source or no directory, source cannot be read, or group_size divides no row.
        OSError: the disk is full or not writable; a checkpoint that was in target is still there.
    """
    source, target = Path(source), Path(target)
    if form not in FORMS:
        raise ValueError(f"convert: the form is {form!r}, want one of {', '.join(FORMS)}")
    if target.exists() and not target.is_dir():
        raise ValueError(f"convert: {target} is not a directory")
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"convert: {target} is the source itself, want another directory")
    with opened_checkpoint(source, dtype, Glm5ForCausalLM) as (model, stored, extra):
        check_copies(model.config, stored)
        extra.pop("quantization_config", None)
        if form == "int4":
            want_group_size(model.config, group_size)
        tensors = _tensors(model, stored, form, dtype, group_size)
        if form == "fp8":
            kept = [n.removesuffix(".weight") for n in tensors if n.removesuffix(".weight").endswith(_NOT_QUANTISED)]
            extra["quantization_config"] = _QUANTISATION | {"modules_to_not_convert": kept}
        elif form == "int4":
            extra["quantization_config"] = _int4_quantisation(model, group_size)
        extra["dtype"] = str(model.model.norm.weight.dtype).removeprefix("torch.")
        write_safetensors(target, tensors, max_shard_bytes, progress)
        write_config(target, model.config, extra)
    for path in source.iterdir():
        written_anew = path.suffix == ".safetensors" or path.name in (INDEX, "config.json")
        if path.is_file() and not written_anew and not path.name.startswith(TEMPORARY):
            shutil.copyfile(path, target / path.name)


def _int4_quantisation(model, group_size: int) -> dict:
    """What compressed-tensors reads: every linear module that is not named is quantised."""
    whole_row = {"strategy": "channel", "group_size": None}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False}
    weights |= whole_row if group_size == -1 else {"strategy": "group", "group_size": group_size}
    linear = [n.removesuffix(".weight") for n, view in checkpoint_views(model).items() if view.dim() == 2]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": [name for name in linear if not _is_routed_expert(name)],
    }


def _is_routed_expert(name: str) -> bool:
    return ".mlp.experts." in name


def _tensors(
    model, stored: SafetensorsFolder, form: str, dtype: torch.dtype | None, group_size: int
) -> dict[str, TensorToWrite]:
    read = _Reader(model, stored)
    tensors = {}
    for name, view in checkpoint_views(model, fused_experts=form == "native").items():
        shape = tuple(view.shape)
        quantised = form == "fp8" and view.dim() == 2 and not name.removesuffix(".weight").endswith(_NOT_QUANTISED)
        if quantised:
            tensors[name] = TensorToWrite(shape, torch.float8_e4m3fn, lambda n=name: read.fp8(n)[0])
            tensors[name + SCALE] = TensorToWrite(scale_shape(shape), torch.float32, lambda n=name: read.fp8(n)[1])
            continue
        if form == "int4" and _is_routed_expert(name):
            rows, columns = shape
            groups = 1 if group_size == -1 else columns // group_size
            parts = {"packed": ((rows, -(-columns // 8)), torch.int32), "scale": ((rows, groups), torch.float32)}
            for part, (size, kind) in (parts | {"shape": ((2,), torch.int64)}).items():
                read_part = partial(read.int4, name, dtype or read.dtype(name), group_size, f"weight_{part}")
                tensors[f"{name}_{part}"] = TensorToWrite(size, kind, read_part)
            continue
        own = view.dtype if name.endswith("e_score_correction_bias") else dtype or read.dtype(name)
        tensors[name] = TensorToWrite(shape, own, lambda n=name, d=own: read.full(n, d))
    return tensors


class _Reader:
    """Tensors by the names of either form, wherever and however they are stored."""

    def __init__(self, model, stored: SafetensorsFolder):
        self.model, self.stored = model, stored
        self.width = model.config.moe_intermediate_size
        self._last: tuple[str, tuple] | None = None

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor is when nobody asks for another dtype; for FP8, what the model computes in."""
        parts = [name] if name in self.stored.tensors else [n for n, _ in self._parts(name)]
        found = self.stored.tensors[parts[0]].dtype
        return self.model.model.norm.weight.dtype if found == torch.float8_e4m3fn else found

    def full(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        if name in self.stored.tensors:
            return self._converted(name, dtype)
        parts = self._parts(name)
        if isinstance(parts[0][1], str):  # experts one by one: stack them
            experts, kinds = self.model.config.n_routed_experts, [part for _, part in parts]
            prefix = name.rpartition(".")[0]
            whole = None
            for k in range(experts):
                one = torch.cat([self.full(f"{prefix}.{k}.{kind}", dtype) for kind in kinds])
                whole = one.new_empty(experts, *one.shape) if whole is None else whole
                whole[k] = one
            return whole
        ((whole, (expert, rows)),) = parts
        return self._converted(whole, dtype, expert)[rows]

    def _converted(self, name: str, dtype: torch.dtype, index=slice(None)) -> torch.Tensor:
        """What is stored under a name, or of a fused tensor one expert's."""
        tensor = self.stored.read(name)[index]
        if tensor.dtype == torch.float8_e4m3fn:
            return dequantize_fp8(tensor, self.stored.read(name + SCALE)[index], dtype)
        return tensor.to(dtype, copy=True)  # or its file would stay mapped

    def fp8(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight, scales), quantised here unless they are stored so."""
        if self._last is None or self._last[0] != name:
            there = self.stored.tensors.get(name)
            if there is not None and there.dtype == torch.float8_e4m3fn:
                pair = self.stored.read(name).clone(), self.stored.read(name + SCALE).to(torch.float32, copy=True)
            else:
                pair = quantize_fp8(self.full(name, torch.float32))
            self._last = name, pair
        return self._last[1]

    def int4(self, name: str, dtype: torch.dtype, group_size: int, part: str) -> torch.Tensor:
        """One tensor of an expert's int4 weight, which is quantised from ``dtype``, in which training computes."""
        if self._last is None or self._last[0] != name:
            weight = quantized(self.full(name, dtype), group_size)
            self._last = name, to_compressed_tensors(weight, scale_dtype=torch.float32)
        return getattr(self._last[1], part)

    def _parts(self, name: str) -> list[tuple]:
        """Where a tensor is that is not stored under its own name: [(fused name, (expert, rows))] or [(name, part), ...]."""
        prefix, _, kind = name.rpartition(".")
        if kind in ("gate_up_proj", "down_proj"):
            kinds = ("gate_proj.weight", "up_proj.weight") if kind == "gate_up_proj" else ("down_proj.weight",)
            return [(f"{prefix}.0.{part}", part) for part in kinds]
        prefix, expert, projection, _ = name.rsplit(".", 3)
        if projection == "down_proj":
            return [(f"{prefix}.down_proj", (int(expert), slice(None)))]
        half = slice(self.width) if projection == "gate_proj" else slice(self.width, None)
        return [(f"{prefix}.gate_up_proj", (int(expert), half))]
