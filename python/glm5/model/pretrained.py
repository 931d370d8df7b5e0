"""Hugging Face directories of ``model_type: glm_moe_dsa``: read into a model, and written from one.

A checkpoint's tensor is a view into one of the model's: ``checkpoint_views`` names them all, and both directions go through
it. Reading streams file by file, so the peak is the model and one shard.
"""

import json
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from glm5._files import write_atomically
from glm5.model.config import Glm5Config
from glm5.model.fp8 import BLOCK, SCALE_DTYPES, Fp8Experts, Fp8Linear, dequantize_fp8, scale_shape
from glm5.model.hf_config import config_from_hf, config_to_hf
from glm5.model.layers import Experts, Linear
from glm5.model.safetensors_folder import SafetensorsFolder, StoredTensor, TensorToWrite, write_safetensors

Progress = Callable[[int, int], None]

SCALE = "_scale_inv"
# Small weights that some checkpoints keep in float32 beside bf16 ones; kept so, because rounding them moves choices.
_FLOAT32_TOO = ("indexer.weights_proj.weight", "mlp.gate.weight")
_COMPUTED = (torch.float32, torch.bfloat16, torch.float64)
_FLOATING = (*_COMPUTED, torch.float16)


class PretrainedError(ValueError):
    """A directory's config and tensors do not fit this model or each other; the message lists everything that does not."""


def read_config(folder: Path) -> tuple[Glm5Config, dict]:
    """(config, the keys of config.json beside it). Raises PretrainedError naming the file."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except OSError as error:
        raise PretrainedError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise PretrainedError(f"{path} is not JSON: {error}") from None
    try:
        return config_from_hf(values)
    except (ValueError, TypeError) as error:
        raise PretrainedError(f"{path}: {error}") from None


def checkpoint_views(model: nn.Module, fused_experts: bool = False) -> dict[str, torch.Tensor]:
    """The model's tensors under the names and in the shapes that a checkpoint has: views, so that writing to one writes to
    the model. ``fused_experts`` keeps [E, 2I, H] and [E, H, I] in one piece, where they are not FP8."""
    views = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, module in model.named_modules():
        if isinstance(module, Fp8Experts) or isinstance(module, Experts) and not fused_experts:
            parts = {n: views.pop(f"{name}.{n}") for n in list(module.state_dict())}
            views |= {f"{name}.{n}": view for n, view in _per_expert(parts).items()}
    return dict(sorted(views.items(), key=lambda item: _reading_order(item[0])))


def _per_expert(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    views = {}
    for name, tensor in parts.items():
        if name == "gate_up_proj":
            halves = {"gate_proj.weight": tensor.chunk(2, 1)[0], "up_proj.weight": tensor.chunk(2, 1)[1]}
        elif name.endswith(SCALE):
            halves = {f"{name.removesuffix(SCALE)}.weight{SCALE}": tensor}
        else:
            halves = {f"{name}.weight": tensor}
        views |= {f"{k}.{part}": half[k] for part, half in halves.items() for k in range(half.shape[0])}
    return views


def _reading_order(name: str) -> tuple:
    """Layers, and experts within them, in the order of their numbers."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("."))


def load_pretrained(
    model_class: type,
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    attention: str = "sparse",
    fp8: str = "dequantize",
    progress: Progress = lambda *_: None,
) -> nn.Module:
    """What ``Glm5ForCausalLM.from_pretrained`` does; its docstring says it all."""
    if fp8 not in ("dequantize", "keep"):
        raise ValueError(f"from_pretrained: fp8 is {fp8!r}, want 'dequantize' or 'keep'")
    with opened_checkpoint(folder, dtype, model_class, keep_fp8=fp8 == "keep") as (model, stored, extra):
        model.to_empty(device=torch.get_default_device() if device is None else device)
        _fill(model, stored, progress)
    if fp8 == "dequantize":
        extra.pop("quantization_config", None)
    model.extra_config = extra
    model.attention = attention
    return model


@contextmanager
def opened_checkpoint(folder: Path | str, dtype: torch.dtype | None, model_class: type, keep_fp8: bool = False):
    """Within the block: (a model on the meta device that fits the checkpoint, its tensors, the other keys of config.json).

    Raises PretrainedError or CheckpointFilesError as ``Glm5ForCausalLM.from_pretrained`` says.
    """
    folder = Path(folder)
    if dtype not in (None, *_COMPUTED):
        raise ValueError(f"{folder}: dtype is {dtype}, want one of {', '.join(map(str, _COMPUTED))}")
    config, extra = read_config(folder)
    _check_quantization(folder, extra)
    with SafetensorsFolder(folder) as stored:
        config = _with_mtp_as_stored(config, stored)
        model = model_class(config, dtype=dtype or _dtype(folder, extra, stored), device="meta")
        _follow_stored_dtypes(model, stored, keep_fp8)
        _compare(folder, model, stored, keep_fp8)
        yield model, stored, extra


def save_pretrained(
    model: nn.Module,
    folder: Path | str,
    *,
    max_shard_bytes: int = 5_000_000_000,
    fused_experts: bool = False,
    progress: Progress = lambda *_: None,
) -> None:
    """What ``Glm5ForCausalLM.save_pretrained`` does; its docstring says it all."""
    folder = Path(folder)
    views = checkpoint_views(model, fused_experts)
    tensors = {name: TensorToWrite(tuple(v.shape), v.dtype, lambda v=v: v.cpu()) for name, v in views.items()}
    write_safetensors(folder, tensors, max_shard_bytes, progress)
    write_config(folder, model.config, model.extra_config | {"dtype": str(_main_dtype(model)).removeprefix("torch.")})


def write_config(folder: Path, config: Glm5Config, extra: dict) -> None:
    """config.json."""
    write_atomically(folder / "config.json", json.dumps(config_to_hf(config, extra), indent=2) + "\n")


def _main_dtype(model) -> torch.dtype:
    return model.model.norm.weight.dtype


def _check_quantization(folder: Path, extra: dict) -> None:
    quantization = extra.get("quantization_config")
    if quantization is None:
        return
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size", [BLOCK, BLOCK])
    if method != "fp8" or block is None or list(block) != [BLOCK, BLOCK]:
        raise PretrainedError(
            f"{folder / 'config.json'}: quantization_config has quant_method {method!r} and weight_block_size {block}, "
            f"want 'fp8' with [{BLOCK}, {BLOCK}], or no quantisation"
        )


def _with_mtp_as_stored(config: Glm5Config, stored: SafetensorsFolder) -> Glm5Config:
    """Transformers drops the MTP layer and keeps its number in config.json, so the tensors decide."""
    mtp = int(any(name.startswith(f"model.layers.{config.num_hidden_layers}.") for name in stored.tensors))
    if mtp < config.num_nextn_predict_layers:
        warnings.warn(
            f"{stored.folder}: num_nextn_predict_layers is {config.num_nextn_predict_layers}, but layer "
            f"{config.num_hidden_layers} has no tensors; the model has no MTP layer",
            stacklevel=6,
        )
    return replace(config, num_nextn_predict_layers=mtp)


def _dtype(folder: Path, extra: dict, stored: SafetensorsFolder) -> torch.dtype:
    name = extra.get("dtype") or extra.get("torch_dtype")
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if found is None:
        found = next((t.dtype for n, t in stored.tensors.items() if n == "model.norm.weight"), torch.bfloat16)
    if found not in _COMPUTED:
        raise PretrainedError(
            f"{folder}: the weights are {found}, for which there are no ops; pass dtype=torch.bfloat16 or float32"
        )
    return found


def _follow_stored_dtypes(model: nn.Module, stored: SafetensorsFolder, keep_fp8: bool) -> None:
    """Puts float32 parameters, and FP8 modules where they are kept, into a model on the meta device."""
    for name, module in list(model.named_modules()):
        if keep_fp8 and isinstance(module, Linear) and _is_fp8(stored, f"{name}.weight"):
            out_features, in_features = module.weight.shape
            kept = Fp8Linear(in_features, out_features, module.bias, module.weight.dtype)
            _replace(model, name, kept, _scale_dtype(stored, f"{name}.weight"))
        elif keep_fp8 and isinstance(module, Experts) and _is_fp8(stored, f"{name}.0.gate_proj.weight"):
            kept = Fp8Experts(model.config, module.down_proj.dtype)
            _replace(model, name, kept, _scale_dtype(stored, f"{name}.0.gate_proj.weight"))
        elif f"{name}.weight".endswith(_FLOAT32_TOO) and module.weight.dtype == torch.bfloat16:
            there = stored.tensors.get(f"{name}.weight")
            if there is not None and there.dtype == torch.float32:
                module.weight = nn.Parameter(torch.empty_like(module.weight, dtype=torch.float32))


def _is_fp8(stored: SafetensorsFolder, name: str) -> bool:
    there = stored.tensors.get(name)
    return there is not None and there.dtype == torch.float8_e4m3fn


def _scale_dtype(stored: SafetensorsFolder, name: str) -> torch.dtype:
    """Of an FP8 weight's scales; float32 where they are missing or of a kind that is refused later."""
    there = stored.tensors.get(name + SCALE)
    return there.dtype if there is not None and there.dtype in SCALE_DTYPES else torch.float32


def _replace(model: nn.Module, name: str, module: Fp8Linear | Fp8Experts, scale_dtype: torch.dtype) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module.to("meta"))
    for buffer_name, buffer in module.named_buffers(recurse=False):
        if buffer_name.endswith(SCALE):
            setattr(module, buffer_name, buffer.to(scale_dtype))


def check_copies(config: Glm5Config, stored: SafetensorsFolder) -> None:
    """Raises PretrainedError when a tensor that the model shares differs from what it repeats."""
    for name, original in _copies(config).items():
        if name in stored.tensors:
            _check_copy(stored, name, original)


def _check_copy(stored: SafetensorsFolder, name: str, original: str) -> None:
    if not torch.equal(stored.read(name), stored.read(original)):
        raise PretrainedError(f"{stored.folder}: {name} differs from {original}, which this model shares")


def _copies(config: Glm5Config) -> dict[str, str]:
    """Tensors that a checkpoint may repeat -> those they must equal."""
    embedding = "model.embed_tokens.weight"
    head = embedding if config.tie_word_embeddings else "lm_head.weight"
    copies = {"lm_head.weight": embedding} if config.tie_word_embeddings else {}
    if config.num_nextn_predict_layers:
        layer = f"model.layers.{config.num_hidden_layers}"
        copies |= {f"{layer}.embed_tokens.weight": embedding, f"{layer}.shared_head.head.weight": head}
    return copies


def _compare(folder: Path, model: nn.Module, stored: SafetensorsFolder, keep_fp8: bool) -> None:
    """Raises PretrainedError listing every tensor that is missing, extra, misshapen or of a dtype that cannot be read."""
    wanted = checkpoint_views(model)
    fused = checkpoint_views(model, fused_experts=True)
    copies = _copies(model.config)
    wrong = []

    def check(name: str, there: StoredTensor, shape: tuple[int, ...]) -> None:
        if there.shape != shape:
            wrong.append(f"{name} has shape {list(there.shape)}, want {list(shape)}")
        elif there.dtype == torch.float8_e4m3fn:
            scale = stored.tensors.get(name + SCALE)
            if scale is None:
                wrong.append(f"{name} is float8_e4m3fn and {name + SCALE} is missing")
            elif scale.shape != scale_shape(shape) or scale.dtype not in SCALE_DTYPES:
                dtypes, size = ", ".join(str(d).removeprefix("torch.") for d in SCALE_DTYPES), list(scale_shape(shape))
                wrong.append(f"{name + SCALE} is {scale.dtype} {list(scale.shape)}, want {size} in one of {dtypes}")
        elif there.dtype not in (SCALE_DTYPES if name.endswith(SCALE) else _FLOATING):
            wrong.append(f"{name} has dtype {there.dtype}, want a floating one")

    seen = set()
    for name, there in stored.tensors.items():
        base = name.removesuffix(SCALE)
        if name in wanted:
            check(name, there, tuple(wanted[name].shape))
            seen.add(name)
        elif name in fused:
            check(name, there, tuple(fused[name].shape))
            seen |= set(_parts_of(name, wanted))
            if keep_fp8 and there.dtype == torch.float8_e4m3fn:
                wrong.append(f"{name} is FP8 and in one piece, which can only be read with fp8='dequantize'")
        elif 0 in there.shape:
            continue  # Transformers writes the weights of shared experts that have no width
        elif name in copies:
            check(name, there, tuple(wanted[copies[name]].shape))
        elif base == name or not _is_fp8(stored, base) or base not in wanted and base not in fused:
            wrong.append(f"{name} is in {there.file} and not in the model")
    wrong += [f"{name} is missing" for name in wanted if name not in seen]
    if wrong:
        raise PretrainedError(f"{folder} does not fit its config.json:\n  " + "\n  ".join(wrong))


def _parts_of(fused_name: str, names) -> list[str]:
    """The per-expert names that a fused one stands for."""
    prefix, _, kind = fused_name.rpartition(".")
    ends = ("gate_proj.weight", "up_proj.weight") if kind == "gate_up_proj" else (f"{kind}.weight",)
    return [n for n in names if n.startswith(prefix + ".") and n.endswith(ends)]


@torch.no_grad()
def _fill(model: nn.Module, stored: SafetensorsFolder, progress: Progress) -> None:
    copies = _copies(model.config)
    views = checkpoint_views(model) | checkpoint_views(model, fused_experts=True)
    total = sum(torch.Size(t.shape).numel() for t in stored.tensors.values())
    done = 0
    for names in stored.files().values():
        for name in names:
            tensor = stored.read(name)
            done += tensor.numel()
            if name in copies:
                _check_copy(stored, name, copies[name])
            elif name in views:
                view = views[name]
                if tensor.dtype == torch.float8_e4m3fn and view.dtype != tensor.dtype:
                    tensor = dequantize_fp8(tensor, stored.read(name + SCALE), view.dtype)
                view.copy_(tensor)
            progress(done, total)
