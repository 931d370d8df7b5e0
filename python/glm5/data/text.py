"""The tokenizer that belongs to a model or data directory, and text that comes token by token."""

import json
from pathlib import Path

import numpy as np

from glm5.data.bpe import BpeTokenizer, is_bytes, what_differs
from glm5.data.tokenizer import ByteTokenizer, Tokenizer


class JsonTokenizer:
    """Another model's tokenizer.json, by the ``tokenizers`` package. ``decode`` drops special tokens.

    Unlike a ``Tokenizer``, it knows nothing of GLM-5's special tokens, and text that spells one of the file's becomes it.
    """

    def __init__(self, path: Path):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError(f"{path} needs the tokenizers package: pip install tokenizers") from None
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"{path} is damaged or of an unknown kind: {error}") from None

    def encode(self, text: str) -> np.ndarray:
        """int32 ids of ``text``, without special tokens added."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids) -> str:
        return self._tokenizer.decode([int(i) for i in ids])


def load_tokenizer(folder: Path | str) -> Tokenizer | JsonTokenizer:
    """The tokenizer of a directory: its tokenizer.json.

    A file with GLM-5's special tokens (which ``Tokenizer.save`` writes, and GLM-5 has) gives a ``ByteTokenizer`` or a
    ``BpeTokenizer``; any other file a ``JsonTokenizer``.

    Raises:
        ValueError: there is none, or it cannot be read; the message names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a directory")
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is damaged or of an unknown kind: {error}") from None
        if what_differs(content):
            return JsonTokenizer(path)
        try:
            return ByteTokenizer() if is_bytes(content) else BpeTokenizer(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    raise ValueError(
        f"{folder} has no tokenizer.json: put the model's there (for bytes: glm5.data.ByteTokenizer().save(folder))"
    )


class TextStream:
    """Text of ids that come one by one: what has become certain since the last call.

    ``before`` are the ids of a prompt, which is not shown: some tokenizers drop the space before a text's first word.
    """

    def __init__(self, tokenizer, before=()):
        self._tokenizer, self._ids = tokenizer, list(before)
        self._shown = len(tokenizer.decode(self._ids))

    def push(self, token: int, last: bool = False) -> str:
        """New text after ``token``. The first bytes of an unfinished character wait for the rest, unless it is the last."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        whole = text if last else text.rstrip("\ufffd")
        new, self._shown = whole[self._shown :], max(self._shown, len(whole))
        return new
