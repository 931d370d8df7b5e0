"""A run: a recipe carried out in a folder, stage by stage, from wherever an earlier attempt was cut off.

The folder holds ``recipe.toml``, ``metrics.jsonl``, ``checkpoints/``, ``evaluation.json`` and ``report.html``. Everything
in it is either complete or ignored, so a killed run loses at most the steps since its last checkpoint and ends with the
bits of an uninterrupted one.
"""

import ctypes
import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from glm5._files import write_atomically
from glm5.data import ByteTokenizer, ChatTemplate, MixedDataset
from glm5.data.build import build_data, default_folder
from glm5.data.mixture import mix_shares
from glm5.data.shards import VALIDATION, DataFolder
from glm5.data.synthetic import Shape, make_item
from glm5.recipes import Recipe, RecipeError, load_data_recipe, load_recipe
from glm5.recipes.load import to_toml
from glm5.train.checkpoint import CheckpointStore, Manifest
from glm5.train.loop import StageState, train_stage
from glm5.train.metrics import MetricsLog
from glm5.train.parameters import make_optimizers, put
from glm5.train.plan import config_of
from glm5.train.stages import stage_of

# <malloc.h>
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def build_model(recipe: Recipe):
    """The recipe's model with its initial weights, a function of the seed.

    Raises:
        RecipeError: the recipe overrides a field that the model's configuration does not have, or asks for something that
            the model cannot do.
        ValueError: no such preset, or a field has an impossible value.
    """
    from glm5.model import Glm5ForCausalLM

    config = config_of(recipe)
    _want_fitting(recipe, config)
    return Glm5ForCausalLM(config, dtype=getattr(torch, recipe.model.dtype), seed=recipe.seed)


def _want_fitting(recipe: Recipe, config) -> None:
    """Refuses at once what would fail when its stage is reached, which may be hours later."""
    from glm5.model.int4 import want_group_size

    vocabulary, evaluation = ByteTokenizer.vocab_size, recipe.evaluation
    if config.vocab_size < vocabulary:
        raise RecipeError(
            f"model.overrides.vocab_size is {config.vocab_size}, want at least {vocabulary}: bytes and special tokens"
        )
    lengths = {f"stages.{name}.sequence_length": stage.sequence_length for name, stage in recipe.stages.items()}
    lengths["evaluation.sequence_length"] = evaluation.sequence_length
    prompt = len(ByteTokenizer().encode_document(evaluation.sample_prompt)) - 1
    chats = [len(ChatTemplate("glm-5").render([{"role": "user", "content": p}]).ids) + 2 for p in evaluation.chat_prompts]
    prompt = max([prompt, *chats])
    lengths[f"evaluation.sample_tokens with a prompt of {prompt}"] = prompt + evaluation.sample_tokens
    lengths |= {f"evaluation.longctx.lengths[{i}]": length for i, length in enumerate(evaluation.longctx.lengths)}
    for key, length in lengths.items():
        if length > config.max_position_embeddings:
            raise RecipeError(
                f"{key}: {length} tokens, want at most max_position_embeddings, {config.max_position_embeddings}"
            )
    _want_answerable(evaluation.longctx)
    for name, stage in recipe.stages.items():
        if stage.mtp_depth and not config.num_nextn_predict_layers:
            raise RecipeError(f"stages.{name}.mtp_depth is {stage.mtp_depth}, want 0: the model has no MTP layer")
        if stage.int4_group_size:
            try:
                want_group_size(config, stage.int4_group_size)
            except ValueError as error:
                raise RecipeError(f"stages.{name}.{error}") from None


def _want_answerable(longctx) -> None:
    """Makes an item of each task at each length."""
    for length in longctx.lengths:
        for task in longctx.tasks:
            try:
                make_item(task, 0, 0, length, ByteTokenizer(), shape=Shape(**longctx.shape))
            except (ValueError, TypeError) as error:
                raise RecipeError(f"evaluation.longctx: {error}") from None


def model_tensors(model) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, each tensor once even where modules share it."""
    return dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in model.state_dict()}


def config_digest(config) -> str:
    """Identifies a model's configuration: sha256 of its fields, those that are None left out so that there can be more."""
    said = {name: value for name, value in config.to_dict().items() if value is not None}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def load_model_tensors(model, manifest: Manifest, tensors: dict[str, torch.Tensor]) -> None:
    """Copies a checkpoint's weights into `model`.

    Raises:
        ValueError: the checkpoint is of a model of another configuration, or names or shapes differ.
    """
    if manifest.model != config_digest(model.config):
        raise ValueError(
            "the checkpoint is of a model of another configuration than the recipe's preset has in this version of glm5; "
            "go on with the version it was made with or choose another name=..."
        )
    mine = model_tensors(model)
    for name in mine.keys() | tensors.keys():
        if name not in mine or name not in tensors or mine[name].shape != tensors[name].shape:
            raise ValueError(f"checkpoint and model do not fit: {name} is missing or has another shape")
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])


def load_run(folder: Path, say: Callable[[str], None] = print, average: bool = False):
    """The model of the newest checkpoint in a run folder, with the form of attention that its stage trained.

    Args:
        folder: of the run.
        say: told of what is damaged.
        average: take the running mean of the weights (``ema``) of those that the stage trained.

    Raises:
        ValueError: it is no run folder, has no checkpoint that is whole, or keeps no average.
    """
    if not (folder / "recipe.toml").is_file():
        raise ValueError(f"{folder} is not a run folder: it has no recipe.toml; `glm5 run tiny` makes one")
    recipe = load_recipe(folder / "recipe.toml")
    prepare(recipe)
    loaded = CheckpointStore(folder / "checkpoints", list(recipe.stages), writable=False).load_latest(say)
    if loaded is None:
        raise ValueError(f"{folder} has no checkpoint yet")
    manifest, files = loaded
    model = build_model(recipe)
    stage = stage_of(recipe, manifest.stage)
    stage.form.give(model)
    load_model_tensors(model, manifest, files["model"])
    if average:
        if not stage.recipe.ema:
            raise ValueError(f"{folder} keeps no average of the weights: stages.{manifest.stage}.ema is 0 in its recipe")
        for key, (optimizer, _) in make_optimizers(model, stage).items():
            optimizer.load_state_dict(files[key])
            put(dict(model.named_parameters()), optimizer.averages())
    return model


@dataclass
class Run:
    """An opened run folder. ``open_run`` makes one; ``close`` releases its lock."""

    recipe: Recipe
    folder: Path
    metrics: MetricsLog
    store: CheckpointStore
    data: DataFolder
    lock: int

    def train_dataset(self, name: str) -> MixedDataset:
        """What the stage called `name` trains on; one object for all stages that draw from the same packs."""
        return self._dataset(*self._source(name))

    def held_out(self, domain: str, sequence_length: int) -> MixedDataset:
        """The held-out part of a domain."""
        return self._dataset(((domain + VALIDATION, 1.0),), sequence_length, 0.0)

    def _dataset(self, mix: tuple, sequence_length: int, power: float) -> MixedDataset:
        cache, key = self.__dict__.setdefault("_datasets", {}), (mix, sequence_length, power)
        if key not in cache:
            seed = self.recipe.seed
            cache[key] = MixedDataset(self.data, dict(mix), sequence_length, seed, long_document_power=power)
        return cache[key]

    def _source(self, name: str) -> tuple:
        stage = self.recipe.stages[name]
        shares = mix_shares(_mix_of(self.recipe, name, self.data))  # of equal mixes, however they are written
        return tuple(shares.items()), stage.sequence_length, stage.long_document_power

    def main_domain(self, name: str) -> str:
        """The domain with the largest share in a stage's mix."""
        mix = _mix_of(self.recipe, name, self.data)
        return max(mix, key=mix.get)

    def first_pack(self, name: str) -> int:
        """Packs that earlier stages which draw from the same ones have used up."""
        earlier = list(self.recipe.stages)[: list(self.recipe.stages).index(name)]
        stages = [self.recipe.stages[other] for other in earlier if self._source(other) == self._source(name)]
        return sum(stage.steps * stage.packs_per_step for stage in stages)

    def close(self) -> None:
        self.metrics.close()
        os.close(self.lock)


def _mix_of(recipe: Recipe, name: str, data: DataFolder) -> dict[str, float]:
    """A stage's mix.

    Raises:
        RecipeError: it names a domain that the data do not have, or none where there are several.
    """
    there = [domain for domain in data.domains if not domain.endswith(VALIDATION)]
    mix = recipe.stages[name].mix or dict.fromkeys(there, 1.0)
    unknown = [domain for domain in mix if domain not in there]
    if unknown:
        raise RecipeError(
            f"stages.{name}.mix names {unknown[0]!r}; the domains of {recipe.data.build} are {', '.join(there)}"
        )
    if not recipe.stages[name].mix and len(there) > 1:
        raise RecipeError(f"stages.{name}.mix is missing: {recipe.data.build} has {', '.join(there)}, say how much of each")
    return mix


def open_run(recipe: Recipe, runs: Path) -> Run:
    """Opens or creates ``runs/<name>`` for `recipe`.

    Raises:
        RecipeError: the folder belongs to another recipe, or a stage wants data that are not there.
        ValueError: the data cannot be built; another process is at work in it.
    """
    folder = Path(runs) / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise ValueError(f"{folder} is in use by another glm5 process; wait for it or choose another name=...") from None
    try:
        begun = (folder / "recipe.toml").exists()
        _claim(recipe, folder)
        data_recipe = load_data_recipe(recipe.data.build)
        data = build_data(data_recipe, default_folder(data_recipe, Path(runs)))
        try:
            _want_data(recipe, data)
        except RecipeError:
            if not begun:  # or the corrected recipe would be another one than the folder's
                (folder / "recipe.toml").unlink()
            raise
        store = CheckpointStore(folder / "checkpoints", list(recipe.stages))
        return Run(recipe, folder, MetricsLog(folder / "metrics.jsonl", recipe.wandb), store, data, lock)
    except BaseException:
        os.close(lock)
        raise


def _want_data(recipe: Recipe, data: DataFolder) -> None:
    """Raises RecipeError where the recipe asks the data for something that they do not have."""
    for name in recipe.stages:
        _mix_of(recipe, name, data)
    domain = recipe.evaluation.domain
    if domain and domain + VALIDATION not in data.domains:
        raise RecipeError(f"evaluation.domain: {domain!r} has no held-out part; there are {', '.join(data.domains)}")


def _claim(recipe: Recipe, folder: Path) -> None:
    """Writes recipe.toml, or checks that the one there is the same."""
    path = folder / "recipe.toml"
    if not path.exists():
        write_atomically(path, to_toml(recipe))
        return
    there = load_recipe(path)
    if there != recipe:
        different = ", ".join(_differences(there.model_dump(), recipe.model_dump()))
        raise RecipeError(
            f"{folder} was begun with another recipe (it differs in {different}); choose another name=... or remove it"
        )


def _differences(old: dict, new: dict, path: str = "") -> list[str]:
    found = []
    for key in [*old, *(k for k in new if k not in old)]:
        a, b, name = old.get(key), new.get(key), f"{path}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, name + ".")
        elif a != b:
            found.append(name)
    return found


def resume(run: Run, model, say=print) -> tuple[str, StageState]:
    """Loads the newest intact checkpoint into `model`, cuts metrics back to it, and says where to go on.

    Returns:
        The stage and its state; the first stage at step 0 when there is no checkpoint.

    Raises:
        ValueError: the checkpoint belongs to another recipe or text, or none is intact.
    """
    loaded = run.store.load_latest(say)
    if loaded is None:
        run.metrics.truncate(0)
        return next(iter(run.recipe.stages)), StageState()
    manifest, files = loaded
    if manifest.recipe != run.recipe.digest():
        raise ValueError(
            f"the checkpoints in {run.store.folder} were made with another recipe; remove them or choose another name=..."
        )
    if manifest.corpus != run.data.digest:
        raise ValueError(
            f"the checkpoints in {run.store.folder} were trained on other text (another Python's standard library?); "
            "go on with the interpreter they were made with or choose another name=..."
        )
    stage_of(run.recipe, manifest.stage).form.give(model)
    load_model_tensors(model, manifest, files.pop("model"))
    run.metrics.truncate(manifest.metrics_bytes)
    say(f"resuming {run.folder} at stage {manifest.stage}, step {manifest.step}")
    return manifest.stage, StageState(manifest.step, files)


def run_stages(run: Run, model, say=print, last: str | None = None, long_context: Callable | None = None) -> dict:
    """Trains and evaluates from where the run stands to its end, or to the end of stage `last`. Returns the evaluations.

    `long_context` asks the model where the recipe has ``evaluation.longctx``; see ``Evaluator``.
    """
    from glm5.train.evaluation import Evaluator

    evaluator = Evaluator(run, model, long_context)
    name, state = resume(run, model, say)
    names = list(run.recipe.stages)
    if (name, state.step) == (names[0], 0):  # evaluations that are there belong to checkpoints that somebody removed
        evaluator.forget()
    if last is not None and names.index(last) < names.index(name):
        return evaluator.results  # finished before
    for current in names[names.index(name) :]:
        stage = stage_of(run.recipe, current)

        def save(state: StageState, current=current) -> None:
            recipe, text = run.recipe.digest(), run.data.digest
            manifest = Manifest(current, state.step, recipe, config_digest(model.config), text, run.metrics.sync())
            run.store.save(manifest, {"model": model_tensors(model)} | state.optimizers)

        if state.step < stage.recipe.steps:
            train_stage(
                model,
                current,
                stage,
                run.train_dataset(current),
                run.first_pack(current),
                state,
                run.metrics,
                save,
                evaluator.validation_loss,
            )
        evaluator.after(current)
        state = StageState()
        if current == last:
            break
    return evaluator.results


def prepare(recipe: Recipe) -> None:
    """The process's settings: the recipe's thread count, which decides bits, and memory that is kept for the next step."""
    torch.set_num_threads(recipe.threads)
    # glibc gives large blocks back to the system at once, and every step would fault its activations in again: a quarter of
    # its time. Other C libraries have no mallopt.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20)):
            mallopt(option, value)
