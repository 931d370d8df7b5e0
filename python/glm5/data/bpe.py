"""Byte-level BPE: learnt from documents here, or read from a tokenizer.json in GLM-5's form, GLM-5's own included.

Encoding and learning are the ``tokenizers`` package's. It is given no special tokens, so text cannot become one; this module
adds them by id, and decodes by a table of its own. A file of another form is ``glm5.data.text.JsonTokenizer``'s.
"""

import json
from collections.abc import Iterable, Iterator

import numpy as np

from glm5.data.tokenizer import BYTE_CHARACTERS, BYTE_LEVEL, SPECIAL_TOKENS, Tokenizer, tokenizer_json, utf8

# Words, numbers of at most three digits, punctuation, white space: merges stay within one of these. As GPT-4's and GLM's.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = [{"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False}, BYTE_LEVEL]
_BYTES = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


class BpeTokenizer(Tokenizer):
    """A byte-level BPE tokenizer.json with GLM-5's special tokens behind its vocabulary.

    Any text comes back from its ids unchanged. ``encode`` takes bytes too, if they are UTF-8.

    Args:
        content: the parsed tokenizer.json.

    Raises:
        ValueError: it is not of that form, or the ``tokenizers`` package, which encodes, is not installed.
    """

    kind = "bpe"

    def __init__(self, content: dict):
        reason = what_differs(content)
        if reason:
            raise ValueError(f"BpeTokenizer: {reason}")
        self._content = content
        vocabulary = content["model"]["vocab"]
        self.base = len(vocabulary)
        super().__init__()
        self._pieces = [b""] * self.base
        for piece, i in vocabulary.items():
            self._pieces[i] = bytes(_BYTES[character] for character in piece)
        package = _tokenizers()
        try:
            self._model = package.Tokenizer.from_str(json.dumps(content | {"added_tokens": []}))
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"BpeTokenizer: the tokenizers package refuses it: {error}") from None

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ordinary ids of `text`, int32. Special tokens written out in `text` stay text.

        Raises:
            ValueError: a lone surrogate, or bytes that are not UTF-8.
        """
        if isinstance(text, str):
            utf8(text)
        else:
            try:
                text = bytes(text).decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"encode: byte {error.start} of {len(text)} is not UTF-8; want text") from None
        return np.array(self._model.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def piece(self, token: int) -> bytes:
        return self._pieces[token]

    def to_json(self) -> dict:
        return self._content


def train_bpe(documents: Iterable[str | bytes], vocab_size: int) -> BpeTokenizer:
    """Learns merges from `documents` until the vocabulary, special tokens included, has `vocab_size` ids.

    The same documents in the same order give the same tokenizer, whatever the number of threads. Pairs seen once are not
    merged, so that few documents may give a smaller vocabulary. Memory grows with the number of different words.

    Raises:
        ValueError: no text, or less room than for bytes and special tokens; bytes that are not UTF-8.
    """
    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ValueError(f"train_bpe: vocab_size is {vocab_size}, want at least {least}: bytes and special tokens")
    package = _tokenizers()
    learner = package.Tokenizer.from_str(json.dumps(tokenizer_json(0, {}, [], _PRE_TOKENIZERS) | {"added_tokens": []}))
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=list(BYTE_CHARACTERS),
        special_tokens=[],
        min_frequency=2,
        show_progress=False,
    )
    count = [0]
    learner.train_from_iterator(_counted(documents, count), trainer)
    if not count[0]:
        raise ValueError("train_bpe: the documents have no text, want some")
    model = json.loads(learner.to_str())["model"]
    return BpeTokenizer(tokenizer_json(len(model["vocab"]), model["vocab"], model["merges"], _PRE_TOKENIZERS))


def _counted(documents, count: list[int]) -> Iterator[str]:
    for i, document in enumerate(documents):
        if not isinstance(document, str):
            try:
                document = bytes(document).decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"train_bpe: document {i}: byte {error.start} is not UTF-8; want text") from None
        utf8(document)
        count[0] += len(document)
        yield document


def what_differs(content) -> str | None:
    """Why `content` of a tokenizer.json is not a byte-level BPE with GLM-5's special tokens at its end, or None."""
    try:
        model, decoder, added = content["model"], content["decoder"], content["added_tokens"]
        if model["type"] != "BPE" or decoder["type"] != "ByteLevel":
            return f"it is a {model['type']} with decoder {decoder['type']}, want BPE and ByteLevel"
        vocabulary, base = model["vocab"], len(model["vocab"])
        if sorted(vocabulary.values()) != list(range(base)):
            return f"its {base} ordinary ids are not 0 to {base - 1}"
        if not all(character in _BYTES for piece in vocabulary for character in piece):
            return "its vocabulary is not written in byte-level characters"
        have = {token["id"]: token["content"] for token in added}
    except (KeyError, TypeError, AttributeError) as error:
        return f"it lacks what a tokenizer.json has ({error})"
    for i, name in enumerate(SPECIAL_TOKENS):
        if have.get(base + i) != name:
            return f"id {base + i} is {have.get(base + i)}, want {name}: GLM-5's special tokens in their order"
    return None


def is_bytes(content: dict) -> bool:
    """Whether `content`, in GLM-5's form, is what ``ByteTokenizer.save`` writes: id b is byte b."""
    model = content["model"]
    return not model["merges"] and model["vocab"] == _BYTES


def _tokenizers():
    try:
        import tokenizers
    except ImportError:
        raise ValueError("a BPE tokenizer needs the tokenizers package: pip install tokenizers") from None
    return tokenizers
