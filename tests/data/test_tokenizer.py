"""Tokenizers: special tokens by id only, text that comes back, and files that Transformers reads the same way."""

import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from glm5.data import ByteTokenizer, load_tokenizer
from glm5.data.tokenizer import SPECIAL_TOKENS

pytest.importorskip("tokenizers", reason="needs: pip install -c constraints.txt tokenizers")
from glm5.data import BpeTokenizer, train_bpe  # noqa: E402

DOCUMENTS = [f"def f{i}(value):\n    return value + {i}  # the value and {i}, naïve\n" for i in range(300)]
DOCUMENTS += ["<|user|>hi<think></think> <tool_call>" * 40]

BYTES = ByteTokenizer()
SPELLED = st.lists(st.sampled_from(SPECIAL_TOKENS) | st.text(max_size=8), max_size=8).map("".join)


@functools.cache
def bpe(vocab_size: int = 500) -> BpeTokenizer:
    return train_bpe(DOCUMENTS, vocab_size)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request):
    return BYTES if request.param == "bytes" else bpe()


def test_special_tokens_have_glm5s_order_and_distance(tokenizer):
    glm5 = {"<|endoftext|>": 154820, "[gMASK]": 154822, "<sop>": 154824, "<|system|>": 154826, "<|user|>": 154827}
    glm5 |= {"<|assistant|>": 154828, "<|observation|>": 154829, "<think>": 154841, "</think>": 154842}
    assert {name: tokenizer.special_ids[name] - tokenizer.base + 154820 for name in glm5} == glm5
    assert len(SPECIAL_TOKENS) == len(set(SPECIAL_TOKENS)) == 36 and SPECIAL_TOKENS[31] == "/nothink"
    assert tokenizer.vocab_size == tokenizer.base + 36 and tokenizer.eos_id == tokenizer.base
    assert sorted(tokenizer.special_ids.values()) == list(range(tokenizer.base, tokenizer.vocab_size))


@given(SPELLED)
@example("<|user|>")
@example("a <|endoftext|> π /nothink")
def test_text_comes_back_and_is_never_special(text):
    for tokenizer in (BYTES, bpe()):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and (ids < tokenizer.base).all() and (ids >= 0).all()
        assert tokenizer.decode(ids, skip_special=False) == text
        assert (tokenizer.encode(text.encode()) == ids).all()


def test_documents_and_decoding(tokenizer):
    document = tokenizer.encode_document("x")
    assert tokenizer.decode(document, skip_special=False) == "[gMASK]<sop>x<|endoftext|>"
    assert document.dtype == np.int32 and tokenizer.decode(document) == "x"
    assert tokenizer.decode([tokenizer.vocab_size, *tokenizer.encode("é")[:1]]) in ("\ufffd\ufffd", "\ufffdé")
    with pytest.raises(ValueError, match="token id -1 is negative"):
        tokenizer.decode([-1])
    with pytest.raises(ValueError, match=r"lone surrogate, '\\ud800', at 1"):
        tokenizer.encode("a\ud800")


def test_bpe_learns_merges_and_keeps_its_size():
    assert bpe().vocab_size == 500
    text = "def f7(value): return value"
    assert len(bpe().encode(text)) < len(text) / 2
    assert bpe(500).digest != bpe(400).digest
    # Nothing is seen twice: no merges, and the vocabulary stays small.
    assert train_bpe(["ab"], 500).vocab_size == 256 + 36


@pytest.mark.parametrize("threads", ["1", "3"])
def test_bpe_is_the_same_with_any_number_of_threads(threads):
    code = "from tests.data.test_tokenizer import *; print(bpe().digest)"
    environment = os.environ | {"RAYON_NUM_THREADS": threads}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == bpe().digest


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new")
    loaded = load_tokenizer(tmp_path / "new")
    assert type(loaded) is type(tokenizer) and loaded.digest == tokenizer.digest and loaded.kind == tokenizer.kind
    assert (loaded.encode("naïve π") == tokenizer.encode("naïve π")).all()
    assert loaded.special_ids == tokenizer.special_ids


def test_digests_are_stable():
    assert BYTES.digest == "2775ba6f0630826b5228f2780265f8f72574555d368d6de948d1ababd47ef4ad"


def test_transformers_reads_what_is_saved(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs: pip install -c constraints.txt transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (DOCUMENTS[3], "a  b\n\n\tπ \U0001f600", ""):
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text).tolist()
        assert theirs.decode(tokenizer.encode(text)) == text
    assert {name: theirs.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS} == tokenizer.special_ids
    assert len(theirs) == tokenizer.vocab_size and theirs.eos_token_id == tokenizer.eos_id
    whole = tokenizer.encode_document("x")
    assert theirs.encode("[gMASK]<sop>x<|endoftext|>", add_special_tokens=False) == whole.tolist()
    # GLM-5 too hides roles and shows thoughts.
    named = [tokenizer.special_ids[name] for name in ("<|user|>", "<think>")]
    assert theirs.decode(named, skip_special_tokens=True) == "<think>"


def test_a_file_with_glm5s_tokens_elsewhere_is_another_models(tmp_path):
    content = bpe().to_json()
    swapped = json.loads(json.dumps(content))
    swapped["added_tokens"][0]["id"], swapped["added_tokens"][1]["id"] = 465, 464
    with pytest.raises(ValueError, match=r"id 464 is \[MASK\], want <\|endoftext\|>"):
        BpeTokenizer(swapped)
    (tmp_path / "tokenizer.json").write_text(json.dumps(swapped))
    assert not hasattr(load_tokenizer(tmp_path), "special_ids")
    for damage, message in (
        ({"model": {"type": "WordLevel"}}, "it is a WordLevel"),
        ({"model": {"type": "BPE", "vocab": {"a": 1}}}, "its 1 ordinary ids are not 0 to 0"),
        ({"model": {"type": "BPE", "vocab": {" ": 0}}}, "not written in byte-level characters"),
        ({"model": {}}, "lacks what a tokenizer.json has"),
    ):
        with pytest.raises(ValueError, match=message):
            BpeTokenizer(content | damage)


def test_bad_input():
    with pytest.raises(ValueError, match="vocab_size is 291, want at least 292"):
        train_bpe(DOCUMENTS, 291)
    for nothing in ([], [""]):
        with pytest.raises(ValueError, match="documents have no text"):
            train_bpe(nothing, 300)
    with pytest.raises(ValueError, match="document 1: byte 1 is not UTF-8"):
        train_bpe(["a", b"a\xff"], 300)
    with pytest.raises(ValueError, match="byte 0 of 1 is not UTF-8"):
        bpe().encode(b"\xff")
