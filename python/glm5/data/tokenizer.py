"""Bytes as tokens, with GLM's special tokens behind them. Text can never spell a special token: those are added by id."""

import hashlib

import numpy as np

# Names and order of the GLM-4.5 / GLM-5 tokenizer's added tokens. New ones go to the end: ids are stored in checkpoints.
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
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "<tool_response>",
    "</tool_response>",
    "/nothink",
    "<|code_prefix|>",
    "<|code_middle|>",
    "<|code_suffix|>",
)


class ByteTokenizer:
    """Token ids 0 to 255 are the bytes of UTF-8 text; ``SPECIAL_TOKENS`` follow from 256.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.decode(tokenizer.encode("π = 3"))
    'π = 3'
    """

    kind = "bytes"
    vocab_size = 256 + len(SPECIAL_TOKENS)
    digest = hashlib.sha256("\0".join(("bytes", *SPECIAL_TOKENS)).encode()).hexdigest()  # equal digest, equal ids

    def __init__(self):
        self.special_ids = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.eos_id = self.special_ids["<|endoftext|>"]

    def encode(self, text: str | bytes) -> np.ndarray:
        """The bytes of `text` as int32 ids [num_bytes]. Special tokens written out in `text` stay bytes."""
        raw = text.encode() if isinstance(text, str) else text
        return np.frombuffer(raw, dtype=np.uint8).astype(np.int32)

    def encode_document(self, text: str | bytes) -> np.ndarray:
        """``[gMASK] <sop> bytes <|endoftext|>``: a whole document as the model sees it, int32."""
        prefix = [self.special_ids["[gMASK]"], self.special_ids["<sop>"]]
        return np.concatenate([np.array(prefix, np.int32), self.encode(text), np.array([self.eos_id], np.int32)])

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
            if token < 256:
                out.append(token)
            elif token >= self.vocab_size:
                out += "\ufffd".encode()
            elif not skip_special:
                out += SPECIAL_TOKENS[token - 256].encode()
        return out.decode(errors="replace")
