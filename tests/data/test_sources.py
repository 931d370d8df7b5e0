"""Sources: every document of a folder, a checkout, a package, a file of rows, in an order that stays; mistakes are named."""

import gzip
import json
import os
import subprocess
import sys
import sysconfig

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm5.data import python_stdlib
from glm5.data.sources import SourceError, folder_licence, read, spdx
from glm5.recipes.data_schema import FolderSource, GitSource, JsonlSource, PackageSource, ParquetSource, StdlibSource

LONG = 1 << 20
NAMES = st.text(alphabet="ab.-é_", min_size=1, max_size=4).filter(lambda n: n not in (".", ".."))


def documents(source, max_bytes=LONG):
    return list(read("s", source, max_bytes))


def texts(source, **options):
    return {d.id: d.text for d in documents(source, **options)}


@given(st.lists(st.lists(NAMES, min_size=1, max_size=3).map("/".join), max_size=12))
def test_a_folder_gives_every_file_in_the_order_of_paths(tmp_path_factory, paths):
    root = tmp_path_factory.mktemp("folder")
    (root / "always").write_text("here")
    made = {"always"}
    for path in paths:
        try:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(path)
            made.add(path)
        except OSError:  # one name for a file and a folder
            pass
    expected = sorted(p for p in made if not any(part.startswith(".") for part in p.split("/")))
    got = documents(FolderSource(domain="d", path=str(root), id_prefix=""))
    assert [d.id for d in got] == expected == [d.path for d in got]
    assert all(d.text.decode() in (d.id, "here") and d.group is None for d in got)


def test_patterns_links_and_lengths(tmp_path):
    for name in ("a.py", "sub/b.py", "sub/c.txt", "tests/d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link.py").symlink_to(tmp_path / "a.py")
    with open(os.fsencode(tmp_path) + b"/\xff.py", "w") as file:
        file.write("no id")
    source = FolderSource(domain="d", path=str(tmp_path), include=("*.py",), exclude=("tests/*",))
    assert texts(source) == {"s/a.py": b"a.py", "s/link.py": b"a.py", "s/sub/b.py": b"sub/b.py"}
    assert texts(source, max_bytes=4) == {"s/a.py": b"a.py", "s/link.py": b"a.py", "s/sub/b.py": None}


def test_the_standard_library_is_what_it_was():
    corpus = python_stdlib(20)
    got = [d for d in documents(StdlibSource(domain="code", id_prefix=""), max_bytes=1 << 24) if d.text]
    found = [d.text for d in got]
    assert all(d.licence == "PSF-2.0" for d in got)
    assert sorted([*corpus.train, *corpus.validation]) == sorted(x for x in found if _is_utf8(x))


def _is_utf8(raw):
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_a_package_is_its_files_and_its_licence():
    got = documents(PackageSource(domain="d", names=("pydantic", "hypothesis"), id_prefix=""))
    assert {"pydantic/main.py", "hypothesis/core.py"} <= {d.id for d in got}
    assert all(d.path.endswith(".py") and d.text is not None for d in got)
    assert {d.licence for d in got if d.id.startswith("pydantic/")} == {"MIT"}
    samples = documents(PackageSource(domain="d", names=("pydantic",), samples="repository", sample_bytes=100_000))
    assert len(samples) > 3 and {d.group for d in samples} == {"s/pydantic"} and samples[0].id == "s/pydantic#0000"
    assert sum(d.text.count(b"\n# pydantic/") + 1 for d in samples if d.text) >= 50
    with pytest.raises(SourceError, match="package no-such-thing is not installed here: pip install no-such-thing"):
        documents(PackageSource(domain="d", names=("no-such-thing",)))


def test_folders_as_repositories(tmp_path):
    for name in ("one/a.py", "one/b.py", "two/x/c.py", "top.py", ".git/config.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("import b\n" if name == "one/a.py" else "x = 1\n")
    (tmp_path / "two/LICENSE").write_text("Permission is hereby granted, free of charge, to any person")
    source = FolderSource(domain="d", path=str(tmp_path), include=("*.py",), samples="repository")
    one, two = documents(source)
    assert (one.id, one.text, one.group) == ("s/one#0000", b"# b.py\nx = 1\n\n# a.py\nimport b\n", "s/one")
    assert (two.group, two.licence) == ("s/two", "MIT")


def test_a_checkout_is_what_git_tracks(tmp_path):
    environment = os.environ | {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    (tmp_path / "a.py").write_text("import é\n")
    (tmp_path / "é.py").write_text("# SPDX-License-Identifier: MIT\n")
    (tmp_path / "untracked.py").write_text("u\n")
    (tmp_path / "link.py").symlink_to("a.py")
    names = ("-c", "user.name=n", "-c", "user.email=e@example.com")
    for command in (["init"], ["add", "a.py", "é.py", "link.py"], ["commit", "-m", "Begin"]):
        subprocess.run(["git", *names, *command], cwd=tmp_path, check=True, env=environment, capture_output=True)
    source = GitSource(domain="d", path=str(tmp_path), id_prefix="", commits=3)
    got = documents(source)
    assert [d.id for d in got[:2]] == ["a.py", "é.py"] and [d.licence for d in got[:2]] == ["unknown", "MIT"]
    assert len(got) == 3 and got[2].id.startswith("commit/") and b"+import" in got[2].text
    (whole,) = documents(GitSource(domain="d", path=str(tmp_path), samples="repository"))
    assert whole.text.count(b"# a.py\n") == 1 and whole.group == f"s/{tmp_path.name}"
    with pytest.raises(ValueError, match="not a git repository"):
        (tmp_path / "sub").mkdir()
        documents(GitSource(domain="d", path="/"))


# ---- licences ----


def test_licences_are_what_is_said():
    assert spdx(b"// SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note\n") == "GPL-2.0 WITH Linux-syscall-note"
    assert spdx(b"/* SPDX-License-Identifier: (MIT OR Apache-2.0) */") == "(MIT OR Apache-2.0)"
    assert spdx(b"x" * 2000 + b"SPDX-License-Identifier: MIT") is None


def test_the_licence_of_this_repository(tmp_path, request):
    assert folder_licence(request.config.rootpath) == "Apache-2.0"
    assert folder_licence(tmp_path) == "unknown"


# ---- rows ----

ROWS = [
    {"text": "first π", "url": "u1", "license": "MIT"},
    {"text": "second", "url": "u2", "license": None},
    {"text": "", "url": "u3", "license": "BSD"},
]


def write_jsonl(path, rows):
    opened = gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else open(path, "w", encoding="utf-8")
    with opened as file:
        file.write("\n".join(json.dumps(row) for row in rows) + "\n\n")


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow", reason="needs: pip install -c constraints.txt pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    "kind, suffix, write",
    [
        (JsonlSource, ".jsonl", write_jsonl),
        (JsonlSource, ".jsonl.gz", write_jsonl),
        (ParquetSource, ".parquet", write_parquet),
    ],
)
def test_rows(kind, suffix, write, tmp_path):
    write(tmp_path / f"b{suffix}", ROWS)
    write(tmp_path / f"a{suffix}", ROWS[:1])
    (tmp_path / "README").write_text("is no row")
    got = documents(kind(domain="d", path=str(tmp_path), licence_field="license"))
    assert [d.text.decode() for d in got] == ["first π", "first π", "second", ""]
    assert [d.id for d in got] == [f"s/a{suffix}:1", f"s/b{suffix}:1", f"s/b{suffix}:2", f"s/b{suffix}:3"]
    assert [d.licence for d in got] == ["MIT", "MIT", "unknown", "BSD"]
    one = kind(domain="d", path=str(tmp_path / f"b{suffix}"), id="url", id_prefix="")
    assert list(texts(one)) == ["u1", "u2", "u3"]
    with pytest.raises(SourceError, match=r"b\.(jsonl|parquet).*body"):
        documents(kind(domain="d", path=str(tmp_path / f"b{suffix}"), text="body"))
    with pytest.raises(SourceError, match="nowhere does not exist"):
        documents(kind(domain="d", path=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    "raw, message",
    [
        (b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
        (b'{"text": "a"}\n[1]\n', r"a\.jsonl:2: want a JSON object, got list"),
        (b'{"text": 3}\n', r"a\.jsonl:1: field 'text' is int, want text"),
        (b'{"txt": "a"}\n', r"a\.jsonl:1: field 'text' has none, want text; its fields are txt"),
    ],
)
def test_broken_rows_are_named(raw, message, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(raw)
    with pytest.raises(SourceError, match=message):
        documents(JsonlSource(domain="d", path=str(tmp_path)))


def test_rows_that_are_not_utf8_or_too_long_are_left_to_the_filters(tmp_path):
    rows = [
        b'{"text": "caf\xe9"}',
        json.dumps({"text": "x" * (7 << 20)}).encode(),
        b'{"text": "\\ud800"}',
        b'{"text": "ok"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    got = documents(JsonlSource(domain="d", path=str(tmp_path)), max_bytes=1000)
    assert [d.id for d in got] == [f"s/a.jsonl:{i}" for i in (1, 2, 3, 4)]
    assert b"\xe9" in got[0].text and got[1].text is None and not _is_utf8(got[2].text) and got[3].text == b"ok"


def test_cut_off_files_are_named(tmp_path):
    whole = gzip.compress(b'{"text": "a"}\n' * 10_000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"a\.jsonl\.gz: "):
        documents(JsonlSource(domain="d", path=str(tmp_path)))
    pytest.importorskip("pyarrow", reason="needs: pip install -c constraints.txt pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(SourceError, match=r"a\.parquet: not a parquet file"):
        documents(ParquetSource(domain="d", path=str(tmp_path)))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SourceError, match="pip install pyarrow"):
        documents(ParquetSource(domain="d", path=str(tmp_path)))


def test_an_empty_source_says_what_it_looked_for(tmp_path):
    with pytest.raises(SourceError, match=r'source s has no documents: path = ".*", include = \["\*.rs"\], exclude = \[\]'):
        documents(FolderSource(domain="d", path=str(tmp_path), include=("*.rs",)))
    with pytest.raises(SourceError, match="nowhere is not a folder"):
        documents(FolderSource(domain="d", path=str(tmp_path / "nowhere")))
    assert sysconfig.get_path("stdlib")
