"""Checkpoints that survive kills, full disks and bit rot: folders of safetensors files under a manifest of their hashes.

A checkpoint is written under a temporary name, flushed to disk, and renamed: it is there whole or not at all. Reading one
compares every file with the sha256 in the manifest. What the tensors mean is not known here.
"""

import errno
import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load, save

from glm5._files import TEMPORARY, sync_folder, write_synced

_MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message names the file and says what is still intact."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds and where in its run it belongs."""

    stage: str
    step: int  # updates done in this stage
    recipe: str  # digest of the recipe
    model: str  # digest of the model's configuration: a preset may change from one version to the next
    corpus: str  # digest of the text
    metrics_bytes: int  # length of metrics.jsonl at that moment
    files: dict[str, str] = field(default_factory=dict)  # file name -> sha256


class CheckpointStore:
    """The checkpoints of one run, in `folder`, in the order of `stages` and, within a stage, of steps.

    Args:
        folder: created if absent; leftovers of a killed write are removed.
        stages: names of the run's stages, in order.
        keep: how many unfinished-stage checkpoints to keep; the last of every stage always stays.
        writable: False leaves the folder exactly as it is, for readers beside a run at work.
    """

    def __init__(self, folder: Path, stages: list[str], keep: int = 2, writable: bool = True):
        self.folder, self.stages, self.keep = Path(folder), list(stages), keep
        if not writable:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(TEMPORARY + "*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def path(self, stage: str, step: int) -> Path:
        return self.folder / f"{stage}-{step:06d}"

    def list(self) -> list[Path]:
        """Checkpoint folders, oldest first."""
        found = []
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            stage, _, step = path.name.rpartition("-")
            if stage in self.stages and step.isdigit():
                found.append((self.stages.index(stage), int(step), path))
        return [path for *_, path in sorted(found)]

    def save(self, manifest: Manifest, files: dict[str, dict[str, torch.Tensor]]) -> Path:
        """Writes `files` (file name without suffix -> named tensors) and then forgets checkpoints that are no longer needed.

        Raises:
            CheckpointError: the disk is full or cannot be written; earlier checkpoints are untouched.
        """
        target = self.path(manifest.stage, manifest.step)
        temporary = self.folder / f"{TEMPORARY}{target.name}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            hashes = {}
            for name, tensors in files.items():
                raw = save({n: t.detach().contiguous() for n, t in tensors.items()})
                write_synced(temporary / f"{name}.safetensors", raw)
                hashes[f"{name}.safetensors"] = hashlib.sha256(raw).hexdigest()
            write_synced(temporary / _MANIFEST, _seal(asdict(manifest) | {"files": hashes}))
            sync_folder(temporary)
            if target.exists():  # a damaged one that this run had to step over
                self._remove(target)
            temporary.rename(target)
            sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(self._explain_failed_write(target, error)) from error
        self._prune(manifest.stage)
        return target

    def load(self, path: Path) -> tuple[Manifest, dict[str, dict[str, torch.Tensor]]]:
        """The manifest and the tensors of the checkpoint at `path`.

        Raises:
            CheckpointError: a file is missing, cut short or changed; the message names it.
        """
        manifest = self._read_manifest(path)
        files = {}
        for name, digest in manifest.files.items():
            try:
                raw = (path / name).read_bytes()
            except OSError as error:
                raise CheckpointError(f"checkpoint {path / name} cannot be read: {error.strerror}") from None
            if hashlib.sha256(raw).hexdigest() != digest:
                raise CheckpointError(f"checkpoint {path / name} is damaged: its sha256 is not the one in the manifest")
            files[name.removesuffix(".safetensors")] = load(raw)
        return manifest, files

    def load_latest(self, say=print) -> tuple[Manifest, dict[str, dict[str, torch.Tensor]]] | None:
        """The newest checkpoint that is intact, or None when there is none at all. Damaged ones are told of through `say`.

        Raises:
            CheckpointError: there are checkpoints and every one is damaged.
        """
        damaged = []
        for path in reversed(self.list()):
            try:
                loaded = self.load(path)
            except CheckpointError as error:
                damaged.append(str(error))
                continue
            for message in damaged:
                say(f"{message}; going back to {path}")
            return loaded
        if damaged:
            raise CheckpointError(f"{damaged[0]}; no intact checkpoint is left, remove {self.folder} to start the run again")
        return None

    def _read_manifest(self, path: Path) -> Manifest:
        file = path / _MANIFEST
        try:
            fields = json.loads(file.read_bytes())
            seal = fields.pop("sha256")
            if json.loads(_seal(fields))["sha256"] != seal:
                raise ValueError
            return Manifest(**fields)
        except OSError as error:
            raise CheckpointError(f"checkpoint {file} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"checkpoint {file} is damaged: not a manifest as it was written") from None

    def _prune(self, stage: str) -> None:
        """Removes all but the newest `keep` of `stage`, and all but the newest one of earlier stages."""
        by_stage: dict[str, list[Path]] = {}
        for path in self.list():
            by_stage.setdefault(path.name.rpartition("-")[0], []).append(path)
        for name, paths in by_stage.items():
            for path in paths[: -(self.keep if name == stage else 1)]:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Renames first, so that a kill halfway leaves no half checkpoint under a checkpoint's name."""
        doomed = self.folder / f"{TEMPORARY}old-{path.name}"
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _explain_failed_write(self, target: Path, error: OSError) -> str:
        intact = self.list()
        kept = f"the checkpoint before it, {intact[-1]}, is untouched" if intact else "there is no earlier one"
        remedy = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make it writable"
        return f"cannot write checkpoint {target}: {error.strerror}; {kept}; {remedy} and run the same command again"


def _seal(fields: dict) -> bytes:
    """JSON of `fields` with a sha256 over the rest of them."""
    text = json.dumps(fields, sort_keys=True)
    return json.dumps(fields | {"sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1).encode()
