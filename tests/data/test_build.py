"""Building data: documents of the sources less what the manifest counts, the same bytes after a kill, clear errors."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5.data import ByteTokenizer, DataError, build, open_data, python_stdlib
from glm5.data.build import build_data, default_folder
from glm5.data.shards import is_held_out
from glm5.recipes import BuildRecipe, RecipeError, data_recipe_names, load_data_recipe

PLAIN = {"min_bytes": 1, "quality": 0}


def recipe(sources, **keys):
    keys = {"filters": PLAIN, "validation_one_in": 4} | keys
    return BuildRecipe.model_validate({"name": "test", "sources": sources} | keys)


def rows(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"kind": "jsonl", "domain": "web", "path": str(path)}


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def domain_texts(data, name):
    domain = data.domain(name)
    return [ByteTokenizer().decode(domain.tokens(i)) for i in range(domain.num_documents)]


def test_the_standard_library_is_built_as_it_was(tmp_path):
    corpus, tokenizer = python_stdlib(20), ByteTokenizer()
    data = build_data(load_data_recipe("python-stdlib"), tmp_path / "out")
    for name, documents in (("code", corpus.train), ("code/validation", corpus.validation)):
        domain = data.domain(name)
        assert domain.num_documents == len(documents) and domain.entry.bytes == sum(map(len, documents))
        for i, document in enumerate(documents):
            assert np.array_equal(domain.tokens(i), tokenizer.encode_document(document))
    assert open_data(tmp_path / "out", verify=True).digest == data.digest


def test_the_recipes_that_come_with_glm5_are_valid():
    assert set(data_recipe_names()) >= {"code-and-docs", "python-stdlib"}
    for name in data_recipe_names():
        assert load_data_recipe(name).name == name


@settings(max_examples=15)
@given(
    texts=st.lists(st.text(alphabet="ab ", min_size=1, max_size=6), min_size=8, max_size=60),
    exact=st.booleans(),
    batch=st.integers(1, 30),
)
def test_every_document_is_kept_or_counted(tmp_path_factory, texts, exact, batch):
    folder = tmp_path_factory.mktemp("build")
    sources = {"one": rows(folder / "a.jsonl", texts[:4]), "two": rows(folder / "b.jsonl", texts[4:]) | {"domain": "other"}}
    chosen = recipe(sources, dedup={"exact": exact, "near": 0}, filters=PLAIN | {"min_bytes": 2}, validation_one_in=3)
    ids = [f"one/a.jsonl:{i + 1}" for i in range(4)] + [f"two/b.jsonl:{i + 1}" for i in range(len(texts) - 4)]
    expected = {"web": [], "other": [], "web/validation": [], "other/validation": []}
    seen = {text for text, name in zip(texts, ids, strict=True) if not is_held_out(name, 3) and len(text) > 1}
    met = set()
    for side in ("", "/validation"):
        for text, name in zip(texts, ids, strict=True):
            if len(text) < 2 or is_held_out(name, 3) != bool(side):
                continue
            gone = (exact and text in met) or (side and text in seen)
            met.add(text)
            if not gone:
                expected[("web" if name.startswith("one") else "other") + side].append(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_BATCH_DOCUMENTS", batch)
        try:
            data = build_data(chosen, folder / "out")
        except DataError as error:
            kept = [name for name, texts in expected.items() if texts]
            sides = {name.endswith("/validation") for name in kept}
            domains = {name.partition("/")[0] for name in kept}
            assert sides != {False, True} or domains != {"web", "other"}, error
            return
    assert {name: domain_texts(data, name) for name in data.domains} == {n: t for n, t in expected.items() if t}
    counts = data.manifest.filters
    assert sum(c.kept + sum(c.dropped.values()) for c in counts.values()) == len(texts)
    assert sum(c.dropped.get("too_short", 0) for c in counts.values()) == sum(len(t) < 2 for t in texts)


@pytest.fixture
def corpus(tmp_path):
    """A recipe of 3 MB with duplicates, and its folder."""
    rng = random.Random(0)
    texts = []
    for i in range(1500):
        words = (
            texts[rng.randrange(i)].split() if i and rng.random() < 0.2 else [f"w{rng.randrange(4000)}" for _ in range(350)]
        )
        texts.append(" ".join(w if rng.random() > 0.003 else "new" for w in words))
    return recipe({"rows": rows(tmp_path / "a.jsonl", texts)}, shard_tokens=500_000)


def test_a_build_gives_the_same_bytes_wherever_an_earlier_one_was_killed(corpus, tmp_path):
    expected = tmp_path / "expected"
    begin = time.monotonic()
    data = build_data(corpus, expected)
    seconds = time.monotonic() - begin
    assert len(data.manifest.shards) > 4 and data.manifest.filters["rows"].dropped["near_duplicate"] > 100
    out = tmp_path / "out"
    path = tmp_path / "recipe.json"
    path.write_text(corpus.model_dump_json())
    lines = "import sys\nfrom glm5.data.build import build_data\nfrom glm5.recipes import BuildRecipe\n"
    lines += f"recipe = BuildRecipe.model_validate_json(open({str(path)!r}).read())\nprint('go', flush=True)\n"
    lines += f"build_data(recipe, {str(out)!r})\n"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    for share in (0.1, 0.5, 0.8):
        child = subprocess.Popen([sys.executable, "-c", lines], stdout=subprocess.PIPE, env=environment)
        assert child.stdout.readline() == b"go\n"
        time.sleep(share * seconds)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert not out.exists() or contents(out) == contents(expected)
    build_data(corpus, out)
    assert contents(out) == contents(expected)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_failed_build_leaves_nothing(tmp_path):
    source = rows(tmp_path / "a.jsonl", ["one", "two", "three"])
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text"\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not JSON"):
        build_data(recipe({"rows": source}), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_folder_is_built_once_and_belongs_to_its_recipe(tmp_path):
    chosen = recipe({"rows": rows(tmp_path / "a.jsonl", map(str, range(40)))})
    out = default_folder(chosen, tmp_path)
    first = build_data(chosen, out)
    (tmp_path / "a.jsonl").unlink()
    assert build_data(chosen, out).digest == first.digest
    with pytest.raises(DataError, match="was built from another recipe"):
        build_data(chosen.model_copy(update={"name": "other"}), out)
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="exists already"):
        build_data(chosen, tmp_path / "mine")


def test_bpe_is_learnt_from_what_is_trained_on(tmp_path):
    pytest.importorskip("tokenizers", reason="needs: pip install -c constraints.txt tokenizers")
    sides = [is_held_out(f"rows/a.jsonl:{i + 1}", 4) for i in range(60)]
    texts = [f"{'qqx' * 9 if side else 'the value'} of {i} is {i * i}" for i, side in enumerate(sides)]
    source = rows(tmp_path / "a.jsonl", texts)
    data = build_data(recipe({"rows": source}, tokenizer={"kind": "bpe", "vocab_size": 330}), tmp_path / "a")
    tokenizer = data.tokenizer()
    assert data.manifest.tokenizer.kind == "bpe" and 300 < tokenizer.vocab_size <= 330
    web = data.domain("web")
    assert any(sides) and len(tokenizer.encode("qqx")) == 3 and len(tokenizer.encode(" the value of")) < 5
    kept = [tokenizer.decode(web.tokens(i)) for i in range(web.num_documents)]
    assert set(kept) < set(texts) and web.num_tokens < 0.8 * sum(map(len, kept))
    again = recipe({"rows": source}, tokenizer={"kind": "folder", "path": str(tmp_path / "a" / "tokenizer")})
    assert build_data(again, tmp_path / "b").manifest.shards == data.manifest.shards
    few = recipe({"rows": source}, tokenizer={"kind": "bpe", "vocab_size": 330, "sample_bytes": 100})
    assert build_data(few, tmp_path / "c").tokenizer().vocab_size < tokenizer.vocab_size


def test_a_whole_repository_is_on_one_side(tmp_path):
    for package in range(30):
        for file in range(4):
            path = tmp_path / "src" / f"p{package}" / f"f{file}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"value_{package} = {file}\n" * 10)
    source = {
        "kind": "folder",
        "path": str(tmp_path / "src"),
        "domain": "code",
        "samples": "repository",
        "sample_bytes": 400,
    }
    data = build_data(recipe({"src": source}, dedup={"exact": False, "near": 0}), tmp_path / "out")
    sides = {side: {text.split("_")[1].split()[0] for text in domain_texts(data, side)} for side in data.domains}
    assert not sides["code"] & sides["code/validation"] and sum(map(len, sides.values())) == 30
    assert sum(domain.documents for domain in data.manifest.domains.values()) >= 60


# ---- bad input ----


def test_an_undecodable_file_is_dropped_and_counted_or_an_error(tmp_path):
    (tmp_path / "src").mkdir()
    for i in range(30):
        (tmp_path / "src" / f"f{i}.py").write_text(f"x = {i}\n")
    (tmp_path / "src" / "latin.py").write_bytes(b"# caf\xe9\n")
    source = {"kind": "folder", "path": str(tmp_path / "src"), "domain": "code"}
    data = build_data(recipe({"src": source}), tmp_path / "a")
    assert data.manifest.filters["src"].dropped == {"undecodable": 1}
    with pytest.raises(DataError, match="source src: latin.py is not UTF-8"):
        build_data(recipe({"src": source}, filters=PLAIN | {"undecodable": "error"}), tmp_path / "b")
    only = source | {"include": ["latin.py"]}
    with pytest.raises(DataError, match="source src: no document is left: 1 undecodable"):
        build_data(recipe({"src": only}), tmp_path / "c")


def test_a_document_longer_than_the_budget_is_dropped_and_counted(tmp_path):
    source = rows(tmp_path / "a.jsonl", ["x" * n for n in range(1, 40)])
    data = build_data(recipe({"rows": source}, filters=PLAIN | {"max_bytes": 30}), tmp_path / "out")
    assert data.manifest.filters["rows"].dropped == {"too_long": 9}
    assert max(max(data.domain(name).lengths) for name in data.domains) == 33


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: s | {"b": s["a"] | {"id_prefix": "a/"}},
            r"two documents have the id 'a/rows.jsonl:1': one of source a, one of b; give the sources an id_prefix",
        ),
        (lambda s: {"a": s["a"] | {"id": "text"}}, r"two documents have the id 'a/0': one of source a, one of a"),
        (lambda s: {"a": s["a"] | {"path": s["a"]["path"] + "x"}}, "rows.jsonlx does not exist"),
    ],
)
def test_bad_sources(change, message, tmp_path):
    sources = change({"a": rows(tmp_path / "rows.jsonl", [str(i % 30) for i in range(40)])})
    with pytest.raises(ValueError, match=message):
        build_data(recipe(sources), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_held_out_or_everything(tmp_path):
    source = rows(tmp_path / "a.jsonl", ["one", "two", "three"])
    with pytest.raises(DataError, match="none of 3 documents is held out: lower validation_one_in = 1000000"):
        build_data(recipe({"rows": source}, validation_one_in=10**6), tmp_path / "a")
    with pytest.raises(DataError, match="every document is held out"):
        build_data(recipe({"rows": source}, validation_one_in=1), tmp_path / "b")
    data = build_data(recipe({"rows": source}, validation_one_in=0), tmp_path / "c")
    assert data.domains == ("web",) and domain_texts(data, "web") == ["one", "two", "three"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["sources.stdlib.licens=MIT"], "unknown key sources.stdlib.licens; did you mean sources.stdlib.licence?"),
        (["sources.stdlib.filters.qualty=1"], "unknown key sources.stdlib.filters.qualty; did you mean .*filters.quality?"),
        (["sources.stdlib.kind=web"], "sources.stdlib.* 'web'"),
        (["dedup.near=2"], "dedup.near: got 2: .*less than or equal to 1"),
        (["tokenizer.kind=folder"], 'kind "folder" needs path'),
        (["sources={}"], "sources: got {}"),
        (["filters.zzz=1"], "unknown key filters.zzz; known here: min_bytes"),
    ],
)
def test_mistakes_in_a_recipe_are_named(overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_data_recipe("python-stdlib", overrides)
    with pytest.raises(RecipeError, match="no data recipe called 'stdlib'; there are code-and-docs, python-stdlib"):
        load_data_recipe("stdlib")
