"""``glm5 data build``: raw text a second on one core, what its parts cost, and that memory does not grow with the corpus.

The text is the Python code of the installed torch, 2,200 files. The peer computes signatures of the same shingles by the
textbook's many permutations, in the ``datasketch`` package; it is timed on a part of them.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import peers
from benchmarks.harness import Case, MemoryCase
from glm5.data import dedup, sources
from glm5.data.build import build_data
from glm5.data.filters import quality
from glm5.recipes import BuildRecipe
from glm5.recipes.data_schema import PackageSource

GOAL = 20e6  # bytes of raw text a second, of a whole build with the default filters
SOURCE = {"kind": "packages", "names": ["torch"], "domain": "code"}
PEER_PART = 20  # one document in so many


def recipe(**keys) -> BuildRecipe:
    return BuildRecipe.model_validate({"name": "bench", "sources": {"torch": SOURCE}} | keys)


def building(chosen: BuildRecipe):
    """A call that builds `chosen` into a new folder and removes it."""

    def call():
        with tempfile.TemporaryDirectory() as folder:
            build_data(chosen, Path(folder) / "out")

    return call


def cases(quick: bool) -> Iterator[Case]:
    texts = [d.text for d in sources.read("torch", PackageSource.model_validate(SOURCE), 1 << 24) if d.text]
    if quick:
        texts = texts[::10]
    size = sum(map(len, texts))
    told = f"{size / 1e6:.0f} MB of Python"
    if not quick:
        yield Case(f"data build, {told}, default filters", building(recipe()), work=size, unit="MB/s", goal_rate=GOAL)
        exact = recipe(dedup={"near": 0})
        yield Case(f"data build, {told}, without MinHash", building(exact), work=size, unit="MB/s")
        bare = recipe(dedup={"near": 0, "exact": False}, filters={"quality": 0})
        yield Case(f"data build, {told}, without filters", building(bare), work=size, unit="MB/s")
    batches = [texts[i : i + 64] for i in range(0, len(texts), 64)]
    part = texts[::PEER_PART]
    yield Case(
        f"MinHash signatures, {told}", lambda: [dedup.signatures(batch) for batch in batches],
        peer=(lambda: [datasketch_signature(text) for text in part]) if peers.library("datasketch") else None,
        peer_name="datasketch", library="datasketch", peer_scale=size / sum(map(len, part)), work=size, unit="MB/s",
        note=f"the peer on one document in {PEER_PART}",
    )  # fmt: skip
    yield Case(f"quality of code, {told}", lambda: [quality(text, True) for text in texts], work=size, unit="MB/s")
    yield Case(f"quality of prose, {told}", lambda: [quality(text, False) for text in texts], work=size, unit="MB/s")


def datasketch_signature(text: bytes):
    words = re.findall(rb"\w+", text.lower())
    signature = peers.library("datasketch").MinHash(num_perm=dedup.NUM_BINS)
    signature.update_batch({b" ".join(words[i : i + 5]) for i in range(len(words) - 4)})
    return signature


# ---- memory ----


def corpus_build(megabytes: int):
    """A call that builds a corpus of `megabytes` of JSONL, a fifth of its documents near-duplicates."""
    folder = Path(tempfile.mkdtemp())
    rng = np.random.default_rng(0)
    words = [f"w{i:x}" for i in range(20_000)]
    with open(folder / "rows.jsonl", "w") as file:
        previous, done = "", 0
        while done < megabytes * 1_000_000:
            text = previous + " more" if rng.random() < 0.2 else " ".join(words[i] for i in rng.integers(0, 20_000, 100))
            done += file.write('{"text": "' + text + '"}\n')
            previous = text
    source = {"kind": "jsonl", "path": str(folder / "rows.jsonl"), "domain": "web"}
    chosen = BuildRecipe.model_validate({"name": "bench", "sources": {"rows": source}, "filters": {"quality": 0}})

    def call():
        build_data(chosen, folder / "out")
        shutil.rmtree(folder)

    return call


def memory_cases(quick: bool) -> Iterator[MemoryCase]:
    target = "benchmarks.data.bench_data_build:corpus_build"
    for megabytes in (10,) if quick else (100, 400):  # 180,000 and 720,000 documents: buffers are full in both
        yield MemoryCase(f"data build, {megabytes} MB of JSONL", target, {"megabytes": megabytes}, limit=48 << 20)
