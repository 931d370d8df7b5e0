"""GLM-5's special tokens, what every tokenizer here can do, and the simplest of them: bytes.

Ordinary text takes the ids below ``base``; special tokens follow in GLM-5's order, so that the distance between any two of
them is GLM-5's. Text can never spell one: ``encode`` gives ordinary ids only, special tokens are added by id. A tokenizer
with merges is in ``glm5.data.bpe``; what special tokens mean in a conversation, in ``glm5.data.chat``.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np

from glm5._files import write_atomically

# GLM-5's added tokens, ids 154820 to 154855. Ids are stored in checkpoints, so the order never changes.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|begin_of_audio|>",
    "<|end_of_audio|>",
    "<|begin_of_transcription|>",
    "<|end_of_transcription|>",
    "<|code_prefix|>",
    "<|code_middle|>",
    "<|code_suffix|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "/nothink",
    "<|begin_of_box|>",
    "<|end_of_box|>",
    "<|image|>",
    "<|video|>",
)
# GLM-5's tokenizer.json calls only these special; Transformers shows the others, such as <think>, in decoded text.
NUM_HIDDEN = 18


class Tokenizer(ABC):
    """Text to ids and back. Subclasses say what the ids below ``base`` are.

    Attributes:
        kind: "bytes" or "bpe".
        base: how many ids ordinary text has; special token i has id ``base + i``.
        vocab_size: ``base`` and the special tokens; a model's may be larger.
        special_ids: {name: id} of all ``SPECIAL_TOKENS``.
        eos_id: the id of ``<|endoftext|>``, which ends a document.
    """

    kind: str
    base: int

    def __init__(self):
        self.special_ids = {name: self.base + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.eos_id = self.special_ids["<|endoftext|>"]
        self._before = np.array([self.special_ids["[gMASK]"], self.special_ids["<sop>"]], np.int32)
        self._after = np.array([self.eos_id], np.int32)

    @property
    def vocab_size(self) -> int:
        return self.base + len(SPECIAL_TOKENS)

    @property
    def digest(self) -> str:
        """sha256 of what decides the ids. Data built with one tokenizer is of use only to a model that has the same."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    @abstractmethod
    def encode(self, text: str | bytes) -> np.ndarray:
        """Ordinary ids of `text`, int32. Special tokens written out in `text` stay text.

        Raises:
            ValueError: a str that is not Unicode text (a lone surrogate); bytes that are not UTF-8, where the tokenizer
                needs to know characters.
        """

    @abstractmethod
    def piece(self, token: int) -> bytes:
        """The bytes of the ordinary id `token`."""

    def encode_document(self, text: str | bytes) -> np.ndarray:
        """``[gMASK] <sop> text <|endoftext|>``: a whole document as the model sees it, int32."""
        return np.concatenate([self._before, self.encode(text), self._after])

    def decode(self, ids, skip_special: bool = True) -> str:
        """Text of `ids`. Special tokens are dropped or written out.

        Bytes that are not UTF-8 show as U+FFFD, and so do ids past the vocabulary: models round it up and may name such a
        row.

        Raises:
            ValueError: a negative id.
        """
        out = bytearray()
        for token in (int(i) for i in ids):
            if token < 0:
                raise ValueError(f"decode: token id {token} is negative")
            if token < self.base:
                out += self.piece(token)
            elif token >= self.vocab_size:
                out += "\ufffd".encode()
            elif not skip_special:
                out += SPECIAL_TOKENS[token - self.base].encode()
        return out.decode(errors="replace")

    @abstractmethod
    def to_json(self) -> dict:
        """The tokenizer as the content of a tokenizer.json, which the ``tokenizers`` package and Transformers read."""

    def save(self, folder: Path | str) -> None:
        """Writes tokenizer.json and tokenizer_config.json into `folder`; ``glm5.data.load_tokenizer`` reads them back."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "tokenizer.json", json.dumps(self.to_json(), ensure_ascii=False, indent=1) + "\n")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
        }
        write_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=1) + "\n")


class ByteTokenizer(Tokenizer):
    """Token ids 0 to 255 are the bytes of UTF-8 text; ``SPECIAL_TOKENS`` follow from 256.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.decode(tokenizer.encode("π = 3"))
    'π = 3'
    """

    kind = "bytes"
    base = 256
    vocab_size = base + len(SPECIAL_TOKENS)

    def encode(self, text: str | bytes) -> np.ndarray:
        """The bytes of `text` as int32 ids [num_bytes]. Bytes need not be UTF-8."""
        raw = utf8(text) if isinstance(text, str) else text
        return np.frombuffer(raw, dtype=np.uint8).astype(np.int32)

    def piece(self, token: int) -> bytes:
        return bytes((token,))

    def to_json(self) -> dict:
        return tokenizer_json(256, {c: i for i, c in enumerate(BYTE_CHARACTERS)}, [], [BYTE_LEVEL])


def utf8(text: str) -> bytes:
    """`text` in UTF-8.

    Raises:
        ValueError: a lone surrogate, which no UTF-8 has.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"encode: the text has a lone surrogate, {text[error.start]!a}, at {error.start}; want Unicode text"
        ) from None


def _byte_characters() -> tuple[str, ...]:
    """The printable character that byte-level BPE writes for each byte: itself, or from U+0100 on. GPT-2's table."""
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = iter(range(256, 512))
    return tuple(chr(b) if b in shown else chr(next(hidden)) for b in range(256))


BYTE_CHARACTERS = _byte_characters()
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def tokenizer_json(base: int, vocabulary: dict[str, int], merges: list, pre_tokenizers: list[dict]) -> dict:
    """A byte-level BPE with GLM-5's special tokens from `base` on, as tokenizer.json says it."""
    added = [
        dict(
            id=base + i,
            content=name,
            single_word=False,
            lstrip=False,
            rstrip=False,
            normalized=False,
            special=i < NUM_HIDDEN,
        )
        for i, name in enumerate(SPECIAL_TOKENS)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers},
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
