"""Documents from where they lie: folders, git checkouts, installed packages, JSONL, parquet; in an order that stays.

One document is in memory at a time, and the names of one folder or package. What becomes of a document is not decided here;
only a file that is too long to be read is passed over by name.
"""

import fnmatch
import gzip
import json
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from glm5.data import repository
from glm5.recipes.data_schema import (
    ConversationsSource,
    DialoguesSource,
    FolderSource,
    GitSource,
    JsonlSource,
    PackageSource,
    ParquetSource,
    SourceRecipe,
    StdlibSource,
    SyntheticSource,
)


class SourceError(ValueError):
    """A source that is not there or cannot be read; the message names it."""


@dataclass(frozen=True)
class Document:
    """One document. `text` is None where it was passed over as too long."""

    id: str
    text: bytes | None
    path: str  # in its source; its suffix tells the language
    licence: str = "unknown"
    group: str | None = None  # documents of a group are held out together; None: it is alone


def read(name: str, source: SourceRecipe, max_bytes: int) -> Iterator[Document]:
    """The documents of source `name`; those longer than `max_bytes` without their text.

    Raises:
        SourceError: the source is missing, broken, or has no documents at all.
    """
    prefix = f"{name}/" if source.id_prefix is None else source.id_prefix
    empty = True
    for document in _READERS[source.kind](source, max_bytes):
        empty = False
        licence = source.licence or (spdx(document.text) if document.text else None) or document.licence
        group = None if document.group is None else prefix + document.group
        yield replace(document, id=prefix + document.id, licence=licence, group=group)
    if empty:
        where = {key: getattr(source, key, None) for key in ("path", "names", "include", "exclude")}
        told = ", ".join(f"{key} = {_shown(value)}" for key, value in where.items() if value is not None)
        raise SourceError(f"source {name} has no documents: {told}")


def _shown(value) -> str:
    return json.dumps(value if isinstance(value, str) else list(value))


# ---- licences ----

_SPDX = re.compile(rb"SPDX-License-Identifier:[ \t]*([A-Za-z0-9.+() -]*[A-Za-z0-9.+)])")
_LICENCE_FILES = ("LICENSE", "LICENCE", "LICENSE.txt", "LICENSE.md", "COPYING", "LICENSE.rst")
# The first whose words are all there.
_PHRASES = (
    ("Apache-2.0", ("Apache License", "Version 2.0")),
    ("MPL-2.0", ("Mozilla Public License", "2.0")),
    ("AGPL-3.0", ("GNU AFFERO GENERAL PUBLIC LICENSE",)),
    ("LGPL-3.0", ("GNU LESSER GENERAL PUBLIC LICENSE", "Version 3")),
    ("LGPL-2.1", ("GNU LESSER GENERAL PUBLIC LICENSE", "Version 2.1")),
    ("GPL-3.0", ("GNU GENERAL PUBLIC LICENSE", "Version 3")),
    ("GPL-2.0", ("GNU GENERAL PUBLIC LICENSE", "Version 2")),
    ("PSF-2.0", ("PYTHON SOFTWARE FOUNDATION LICENSE",)),
    ("ISC", ("Permission to use, copy, modify, and/or distribute",)),
    ("BSD-3-Clause", ("Redistribution and use in source and binary forms", "Neither the name")),
    ("BSD-2-Clause", ("Redistribution and use in source and binary forms",)),
    ("Unlicense", ("This is free and unencumbered software",)),
    ("MIT", ("Permission is hereby granted, free of charge",)),
)


def spdx(text: bytes) -> str | None:
    """The SPDX licence that the first 1,000 bytes of a file name; None: none."""
    found = _SPDX.search(text, 0, 1000)
    return found[1].decode() if found else None


def folder_licence(root: Path) -> str:
    """The licence whose text stands in a folder's LICENSE or COPYING; "unknown": none that is known here."""
    for name in _LICENCE_FILES:
        if (root / name).is_file():
            words = " ".join((root / name).read_text(encoding="utf-8", errors="ignore")[:20_000].split()).casefold()
            for licence, phrases in _PHRASES:
                if all(phrase.casefold() in words for phrase in phrases):
                    return licence
    return "unknown"


# ---- files ----


def _root(path: str) -> Path:
    root = Path(path).expanduser()
    if not root.is_dir():
        raise SourceError(f"{root} is not a folder")
    return root


def _walk(root: Path, skip=lambda name: False) -> Iterator[str]:
    """Paths of all files below `root`, in the order of the whole path as text. Links to folders are not followed."""

    def below(folder: str, path: str) -> Iterator[str]:
        with os.scandir(folder) as entries:
            found = [
                (e.name + "/" * e.is_dir(), e.is_dir(), e.is_symlink(), e.is_file()) for e in entries if not skip(e.name)
            ]
        for name, is_folder, is_link, is_file in sorted(found):
            if is_folder:
                if not is_link:
                    yield from below(os.path.join(folder, name), path + name)
            elif is_file:
                yield path + name

    return below(str(root), "")


def _wanted(path: str, include: tuple[str, ...], exclude: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(path, p) for p in include) and not any(fnmatch.fnmatchcase(path, p) for p in exclude)


def _file(path: Path, max_bytes: int) -> bytes | None:
    """The content; None: it is too long."""
    with open(path, "rb") as file:
        text = file.read(max_bytes + 1)
    return None if len(text) > max_bytes else text


def _is_text(name: str) -> bool:
    """Whether a file's name is text: one that is not has no id."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _samples(source, group: str, licence: str, root: Path, paths: Iterator[str], max_bytes: int) -> Iterator[Document]:
    """Documents of the files at `paths` below `root`, or samples of them as one repository called `group`."""
    wanted = (p for p in paths if _is_text(p) and _wanted(p, source.include, source.exclude))
    if source.samples == "files":
        for path in wanted:
            yield Document(path, _file(root / path, max_bytes), path, licence)
    else:
        texts = repository.samples(list(wanted), lambda path: _file(root / path, max_bytes), source.sample_bytes)
        for number, (first, text) in enumerate(texts):
            yield Document(f"{group}#{number:04}", text, first, licence, group=group)


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _folder(source: FolderSource, max_bytes: int) -> Iterator[Document]:
    root = _root(source.path)
    if source.samples == "files":
        yield from _samples(source, "", folder_licence(root), root, _walk(root, _hidden), max_bytes)
        return
    for name in sorted(e.name for e in os.scandir(root) if e.is_dir(follow_symlinks=False) and not _hidden(e.name)):
        inside = root / name
        yield from _samples(source, name, folder_licence(inside), inside, _walk(inside, _hidden), max_bytes)


_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
_SKIPPED_PREFIX = "_sysconfigdata"  # tables written by the build on each machine


def _stdlib(source: StdlibSource, max_bytes: int) -> Iterator[Document]:
    root = _root(source.path or sysconfig.get_path("stdlib"))
    for path in _walk(root, skip=_SKIPPED_FOLDERS.__contains__):
        if path.endswith(".py") and not PurePosixPath(path).name.startswith(_SKIPPED_PREFIX):
            yield Document(path, _file(root / path, max_bytes), path)


def _packages(source: PackageSource, max_bytes: int) -> Iterator[Document]:
    from importlib import metadata

    for name in source.names:
        try:
            installed = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            raise SourceError(f"package {name} is not installed here: pip install {name}") from None
        files = (file for file in installed.files or () if not str(file).startswith("..") and file.locate().is_file())
        licence, root = _package_licence(installed.metadata), Path(installed.locate_file(""))
        yield from _samples(source, name, licence, root, iter(sorted(map(str, files))), max_bytes)


def _package_licence(fields) -> str:
    """What a distribution's metadata say: the SPDX expression, else a short License field."""
    expression = fields.get("License-Expression")
    words = (fields.get("License") or "").strip()
    return expression or (words if 0 < len(words) <= 40 and "\n" not in words else "unknown")


# ---- git ----


def _git(source: GitSource, max_bytes: int) -> Iterator[Document]:
    root = _root(source.path)
    licence = folder_licence(root)
    names = (raw.decode(errors="surrogateescape") for raw in repository.git(root, "ls-files", "-z").split(b"\0") if raw)
    tracked = (path for path in names if (root / path).is_file() and not (root / path).is_symlink())
    yield from _samples(source, root.resolve().name, licence, root, tracked, max_bytes)
    if source.commits:

        def wanted(path: str) -> bool:
            return _is_text(path) and _wanted(path, source.include, source.exclude)

        issues = repository.read_issues(Path(source.issues).expanduser()) if source.issues else {}
        for commit, text in repository.commits(root, source.commits, wanted, issues, source.sample_bytes):
            yield Document(f"commit/{commit}", text, f"commit/{commit}.diff", licence)


# ---- rows ----


def _row_files(path: str, suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
    root = Path(path).expanduser()
    if root.is_dir():
        return [(p, root / p) for p in _walk(root) if p.endswith(suffixes)]
    if not root.is_file():
        raise SourceError(f"{root} does not exist")
    return [(root.name, root)]


def _row(source, file: str, number: int, fields: dict, place: str) -> Document:
    text = fields.get(source.text)
    if not isinstance(text, str):
        what = "has none" if source.text not in fields else f"is {type(text).__name__}"
        raise SourceError(f"{place}: field {source.text!r} {what}, want text; its fields are {', '.join(fields)}")
    name = f"{file}:{number}" if source.id is None else fields.get(source.id)
    if name is None:
        raise SourceError(f"{place}: no id in field {source.id!r}; its fields are {', '.join(fields)}")
    licence = fields.get(source.licence_field) if source.licence_field else None
    # JSON can spell half a surrogate pair, which UTF-8 cannot: such a text is not decodable, and its filter says so.
    return Document(str(name), text.encode("utf-8", "surrogatepass"), file, str(licence) if licence else "unknown")


_JSONL = (".jsonl", ".jsonl.gz")


def _jsonl(source: JsonlSource, max_bytes: int) -> Iterator[Document]:
    longest = 6 * max_bytes + (1 << 20)  # JSON may write a byte as six characters, and there are other fields
    for name, path in _row_files(source.path, _JSONL):
        with gzip.open(path, "rb") if name.endswith(".gz") else open(path, "rb") as file:
            number = 0
            while line := _line(file, longest, path):
                number += 1
                if len(line) > longest:
                    while not line.endswith(b"\n") and (line := file.readline(1 << 20)):
                        pass
                    yield Document(f"{name}:{number}", None, name)
                elif line.strip():
                    try:
                        fields = json.loads(line)
                    except UnicodeDecodeError:
                        yield Document(f"{name}:{number}", line, name)
                        continue
                    except ValueError as error:
                        raise SourceError(f"{path}:{number}: not JSON: {error}") from None
                    if not isinstance(fields, dict):
                        raise SourceError(f"{path}:{number}: want a JSON object, got {type(fields).__name__}")
                    yield _row(source, name, number, fields, f"{path}:{number}")


# ---- conversations, each as the JSON of its record ----


def _conversations(source: ConversationsSource, max_bytes: int) -> Iterator[Document]:
    for name, path in _row_files(source.path, _JSONL):
        with gzip.open(path, "rb") if name.endswith(".gz") else open(path, "rb") as file:
            number = 0
            while line := _line(file, max_bytes, path):
                number += 1
                whole = len(line) <= max_bytes
                while len(line) > max_bytes and not line.endswith(b"\n") and (line := file.readline(1 << 20)):
                    pass
                if not whole or line.strip():
                    yield Document(f"{name}:{number}", line.strip() if whole else None, name)


def _dialogues(source: DialoguesSource, max_bytes: int) -> Iterator[Document]:
    from glm5.data.dialogues import dialogues

    for number, record in enumerate(dialogues(source.seed, source.count)):
        yield Document(f"{source.seed}:{number}", json.dumps(record, ensure_ascii=False).encode(), "dialogues.jsonl")


def _line(file, longest: int, path: Path) -> bytes:
    try:
        return file.readline(longest + 1)
    except (EOFError, gzip.BadGzipFile) as error:
        raise SourceError(f"{path}: {error}") from None


def _parquet(source: ParquetSource, max_bytes: int) -> Iterator[Document]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise SourceError("a source of kind parquet needs the pyarrow package: pip install pyarrow") from None
    columns = [c for c in (source.text, source.id, source.licence_field) if c is not None]
    for name, path in _row_files(source.path, (".parquet",)):
        try:
            file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        except (ArrowException, OSError) as error:
            raise SourceError(f"{path}: not a parquet file: {error}") from None
        with file:
            if missing := [c for c in columns if c not in file.schema_arrow.names]:
                raise SourceError(f"{path} has no column {missing[0]!r}; it has {', '.join(file.schema_arrow.names)}")
            number = 0
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for fields in batch.to_pylist():
                    number += 1
                    yield _row(source, name, number, fields, f"{path}, row {number}")


# ---- what is made up ----


def synthetic(name: str, source: SyntheticSource, haystack: str | None) -> Iterator[Document]:
    """Documents of a synthetic source: each text is the item's parts as JSON, [[text, whether it is an answer], ...].

    Raises:
        SourceError: no such task, a shape that cannot be, a length that does not hold an item.
    """
    from glm5.data.synthetic import Shape, make_item
    from glm5.data.tokenizer import ByteTokenizer

    tokenizer, tasks, lengths = ByteTokenizer(), source.tasks, source.lengths
    try:
        shape = Shape(**source.shape)
        for index in range(source.count):
            task, length = tasks[index % len(tasks)], lengths[index // len(tasks) % len(lengths)]
            item = make_item(task, source.seed, index, length, tokenizer, shape=shape, haystack=haystack)
            text = json.dumps(item.parts).encode()
            yield Document(f"{name}/{index:08}", text, "item.json", source.licence or "unknown")
    except (ValueError, TypeError) as error:
        raise SourceError(f"source {name}: {error}") from None


_READERS = {
    "folder": _folder,
    "git": _git,
    "packages": _packages,
    "python-stdlib": _stdlib,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "conversations": _conversations,
    "dialogues": _dialogues,
}
