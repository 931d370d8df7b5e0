"""Small data folders for tests."""

from pathlib import Path

import numpy as np

from glm5.data import ByteTokenizer, DataFolder, DataWriter


def text_folder(out: Path, **domains: list[bytes]) -> DataFolder:
    """Byte tokens of texts, by domain; ``name_validation`` is the held-out part of ``name``."""
    tokenizer = ByteTokenizer()
    with DataWriter(out, tokenizer, shard_tokens=1 << 12) as writer:
        for name, texts in domains.items():
            for text in texts:
                writer.add(name.replace("_validation", "/validation"), tokenizer.encode_document(text), num_bytes=len(text))
        return writer.finish()


def random_text(rng: np.random.Generator, length: int) -> bytes:
    return rng.integers(0, 256, length).astype(np.uint8).tobytes()
