"""Where text comes from. Today one corpus: the Python standard library of the interpreter that runs, so nothing is vendored.

A corpus is two lists of documents, train and validation, split by file, and a digest that tells whether two runs saw the
same text.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Not library text: tests (they repeat it), packages of other authors, tables written by the build on each machine.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
_SKIPPED_PREFIX = "_sysconfigdata"


class CorpusError(ValueError):
    """There is no text to train on, or it is not the text that the run began with."""


@dataclass(frozen=True)
class Corpus:
    """Documents as raw bytes, in the order of their names."""

    train: list[bytes]
    validation: list[bytes]
    digest: str  # sha256 over names and contents: equal digest, equal batches


def is_validation(name: str, one_in: int) -> bool:
    """Whether the file called `name` belongs to the validation set: a hash of its name, so a file never changes sides."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % one_in == 0


def python_stdlib(validation_one_in: int = 20, root: str | Path | None = None) -> Corpus:
    """The ``.py`` files under `root` (by default the running interpreter's standard library) that are UTF-8, tests left out.

    A validation file with the very content of a train file is left out too.

    Raises:
        CorpusError: fewer than one train or one validation file was found.
    """
    root = Path(root or sysconfig.get_path("stdlib"))
    sides: dict[bool, list[bytes]] = {True: [], False: []}
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        name = path.relative_to(root)
        skipped = _SKIPPED_FOLDERS.intersection(name.parts) or name.name.startswith(_SKIPPED_PREFIX)
        if skipped or not path.is_file():  # Debian links some to /etc, where they may be missing
            continue
        raw = path.read_bytes()
        try:
            raw.decode()
        except UnicodeDecodeError:
            continue
        if not raw:
            continue
        digest.update(name.as_posix().encode() + b"\0" + hashlib.sha256(raw).digest())
        sides[is_validation(name.as_posix(), validation_one_in)].append(raw)
    train = set(sides[False])
    sides[True] = [raw for raw in sides[True] if raw not in train]
    if not sides[True] or not sides[False]:
        raise CorpusError(
            f"found {len(sides[False])} train and {len(sides[True])} validation files under {root}; the corpus is Python's "
            "standard library in source form: install it (Debian: libpython3-stdlib) or run another interpreter"
        )
    return Corpus(train=sides[False], validation=sides[True], digest=digest.hexdigest())
