"""A folder of safetensors files: one, or several under an index. Read lazily, written a shard at a time. What the tensors
mean is not known here."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from glm5._files import TEMPORARY, sync_file, sync_folder, write_atomically

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}


class CheckpointFilesError(ValueError):
    """A checkpoint directory cannot be read or written; the message names the file."""


@dataclass(frozen=True)
class StoredTensor:
    """What a header says of a tensor."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str  # the format's own name where torch has none


class SafetensorsFolder:
    """The tensors of ``folder``, by name, as a context manager. Loads nothing before ``read``, and maps one file at a time:
    what has been read of a mapped file counts as memory.

    Raises CheckpointFilesError when there is no checkpoint, a file is missing or damaged, or the index and the files differ.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointFilesError(f"{self.folder} is not a directory")
        self.tensors: dict[str, StoredTensor] = {}
        self._mapped: tuple[str, safe_open] | None = None

    def __enter__(self):
        self._read_headers()
        return self

    def __exit__(self, *_):
        if self._mapped is not None:
            self._mapped[1].__exit__(None, None, None)
        self._mapped = None

    def read(self, name: str) -> torch.Tensor:
        """The tensor, mapped from its file, which stays mapped as long as the tensor is there: copy what is to stay."""
        file = self.tensors[name].file
        if self._mapped is None or self._mapped[0] != file:
            self.__exit__()
            self._mapped = file, self._open(file)
        return self._mapped[1].get_tensor(name)

    def _open(self, file: str) -> safe_open:
        try:
            return safe_open(self.folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointFilesError(f"{self.folder / file} is damaged or not a safetensors file: {error}") from None

    def files(self) -> dict[str, list[str]]:
        """file name -> names of its tensors, in the order in which they lie there."""
        found: dict[str, list[str]] = {}
        for name, stored in self.tensors.items():
            found.setdefault(stored.file, []).append(name)
        return found

    def _read_headers(self) -> None:
        index = self._index()
        for file in sorted(set(index.values())) if index else [SINGLE]:
            path = self.folder / file
            if not path.is_file():
                raise CheckpointFilesError(f"{path} is missing" + (f"; {INDEX} names it" if index else ""))
            with self._open(file) as opened:
                for name in opened.keys():
                    part = opened.get_slice(name)
                    dtype = _DTYPES.get(part.get_dtype(), part.get_dtype())
                    self.tensors[name] = StoredTensor(file, tuple(part.get_shape()), dtype)
        if index:
            strays = [f"{n} (in {f})" for n, f in index.items() if n not in self.tensors or self.tensors[n].file != f]
            if strays:
                raise CheckpointFilesError(f"{self.folder / INDEX} names tensors that are not there: {', '.join(strays)}")

    def _index(self) -> dict[str, str]:
        path = self.folder / INDEX
        if (self.folder / SINGLE).is_file():
            return {}
        if not path.is_file():
            raise CheckpointFilesError(f"{self.folder} has neither {SINGLE} nor {INDEX}")
        try:
            weight_map = json.loads(path.read_bytes())["weight_map"]
            if not all(isinstance(f, str) and "/" not in f for f in weight_map.values()):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointFilesError(
                f"{path} is damaged: want an object with weight_map, tensor name to file name"
            ) from None
        return weight_map


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor that need not exist before ``make`` is called."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(
    folder: Path,
    tensors: dict[str, TensorToWrite],
    max_shard_bytes: int,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Writes ``tensors`` in order, in one file or as shards of at most ``max_shard_bytes`` (a larger tensor gets its own).

    Nothing in ``folder`` changes before every file is complete; files of an earlier checkpoint there are removed last.

    Args:
        progress: called with (bytes written, bytes in all) after each file.

    Raises:
        OSError: the disk is full or not writable; what was there before is still there.
    """
    shards = _shards(tensors, max_shard_bytes)
    names = _free_names(folder, len(shards))
    total, done = sum(t.nbytes for t in tensors.values()), 0
    folder.mkdir(parents=True, exist_ok=True)
    temporary = [folder / f"{TEMPORARY}{name}" for name in names]
    try:
        for path, shard in zip(temporary, shards, strict=True):
            save_file({n: tensors[n].make().contiguous() for n in shard}, path, metadata={"format": "pt"})
            sync_file(path)
            done += sum(tensors[n].nbytes for n in shard)
            progress(done, total)
    except (SafetensorError, OSError) as error:
        for path in temporary:
            path.unlink(missing_ok=True)
        raise OSError(f"cannot write {path.with_name(path.name.removeprefix(TEMPORARY))}: {error}") from error

    # One rename turns the old checkpoint into the new one: the single file's, or, as an index is read only when there is no
    # single file, the index's or the single file's removal.
    for path, name in zip(temporary, names, strict=True):
        path.rename(folder / name)
    if len(shards) > 1:
        weight_map = {n: name for name, shard in zip(names, shards, strict=True) for n in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_atomically(folder / INDEX, json.dumps(index, indent=2) + "\n")
        (folder / SINGLE).unlink(missing_ok=True)
    else:
        (folder / INDEX).unlink(missing_ok=True)
    for pattern in ("model*.safetensors", f"{TEMPORARY}model*.safetensors"):
        for stale in folder.glob(pattern):
            if stale.name not in names:
                stale.unlink()
    sync_folder(folder)


def _free_names(folder: Path, count: int) -> list[str]:
    """File names for the shards that none of an earlier checkpoint's shards has."""
    if count == 1:
        return [SINGLE]
    for attempt in range(1000):
        stem = f"model.{attempt}" if attempt else "model"
        names = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if not any((folder / name).exists() for name in names):
            return names
    raise OSError(f"{folder} is full of shards of other checkpoints: empty it")


def _shards(tensors: dict[str, TensorToWrite], max_shard_bytes: int) -> list[list[str]]:
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}, want >= 1")
    shards, room = [[]], max_shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= tensor.nbytes
    return shards
