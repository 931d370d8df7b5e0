"""Tokens on disk: memory-mapped shards and the manifest that vouches for them.

``DataWriter`` makes a data folder, ``open_data`` reads one. Knows nothing about where text comes from, what a recipe says,
or how documents are drawn and packed.

    manifest.json                      written last; no time and no path of a machine in it
    tokenizer/                         as its save() writes it
    shards/<domain>-<number>.bin       token ids, little-endian uint16 (vocabulary <= 65536) or uint32, one document after
                                       the other, each whole as a model sees it
    shards/<domain>-<number>.idx       int64 [documents + 1]: where documents begin and end, in tokens
    shards/<domain>-<number>.mask      uint8 a token, 1 where it is a target that the loss counts; no file: all are

The held-out part of domain "code" is a domain too, "code/validation"; in a file's name the slash is a dot.
"""

import fcntl
import hashlib
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from glm5._files import TEMPORARY, sync_folder, write_atomically

VERSION = 1
MANIFEST = "manifest.json"
SHARDS = "shards"
TOKENIZER = "tokenizer"
VALIDATION = "/validation"  # ends the name of a domain's held-out part
DOMAIN_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]*(/validation)?$"
SHARD_TOKENS = 1 << 27
_HASHED_AT_ONCE = 1 << 22


class DataError(ValueError):
    """A data folder that cannot be used, or written; the message names the file."""


# ---- the manifest ----


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerEntry(_Strict):
    """What the token ids mean."""

    kind: str
    digest: str
    vocab_size: PositiveInt


class DomainEntry(_Strict):
    documents: NonNegativeInt
    tokens: NonNegativeInt
    bytes: NonNegativeInt  # of text, before it became tokens
    licences: dict[str, PositiveInt]  # documents under each


class ShardEntry(_Strict):
    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # the name without its suffix
    domain: str = Field(pattern=DOMAIN_PATTERN)
    documents: PositiveInt
    tokens: PositiveInt
    sha256: dict[Literal["bin", "idx", "mask"], str]  # of each file that there is


class FilterCounts(_Strict):
    """What became of the documents of one source."""

    kept: NonNegativeInt
    dropped: dict[str, NonNegativeInt]  # by the rule that dropped them


class ValidationEntry(_Strict):
    """A document is held out if a hash of its id says so, one in so many; 0: none are."""

    one_in: NonNegativeInt


class Manifest(_Strict):
    version: Literal[1]
    recipe: str  # digest of the recipe the folder was built from
    tokenizer: TokenizerEntry
    validation: ValidationEntry
    domains: dict[str, DomainEntry]
    filters: dict[str, FilterCounts]  # by source
    shards: list[ShardEntry]


def is_held_out(document_id: str, one_in: int) -> bool:
    """Whether a document belongs to the validation set: a hash of its id, so that a document never changes sides."""
    return one_in > 0 and int.from_bytes(hashlib.sha256(document_id.encode()).digest()[:8], "little") % one_in == 0


def _token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


# ---- writing ----


class _File:
    """A file with the sha256 of what went into it."""

    def __init__(self, path: Path):
        self._file, self._hash = open(path, "wb", buffering=1 << 20), hashlib.sha256()

    def write(self, array: np.ndarray) -> None:
        raw = memoryview(np.ascontiguousarray(array)).cast("B")
        self._hash.update(raw)
        self._file.write(raw)

    def close(self) -> str:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()


class _ShardFiles:
    """One shard while it grows."""

    def __init__(self, folder: Path, name: str, domain: str, dtype: np.dtype, with_mask: bool):
        self.name, self.domain, self.documents, self.tokens = name, domain, 0, 0
        self._dtype = dtype
        self._files = {kind: _File(folder / f"{name}.{kind}") for kind in ("bin", "idx", *(["mask"] if with_mask else []))}
        self._files["idx"].write(np.zeros(1, "<i8"))

    def add(self, tokens: np.ndarray, mask: np.ndarray | None) -> None:
        self.documents, self.tokens = self.documents + 1, self.tokens + len(tokens)
        self._files["bin"].write(tokens.astype(self._dtype, copy=False))
        self._files["idx"].write(np.array([self.tokens], "<i8"))
        if mask is not None:
            self._files["mask"].write(mask.astype(np.uint8, copy=False))

    def close(self) -> ShardEntry:
        return ShardEntry(
            file=self.name,
            domain=self.domain,
            documents=self.documents,
            tokens=self.tokens,
            sha256={kind: file.close() for kind, file in self._files.items()},
        )


class DataWriter:
    """Writes a data folder that is there whole or not at all, and holds one document at a time.

    Until ``finish`` everything is in ``scratch``, a hidden folder beside ``out``; what a killed writer left there, the next
    one clears away. Use it as a context manager: leaving without ``finish`` removes the scratch folder.

    >>> with DataWriter(Path("runs/data/mine"), tokenizer=ByteTokenizer()) as writer:  # doctest: +SKIP
    ...     writer.add("code", tokens, num_bytes=len(text), licence="MIT")
    ...     data = writer.finish()

    Args:
        out: the folder to make; it must not exist.
        tokenizer: whose ids are added; saved, and named in the manifest. May be set later, before the first document.
        recipe: digest of what the folder is built from.
        one_in: see ``is_held_out``; recorded, the caller decides a document's domain.
        shard_tokens: a shard with documents in it is closed before it would pass this.

    Raises:
        DataError: ``out`` exists, or another process is at work on it.
    """

    def __init__(
        self, out: Path | str, tokenizer=None, *, recipe: str = "", one_in: int = 0, shard_tokens: int = SHARD_TOKENS
    ):
        self.out = Path(out)
        self.tokenizer = tokenizer
        self._recipe, self._one_in, self._shard_tokens = recipe, one_in, shard_tokens
        self._open: dict[str, _ShardFiles] = {}
        self._done: list[ShardEntry] = []
        self._masked: dict[str, bool] = {}
        self._bytes: Counter[str] = Counter()
        self._licences: dict[str, Counter[str]] = {}
        if self.out.exists():
            raise DataError(f"{self.out} exists already; remove it or choose another folder")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.scratch = self.out.with_name(f"{TEMPORARY}{self.out.name}")
        self._lock = _lock_folder(self.scratch)
        try:
            for left in self.scratch.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            (self.scratch / SHARDS).mkdir()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> "DataWriter":
        return self

    def __exit__(self, *_) -> None:
        if self._lock is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)
            os.close(self._lock)
            self._lock = None

    def add(
        self,
        domain: str,
        tokens: np.ndarray,
        *,
        mask: np.ndarray | None = None,
        num_bytes: int = 0,
        licence: str = "unknown",
    ) -> None:
        """One document.

        Args:
            domain: where it belongs, "code" or "code/validation".
            tokens: ids [n], n >= 1, whole as a model sees them.
            mask: [n], nonzero where the token is a target that counts; all documents of a domain have one, or none has.
            num_bytes: of its text.
            licence: an SPDX expression where it is known.

        Raises:
            DataError: no tokens, ids outside the vocabulary, a mask of another length, a mask here and none before.
        """
        if domain not in self._masked:
            if not re.match(DOMAIN_PATTERN, domain):
                raise DataError(f"domain {domain!r}: want letters, digits, _ and -; a held-out part ends in {VALIDATION}")
            self._masked[domain], self._licences[domain] = mask is not None, Counter()
        if len(tokens) == 0:
            raise DataError(f"domain {domain}: a document without tokens")
        if not 0 <= tokens.min() <= tokens.max() < self.tokenizer.vocab_size:
            last = self.tokenizer.vocab_size - 1
            raise DataError(f"domain {domain}: token ids from {tokens.min()} to {tokens.max()}, want 0 to {last}")
        if (mask is not None) != self._masked[domain]:
            raise DataError(f"domain {domain}: documents with a loss mask and without; want all with, or none")
        if mask is not None and len(mask) != len(tokens):
            raise DataError(f"domain {domain}: a mask of {len(mask)} for {len(tokens)} tokens")
        shard = self._open.get(domain)
        if shard is not None and shard.tokens + len(tokens) > self._shard_tokens:
            self._done.append(self._open.pop(domain).close())
            shard = None
        if shard is None:
            number = sum(done.domain == domain for done in self._done)
            name = f"{domain.replace('/', '.')}-{number:05}"
            dtype = _token_dtype(self.tokenizer.vocab_size)
            shard = self._open[domain] = _ShardFiles(self.scratch / SHARDS, name, domain, dtype, mask is not None)
        shard.add(tokens, None if mask is None else mask != 0)
        self._bytes[domain] += num_bytes
        self._licences[domain][licence] += 1

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains that have a document."""
        return tuple(self._masked)

    def finish(self, filters: dict[str, FilterCounts] | None = None) -> "DataFolder":
        """Writes tokenizer and manifest, removes all else that a builder kept in ``scratch``, moves the folder to its place.

        Raises:
            DataError: nothing was added.
        """
        if not self._masked:
            raise DataError(f"{self.out}: no documents were added")
        shards = sorted([*self._done, *(shard.close() for shard in self._open.values())], key=lambda s: (s.domain, s.file))
        domains = {}
        for name in sorted(self._masked):
            mine = [shard for shard in shards if shard.domain == name]
            domains[name] = DomainEntry(
                documents=sum(shard.documents for shard in mine),
                tokens=sum(shard.tokens for shard in mine),
                bytes=self._bytes[name],
                licences=dict(sorted(self._licences[name].items())),
            )
        manifest = Manifest(
            version=VERSION,
            recipe=self._recipe,
            tokenizer=TokenizerEntry(
                kind=self.tokenizer.kind, digest=self.tokenizer.digest, vocab_size=self.tokenizer.vocab_size
            ),
            validation=ValidationEntry(one_in=self._one_in),
            domains=domains,
            filters=filters or {},
            shards=shards,
        )
        for path in self.scratch.iterdir():
            if path.name != SHARDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        sync_folder(self.scratch / SHARDS)
        self.tokenizer.save(self.scratch / TOKENIZER)
        write_atomically(self.scratch / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
        self.scratch.rename(self.out)
        sync_folder(self.out.parent)
        os.close(self._lock)
        self._lock = None
        return open_data(self.out)


def _lock_folder(folder: Path) -> int:
    """Makes `folder` where it is missing and locks it. The lock moves with the folder when it is renamed."""
    while True:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise DataError(f"{folder} is in use by another process; wait for it or choose another folder") from None
        try:
            if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # its owner finished and moved it away meanwhile


# ---- reading ----


class Lengths:
    """Tokens of each document of a domain, read from the disk as they are asked for: by number, slice or index array."""

    def __init__(self, shards: list["_Shard"], first: np.ndarray):
        self._shards, self._first = shards, first

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, which):
        """int for a number, int64 [k] for a slice or an array of k numbers."""
        if isinstance(which, slice):
            which = np.arange(*which.indices(len(self)))
        asked = np.asarray(which, np.int64)
        if asked.size and not -len(self) <= asked.min() <= asked.max() < len(self):
            raise IndexError(f"documents {asked.min()} to {asked.max()} of {len(self)}")
        numbers = np.where(asked < 0, asked + len(self), asked)
        place = np.searchsorted(self._first, numbers, side="right") - 1
        lengths = np.empty(numbers.shape, np.int64)
        for shard in np.unique(place):
            here = place == shard
            local = numbers[here] - self._first[shard]
            index = self._shards[shard].index
            lengths[here] = index[local + 1] - index[local]
        return lengths if numbers.ndim else int(lengths)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or np.int64, copy=False)


class _Shard:
    """The files of one shard, mapped when they are first looked at."""

    def __init__(self, folder: Path, entry: ShardEntry, dtype: np.dtype):
        self._folder, self._entry, self._dtype, self._maps = folder, entry, dtype, {}

    def _map(self, kind: str, dtype) -> np.ndarray:
        if kind not in self._maps:  # a plain array over the mapping: slicing a memmap object costs 20 times as much
            self._maps[kind] = np.asarray(np.memmap(self._folder / f"{self._entry.file}.{kind}", dtype, mode="r"))
        return self._maps[kind]

    @property
    def index(self) -> np.ndarray:
        return self._map("idx", "<i8")

    def view(self, kind: str, document: int) -> np.ndarray:
        begin, end = self.index[document], self.index[document + 1]
        return self._map(kind, self._dtype if kind == "bin" else np.uint8)[begin:end]

    @property
    def has_mask(self) -> bool:
        return "mask" in self._entry.sha256


class Domain:
    """The documents of one domain, over all its shards, in the order in which they were added."""

    def __init__(self, name: str, entry: DomainEntry, shards: list[_Shard], counts: list[int]):
        self.name, self.entry, self._shards = name, entry, shards
        self._first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.lengths = Lengths(shards, self._first)

    @property
    def num_documents(self) -> int:
        return self.entry.documents

    @property
    def num_tokens(self) -> int:
        return self.entry.tokens

    def tokens(self, document: int) -> np.ndarray:
        """Ids of a document, a view of the mapped file: uint16 or uint32 [length], read-only."""
        return self._view("bin", document)

    def mask(self, document: int) -> np.ndarray | None:
        """uint8 [length], 1 where the token is a target that counts; None: all are."""
        return self._view("mask", document) if self._shards and self._shards[0].has_mask else None

    def _view(self, kind: str, document: int) -> np.ndarray:
        if not 0 <= document < self.num_documents:
            raise IndexError(f"domain {self.name}: document {document} of {self.num_documents}")
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        return self._shards[shard].view(kind, int(document - self._first[shard]))


class DataFolder:
    """An opened data folder; ``open_data`` makes one.

    Attributes:
        folder, manifest: where it is, what its manifest says.
        digest: sha256 of the manifest, which has the sha256 of every shard: equal digest, equal data.
    """

    def __init__(self, folder: Path, manifest: Manifest, digest: str):
        self.folder, self.manifest, self.digest = folder, manifest, digest
        dtype = _token_dtype(manifest.tokenizer.vocab_size)
        self._domains = {}
        for name, entry in manifest.domains.items():
            mine = [shard for shard in manifest.shards if shard.domain == name]
            shards = [_Shard(folder / SHARDS, shard, dtype) for shard in mine]
            self._domains[name] = Domain(name, entry, shards, [shard.documents for shard in mine])

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of all domains, held-out parts too."""
        return tuple(self._domains)

    def tokenizer(self):
        """The tokenizer of the ids. Raises ValueError if it is missing or not the manifest's."""
        from glm5.data.text import load_tokenizer

        tokenizer = load_tokenizer(self.folder / TOKENIZER)
        if tokenizer.digest != self.manifest.tokenizer.digest:
            raise DataError(f"{self.folder / TOKENIZER} is not the tokenizer of the manifest; build the data again")
        return tokenizer

    def domain(self, name: str) -> Domain:
        """The domain `name`. Raises DataError, naming those there are."""
        if name not in self._domains:
            raise DataError(f"{self.folder} has no domain {name!r}; it has {', '.join(self._domains)}")
        return self._domains[name]


def open_data(folder: Path | str, verify: bool = False) -> DataFolder:
    """Opens a data folder. Sizes of all files are checked, their content too if `verify`; tokens are read when asked for.

    Raises:
        DataError: no manifest, a damaged one, or shards that are not those of the manifest; it names the file.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
        manifest = Manifest.model_validate_json(raw)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{folder} is not a data folder: it has no {MANIFEST}; `glm5 data build` makes one") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path} is damaged: {where + ': ' if where else ''}{first['msg']}; build the data again") from None
    _check_counts(path, manifest)
    dtype = _token_dtype(manifest.tokenizer.vocab_size)
    for shard in manifest.shards:
        sizes = {"bin": shard.tokens * dtype.itemsize, "idx": 8 * (shard.documents + 1), "mask": shard.tokens}
        for kind, digest in shard.sha256.items():
            file = folder / SHARDS / f"{shard.file}.{kind}"
            if not file.is_file():
                raise DataError(f"{file} is missing; build the data again")
            if file.stat().st_size != sizes[kind]:
                raise DataError(
                    f"{file} has {file.stat().st_size} bytes, the manifest says {sizes[kind]}; build the data again"
                )
            if verify and _sha256(file) != digest:
                raise DataError(f"{file} is damaged: its sha256 is not the manifest's; build the data again")
    return DataFolder(folder, manifest, hashlib.sha256(raw).hexdigest())


def _check_counts(path: Path, manifest: Manifest) -> None:
    """The manifest agrees with itself."""
    totals = {name: [0, 0] for name in manifest.domains}
    for shard in manifest.shards:
        if shard.domain not in totals:
            raise DataError(f"{path} is damaged: shard {shard.file} is of a domain {shard.domain!r} that is not listed")
        if not {"bin", "idx"} <= shard.sha256.keys():
            raise DataError(f"{path} is damaged: shard {shard.file} has no sha256 for its .bin or .idx")
        totals[shard.domain][0] += shard.documents
        totals[shard.domain][1] += shard.tokens
    for name, entry in manifest.domains.items():
        if totals[name] != [entry.documents, entry.tokens]:
            raise DataError(
                f"{path} is damaged: domain {name} has {entry.documents} documents and {entry.tokens} tokens, "
                f"its shards {totals[name][0]} and {totals[name][1]}"
            )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()
