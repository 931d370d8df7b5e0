"""The tokenizer of a model directory, and text that comes token by token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm5.data import ByteTokenizer
from glm5.data.text import TextStream, load_tokenizer


@given(st.text())
def test_streamed_text_is_the_text(text):
    ids = ByteTokenizer().encode(text).tolist()
    stream = TextStream(ByteTokenizer())
    parts = [stream.push(token, last=i == len(ids) - 1) for i, token in enumerate(ids)]
    assert "".join(parts) == ByteTokenizer().decode(ids)


def test_a_character_comes_when_it_is_whole():
    stream = TextStream(ByteTokenizer())
    assert [stream.push(b) for b in "aπ".encode()] == ["a", "", "π"]
    stream = TextStream(ByteTokenizer())
    assert [stream.push(0xCF), stream.push(ord("x")), stream.push(0xCF, last=True)] == ["", "\ufffdx", "\ufffd"]


def test_the_space_after_a_prompt_is_kept():
    class Words:
        def decode(self, ids):
            return " ".join(["the", "end"][i] for i in ids)

    assert TextStream(Words(), [0]).push(1) == " end"


def test_bytes_must_be_asked_for(tmp_path):
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="nowhere is not a directory"):
        load_tokenizer(tmp_path / "nowhere")
    ByteTokenizer().save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)


def test_a_tokenizer_json(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="needs: pip install -c constraints.txt tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "def": 1, "x": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("def x y").tolist() == [1, 2, 0] and tokenizer.decode([1, 2]) == "def x"
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json is damaged"):
        load_tokenizer(tmp_path)
