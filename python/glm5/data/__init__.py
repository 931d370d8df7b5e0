"""From files to training batches. Knows nothing of models: a batch is a few flat integer tensors."""

from glm5.data.batches import Batch
from glm5.data.bpe import BpeTokenizer, train_bpe
from glm5.data.chat import ChatError, ChatTemplate
from glm5.data.corpus import Corpus, CorpusError, python_stdlib
from glm5.data.mixture import MixedDataset
from glm5.data.shards import DataError, DataFolder, DataWriter, open_data
from glm5.data.text import load_tokenizer
from glm5.data.tokenizer import ByteTokenizer, Tokenizer

__all__ = [
    "Batch",
    "BpeTokenizer",
    "ByteTokenizer",
    "ChatError",
    "ChatTemplate",
    "Corpus",
    "CorpusError",
    "DataError",
    "DataFolder",
    "DataWriter",
    "MixedDataset",
    "Tokenizer",
    "load_tokenizer",
    "open_data",
    "python_stdlib",
    "train_bpe",
]
