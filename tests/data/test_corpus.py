"""The standard library as a corpus, split by file; bytes as tokens."""

import pytest

from glm5.data import ByteTokenizer, CorpusError, python_stdlib
from glm5.data.corpus import is_validation


def test_the_standard_library_is_found_and_split_by_file():
    corpus = python_stdlib(validation_one_in=20)
    size = sum(map(len, corpus.train)), sum(map(len, corpus.validation))
    assert size[0] > 5e6 and 0.01 < size[1] / sum(size) < 0.2
    assert corpus.digest == python_stdlib(validation_one_in=20).digest
    assert not set(corpus.train) & set(corpus.validation)


def test_a_file_keeps_its_side_when_others_come_and_go(tmp_path):
    names = [f"m{i}.py" for i in range(60)]
    for name in names:
        (tmp_path / name).write_text(f"# {name}")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "t.py").write_text("# a test")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9")
    before = python_stdlib(5, root=tmp_path)
    assert sorted(before.validation) == sorted(f"# {n}".encode() for n in names if is_validation(n, 5))
    assert len(before.train) + len(before.validation) == len(names)
    (tmp_path / "m3.py").unlink()
    after = python_stdlib(5, root=tmp_path)
    assert set(after.validation) <= set(before.validation) and set(after.train) <= set(before.train)
    assert after.digest != before.digest


def test_a_copy_of_a_train_file_is_not_validated_on(tmp_path):
    names = [f"m{i}.py" for i in range(60)]
    for name in names:
        (tmp_path / name).write_text(f"# {name}")
    held_out = [n for n in names if is_validation(n, 5)]
    trained = next(n for n in names if not is_validation(n, 5))
    (tmp_path / held_out[0]).write_text(f"# {trained}")
    corpus = python_stdlib(5, root=tmp_path)
    assert not set(corpus.train) & set(corpus.validation) and len(corpus.validation) == len(held_out) - 1


def test_what_cannot_be_read_as_a_file_is_left_out(tmp_path):
    for i in range(60):
        (tmp_path / f"m{i}.py").write_text(f"# {i}")
    before = python_stdlib(5, root=tmp_path)
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    (tmp_path / "folder.py").mkdir()
    assert python_stdlib(5, root=tmp_path) == before


def test_an_empty_corpus_says_what_to_install(tmp_path):
    with pytest.raises(CorpusError, match="libpython3-stdlib"):
        python_stdlib(root=tmp_path)


def test_special_tokens_cannot_be_spelled_in_text():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("a <|endoftext|> π")
    assert ids.max() < 256 and tokenizer.decode(ids) == "a <|endoftext|> π"
    document = tokenizer.encode_document("x")
    assert tokenizer.decode(document, skip_special=False) == "[gMASK]<sop>x<|endoftext|>"
    assert tokenizer.decode([97, 255, tokenizer.vocab_size]) == "a\ufffd\ufffd"
    with pytest.raises(ValueError, match="-1 is negative"):
        tokenizer.decode([-1])
