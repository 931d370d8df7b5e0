"""Data folders: what goes in comes out, whole or not at all, and a folder that is not what its manifest says is refused."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm5.data import ByteTokenizer, DataError, DataWriter, open_data
from glm5.data.shards import is_held_out


def tokenizer_of(vocab_size):
    def save(folder):
        folder.mkdir()
        (folder / "tokenizer.json").write_text(str(vocab_size))

    return SimpleNamespace(kind="test", digest=f"of {vocab_size}", vocab_size=vocab_size, save=save)


SMALL, LARGE = tokenizer_of(1 << 16), tokenizer_of((1 << 16) + 1)


@st.composite
def documents(draw, vocab_size):
    """(domain, tokens, mask) in the order of adding; a domain has masks or it has none."""
    masked = {"code": draw(st.booleans()), "code/validation": False, "chat-1": True}
    rows = []
    for domain in draw(st.lists(st.sampled_from(sorted(masked)), min_size=1, max_size=30)):
        tokens = draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=40))
        mask = draw(st.lists(st.integers(0, 1), min_size=len(tokens), max_size=len(tokens))) if masked[domain] else None
        rows.append((domain, np.array(tokens), None if mask is None else np.array(mask)))
    return rows


def write(out, rows, tokenizer=SMALL, **options):
    with DataWriter(out, tokenizer, **options) as writer:
        for domain, tokens, mask in rows:
            writer.add(domain, tokens, mask=mask, num_bytes=2 * len(tokens), licence=f"L{len(tokens) % 2}")
        return writer.finish()


@pytest.mark.parametrize("tokenizer, dtype", [(SMALL, "<u2"), (LARGE, "<u4")])
@given(data=st.data())
def test_what_goes_in_comes_out(tokenizer, dtype, data, tmp_path_factory):
    rows = data.draw(documents(tokenizer.vocab_size))
    out = tmp_path_factory.mktemp("data") / "out"
    folder = write(out, rows, tokenizer, shard_tokens=data.draw(st.integers(1, 200)), one_in=7, recipe="r")
    assert open_data(out, verify=True).digest == folder.digest
    assert set(folder.domains) == {domain for domain, *_ in rows}
    for name in folder.domains:
        mine = [(tokens, mask) for domain, tokens, mask in rows if domain == name]
        domain = folder.domain(name)
        assert (domain.num_documents, domain.num_tokens) == (len(mine), sum(len(tokens) for tokens, _ in mine))
        for i, (tokens, mask) in enumerate(mine):
            assert domain.tokens(i).dtype == dtype and np.array_equal(domain.tokens(i), tokens)
            assert (domain.mask(i) is None) == (mask is None)
            assert mask is None or np.array_equal(domain.mask(i), mask)
        lengths = np.array([len(tokens) for tokens, _ in mine])
        assert np.array_equal(domain.lengths, lengths) and len(domain.lengths) == len(mine)
        some = np.array(data.draw(st.lists(st.integers(-len(mine), len(mine) - 1), max_size=8)), np.int64)
        assert np.array_equal(domain.lengths[some], lengths[some])
        assert np.array_equal(domain.lengths[1:5:2], lengths[1:5:2]) and domain.lengths[-1] == lengths[-1]
        assert domain.entry.bytes == 2 * lengths.sum()
        assert sum(domain.entry.licences.values()) == len(mine)


def test_a_shard_stays_within_its_size_unless_one_document_is_larger(tmp_path):
    rows = [("code", np.full(n, 5), None) for n in (4, 6, 1, 30, 2, 3, 9)]
    folder = write(tmp_path / "out", rows, shard_tokens=10)
    assert [shard.tokens for shard in folder.manifest.shards] == [10, 1, 30, 5, 9]
    assert folder.domain("code").tokens(3).size == 30


def test_equal_documents_give_equal_folders(tmp_path):
    rows = [("code", np.arange(1, n), None) for n in (4, 9, 40)]
    for name in ("a", "b"):
        write(tmp_path / name, rows)
    assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "b/manifest.json").read_bytes()
    assert write(tmp_path / "c", rows[::-1]).digest != open_data(tmp_path / "a").digest


def test_a_document_keeps_its_side():
    ids = [f"lib/m{i}.py" for i in range(4000)]
    held_out = [name for name in ids if is_held_out(name, 20)]
    assert 120 < len(held_out) < 280
    assert not any(is_held_out(name, 0) for name in ids)


def test_it_is_there_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyError), DataWriter(out, SMALL) as writer:
        writer.add("code", np.ones(3, int))
        raise KeyError
    assert not list(tmp_path.iterdir())
    with DataWriter(out, SMALL) as writer:
        (writer.scratch / "staged").write_text("what a builder keeps beside")
        writer.add("code", np.ones(3, int))
        assert not out.exists()
        writer.finish()
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "shards", "tokenizer"] and list(
        tmp_path.iterdir()
    ) == [out]


def test_what_a_killed_writer_left_is_cleared_and_a_living_one_is_not_disturbed(tmp_path):
    out, lines = (
        tmp_path / "out",
        "import sys, numpy as np; from types import SimpleNamespace; from glm5.data import DataWriter\n",
    )
    lines += f"w = DataWriter({str(out)!r}, SimpleNamespace(kind='t', digest='d', vocab_size=9))\n"
    lines += "w.add('code', np.ones(5, int)); (w.scratch / 'staged').mkdir(); print('open', flush=True); sys.stdin.read()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    child = subprocess.Popen(
        [sys.executable, "-c", lines], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert child.stdout.readline() == "open\n"
        with pytest.raises(DataError, match="in use by another process"):
            DataWriter(out, SMALL)
    finally:
        child.kill()
        child.communicate()
    rows = [("web", np.arange(1, 9), None)]
    assert write(out, rows).digest == write(tmp_path / "other", rows).digest
    assert sorted(p.name for p in (out / "shards").iterdir()) == ["web-00000.bin", "web-00000.idx"]


@pytest.mark.parametrize(
    "added, message",
    [
        ([("code", [], None)], "without tokens"),
        ([("code", [1, SMALL.vocab_size], None)], "token ids from 1 to 65536, want 0 to 65535"),
        ([("code", [-1], None)], "from -1 to -1"),
        ([("code", [1], [1, 0])], "a mask of 2 for 1 tokens"),
        ([("code", [1], [1]), ("code", [1], None)], "want all with, or none"),
        ([("a.b", [1], None)], r"domain 'a\.b'"),
        ([("code/valid", [1], None)], "code/valid"),
        ([], "no documents were added"),
    ],
)
def test_bad_documents(added, message, tmp_path):
    with pytest.raises(DataError, match=message):
        write(tmp_path / "out", [(d, np.array(t, int), None if m is None else np.array(m)) for d, t, m in added])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(tmp_path):
    out = tmp_path / "out"
    write(out, [("code", np.arange(1, n), None) for n in (4, 9, 40)] + [("chat", np.ones(5, int), np.ones(5))])
    return out


def edit_manifest(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_a_folder_has_its_tokenizer(tmp_path):
    with DataWriter(tmp_path / "out", ByteTokenizer()) as writer:
        writer.add("code", ByteTokenizer().encode_document("x"))
        data = writer.finish()
    assert data.tokenizer().digest == ByteTokenizer().digest == data.manifest.tokenizer.digest
    edit_manifest(data.folder, lambda manifest: manifest["tokenizer"].update(digest="other"))
    with pytest.raises(DataError, match="tokenizer is not the tokenizer of the manifest"):
        open_data(data.folder).tokenizer()


def test_a_folder_is_not_overwritten(folder):
    with pytest.raises(DataError, match="exists already"):
        DataWriter(folder, SMALL)


@pytest.mark.parametrize("name", ["code-00000.bin", "code-00000.idx", "chat-00000.mask"])
def test_shards_that_are_not_the_manifests(folder, name):
    path = folder / "shards" / name
    raw = path.read_bytes()
    path.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    open_data(folder)  # sizes are right
    with pytest.raises(DataError, match=f"{name} is damaged"):
        open_data(folder, verify=True)
    path.write_bytes(raw[:-1])
    with pytest.raises(DataError, match=rf"{name} has {len(raw) - 1} bytes, the manifest says {len(raw)}"):
        open_data(folder)
    path.unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        open_data(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m["shards"].pop(), "domain code has 3 documents"),
        (lambda m: m["shards"][0].update(domain="other"), "domain 'other' that is not listed"),
        (lambda m: m["shards"][0]["sha256"].pop("idx"), "no sha256 for its .bin or .idx"),
        (lambda m: m["shards"][0].update(file="../../x"), "shards.0.file"),
        (lambda m: m.update(version=2), "version"),
        (lambda m: m.pop("tokenizer"), "tokenizer: Field required"),
    ],
)
def test_a_manifest_that_contradicts_itself(folder, change, message):
    edit_manifest(folder, change)
    with pytest.raises(DataError, match=message):
        open_data(folder)


def test_no_data_folder(folder, tmp_path):
    with pytest.raises(DataError, match="nowhere is not a data folder"):
        open_data(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no domain 'web'; it has chat, code"):
        open_data(folder).domain("web")
    with pytest.raises(IndexError, match="document 3 of 3"):
        open_data(folder).domain("code").tokens(3)
    with pytest.raises(IndexError):
        open_data(folder).domain("code").lengths[np.array([0, 3])]
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="manifest.json is damaged"):
        open_data(folder)
