"""Data folders: build one from a recipe, show or verify one."""

import sys
import time
from pathlib import Path

NAME = "data"


def add_arguments(parser) -> None:
    """What to do, and with what."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser("build", help="build a data folder from a recipe")
    build.add_argument("recipe", help="python-stdlib, code-and-docs, or a .toml file")
    build.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of the recipe, for example sources.docs.path=docs",
    )
    build.add_argument("--out", type=Path, help="folder to write (default: runs/data/NAME-DIGEST, where a run looks for it)")
    show = actions.add_parser("show", help="print what a data folder holds")
    show.add_argument("folder", type=Path)
    show.add_argument("--verify", action="store_true", help="check every shard against its sha256")


def run(args) -> None:
    """Builds or opens the folder and prints its domains, licences and what was dropped."""
    if args.action == "show":
        from glm5.data.shards import open_data

        print(summary(open_data(args.folder, verify=args.verify)))
        return
    from glm5.data.build import build_data, default_folder
    from glm5.recipes import load_data_recipe

    recipe = load_data_recipe(args.recipe, args.overrides)
    out = args.out or default_folder(recipe, Path("runs"))
    there = out.exists()
    with _Line() as line:
        data = build_data(recipe, out, line)
    print(summary(data))
    print(f"\n{data.folder}" + (" was there already" if there else ""))


def summary(data) -> str:
    """Two tables as text: domains, and sources with what was dropped from each."""
    manifest = data.manifest
    rows = [("domain", "documents", "tokens", "MB of text", "licences")]
    for name, entry in manifest.domains.items():
        licences = sorted(entry.licences.items(), key=lambda item: (-item[1], item[0]))
        told = ", ".join(f"{licence} {count}" for licence, count in licences[:4]) + (", ..." if len(licences) > 4 else "")
        rows.append((name, f"{entry.documents:,}", f"{entry.tokens:,}", f"{entry.bytes / 1e6:.1f}", told))
    text = _columns(rows)
    if manifest.filters:
        rows = [("source", "kept", "dropped", "", "")]
        for name, counts in manifest.filters.items():
            dropped = ", ".join(f"{rule} {count:,}" for rule, count in counts.dropped.items())
            rows.append((name, f"{counts.kept:,}", f"{sum(counts.dropped.values()):,}", dropped, ""))
        text += "\n\n" + _columns(rows)
    return text


def _columns(rows: list[tuple[str, ...]]) -> str:
    """Numbers to the right; the first column and what follows the numbers to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    is_number = [all(row[i].replace(",", "").replace(".", "").isdigit() for row in rows[1:]) for i in range(len(widths))]
    lines = [
        "  ".join(f"{c:>{w}}" if n else f"{c:<{w}}" for c, w, n in zip(r, widths, is_number, strict=True)) for r in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


class _Line:
    """Progress on standard error, where that is a terminal; the line is left clean."""

    def __init__(self, stream=None):
        self._stream = stream or sys.stderr
        self._live, self._shown, self._start = self._stream.isatty(), 0.0, time.monotonic()

    def __call__(self, what: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if self._live and now - self._shown > 0.1:
            self._shown = now
            share = f" of {total / 1e6:,.0f}" if total else ""
            self._stream.write(f"\r\033[K{what} {done / 1e6:,.0f}{share} MB, {now - self._start:.0f} s")
            self._stream.flush()

    def __enter__(self) -> "_Line":
        return self

    def __exit__(self, *_) -> None:
        if self._live:
            self._stream.write("\r\033[K")
            self._stream.flush()
