"""Samples of whole repositories, which GLM-5 trains on (its section 2.3): files of one package in one document, and commits.

Files stand under their paths, what is imported before what imports it. A commit's sample has the issues it answers, the
files as they were, the message and the diff. Knows the paths of one package at a time and the text of one sample. Imports
are found by their looks, not by parsing: a wrong guess costs an order, never a file.
"""

import heapq
import json
import posixpath
import re
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from glm5.data.filters import programming_language

_PYTHON = re.compile(rb"(?m)^[ \t]*(?:from[ \t]+(\.*[\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n(]*)|import[ \t]+([\w., \t]+))")
_INCLUDE = re.compile(rb'(?m)^[ \t]*#[ \t]*include[ \t]*["<]([^">\n]+)[">]')
_SCRIPT = re.compile(rb"""(?:from|require\(|import)[ \t(]*["'](\.[^"'\n]+)["']""")
_SCRIPT_SUFFIXES = ("", ".ts", ".tsx", ".js", ".jsx", ".mjs", "/index.ts", "/index.js")
_SLASHES = {
    "c",
    "c++",
    "rust",
    "go",
    "java",
    "kotlin",
    "scala",
    "swift",
    "javascript",
    "typescript",
    "c#",
    "dart",
    "zig",
    "php",
}
_DASHES = {"sql", "lua", "haskell"}


def header(path: str) -> bytes:
    """The line above a file in a sample: its path as a comment of its language."""
    language = programming_language(path)
    mark = "//" if language in _SLASHES else "--" if language in _DASHES else "#"
    return f"{mark} {path}\n".encode()


# ---- order ----


class Files:
    """The paths of a package, as imports name them."""

    def __init__(self, paths: list[str]):
        self._all = set(paths)
        self._by_end: dict[str, list[str]] = defaultdict(list)  # of headers: every path, by its last part
        self._modules: dict[str, str] = {}
        for path in sorted(paths):
            self._by_end[PurePosixPath(path).name].append(path)
            if path.endswith((".py", ".pyi")):
                parts = PurePosixPath(path).with_suffix("").parts
                parts = parts[:-1] if parts[-1] == "__init__" else parts
                for begin in range(min(len(parts), 3)):  # a root may stand above the package: src/glm5/x.py is glm5.x
                    self._modules.setdefault(".".join(parts[begin:]), path)

    def imports(self, path: str, text: bytes) -> set[str]:
        """Paths of the package that the file at `path` names."""
        language = programming_language(path)
        if language == "python":
            found = self._python(path, text)
        elif language in ("c", "c++"):
            found = {self._header(path, m[1].decode(errors="ignore")) for m in _INCLUDE.finditer(text)}
        elif language in ("javascript", "typescript"):
            found = {self._script(path, m[1].decode(errors="ignore")) for m in _SCRIPT.finditer(text)}
        else:
            found = set()
        return found - {None, path}

    def _python(self, path: str, text: bytes) -> set[str | None]:
        found = set()
        package = PurePosixPath(path).parent.parts
        for match in _PYTHON.finditer(text):
            origin, names, modules = ((group or b"").decode(errors="ignore") for group in match.groups())
            if modules:
                found.update(self._modules.get(name.split()[0]) for name in modules.split(",") if name.strip())
                continue
            dots = len(origin) - len(origin.lstrip("."))
            if dots:
                base = package[: len(package) - dots + 1]
                origin = ".".join((*base, *([origin.lstrip(".")] if origin.lstrip(".") else [])))
            words = [word[0] for name in names.strip("()").split(",") if (word := re.search(r"\w+", name))]
            inside = [self._modules.get(f"{origin}.{word}") for word in words]
            found.update(inside if any(inside) else [self._modules.get(origin)])
        return found

    def _header(self, path: str, name: str) -> str | None:
        beside = posixpath.normpath(posixpath.join(posixpath.dirname(path), name))
        if beside in self._all:
            return beside
        ends = [p for p in self._by_end.get(PurePosixPath(name).name, ()) if p == name or p.endswith("/" + name)]
        return ends[0] if ends else None

    def _script(self, path: str, name: str) -> str | None:
        base = posixpath.normpath(posixpath.join(posixpath.dirname(path), name))
        return next((base + suffix for suffix in _SCRIPT_SUFFIXES if base + suffix in self._all), None)


def dependency_order(imports: dict[str, set[str]]) -> list[str]:
    """The keys of `imports`, every one after all that it imports; ties by path.

    Where files import each other in a circle, the one with the fewest imports still to come goes first (Guo et al. 2024).
    """
    waiting = {path: {p for p in named if p in imports and p != path} for path, named in imports.items()}
    importers = defaultdict(set)
    for path, named in waiting.items():
        for other in named:
            importers[other].add(path)
    queue = [(len(named), path) for path, named in waiting.items()]
    heapq.heapify(queue)
    order = []
    while queue:
        count, path = heapq.heappop(queue)
        if path not in waiting or count != len(waiting[path]):
            continue  # done, or there is a newer entry
        del waiting[path]
        order.append(path)
        for importer in importers[path]:
            if importer in waiting:
                waiting[importer].discard(path)
                heapq.heappush(queue, (len(waiting[importer]), importer))
    return order


# ---- samples ----


def samples(paths: list[str], load: Callable[[str], bytes | None], budget: int) -> Iterator[tuple[str, bytes | None]]:
    """The files of a package as samples of at most `budget` bytes, in dependency order.

    Args:
        paths: of the files.
        load: a path's text; None where it is too long. Called twice a file.
        budget: bytes of a sample. A file that does not fit begins the next one.

    Yields:
        (path of the first file, text); (path, None) for a file that is longer than a whole sample. Files that are not UTF-8,
        are empty or have NUL bytes are left out.
    """
    files = Files(paths)
    imports = {}
    for path in paths:
        text = load(path)
        if text is None or len(text) + len(header(path)) + 1 > budget:
            yield path, None
        elif _is_text(text):
            imports[path] = files.imports(path, text)
    parts: list[bytes] = []
    first, size = "", 0
    for path in dependency_order(imports):
        part = header(path) + _ended(load(path) or b"")
        if parts and size + len(part) + 1 > budget:
            yield first, b"\n".join(parts)
            parts, size = [], 0
        if not parts:
            first = path
        parts.append(part)
        size += len(part) + 1
    if parts:
        yield first, b"\n".join(parts)


def _is_text(text: bytes) -> bool:
    if not text or b"\0" in text:
        return False
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _ended(text: bytes) -> bytes:
    return text if text.endswith(b"\n") else text + b"\n"


# ---- commits and issues ----


def git(root: Path, *arguments: str) -> bytes:
    """What a git command prints. Raises ValueError with git's own words."""
    try:
        run = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True)
    except FileNotFoundError:
        raise ValueError("a source of kind git needs the git command") from None
    if run.returncode:
        raise ValueError(f"{root}: git {arguments[0]}: {run.stderr.decode(errors='replace').strip()}")
    return run.stdout


def read_issues(path: Path) -> dict[int, tuple[str, str]]:
    """Title and body of issues by number, from JSONL with number, title and body. Raises ValueError, naming the line."""
    issues = {}
    with open(path, "rb") as file:
        for line, text in enumerate(file, 1):
            try:
                fields = json.loads(text)
                issues[int(fields["number"])] = (str(fields["title"]), str(fields.get("body") or ""))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{line}: want a JSON object with number, title and body: {error!r}") from None
    return issues


def commits(
    root: Path, count: int, wanted: Callable[[str], bool], issues: dict[int, tuple[str, str]], budget: int
) -> Iterator[tuple[str, bytes | None]]:
    """The newest `count` commits of a checkout that are not merges and touch a wanted file, newest first.

    A sample is the issues that the message names (#12), the touched files as they were before in dependency order, the
    message, and the diff. Files are left out from the last while it is longer than `budget`.

    Yields:
        (commit, text); text None: longer than `budget` even without the files.
    """
    for commit in git(root, "log", "--no-merges", f"--max-count={count}", "--format=%H").decode().split():
        changed = git(root, "diff-tree", "--root", "--no-commit-id", "--name-only", "--no-renames", "-r", "-z", commit)
        paths = [p for raw in changed.split(b"\0") if raw and wanted(p := raw.decode(errors="surrogateescape"))]
        if not paths:
            continue
        message = git(root, "log", "--max-count=1", "--format=%B", commit).strip() + b"\n"
        options = ("--root", "--no-commit-id", "--no-renames", "--no-ext-diff", "--no-color", "-p")
        diff = git(root, "diff-tree", *options, commit, "--", *paths)
        numbers = dict.fromkeys(int(n) for n in re.findall(rb"#(\d{1,9})\b", message))
        told = [f"# issue {n}: {issues[n][0]}\n{issues[n][1]}\n".encode() for n in numbers if n in issues]
        ending = [b"# message\n" + message, b"# diff\n" + diff]
        if not _is_text(b"".join([*told, *ending])) or sum(len(p) + 1 for p in told + ending) > budget:
            yield commit, None
            continue
        before = {path: text for path in paths if _is_text(text := _before(root, commit, path))}
        files = Files(list(before))
        order = dependency_order({path: files.imports(path, text) for path, text in before.items()})
        parts, size = [], sum(len(p) + 1 for p in told + ending)
        for path in order:
            part = header(path) + _ended(before[path])
            if size + len(part) + 1 > budget:
                break
            parts.append(part)
            size += len(part) + 1
        yield commit, b"\n".join([*told, *parts, *ending])


def _before(root: Path, commit: str, path: str) -> bytes:
    """A file in the parent of a commit; empty: it was not there."""
    run = subprocess.run(["git", "-C", str(root), "cat-file", "blob", f"{commit}^:{path}"], capture_output=True)
    return run.stdout if run.returncode == 0 else b""
