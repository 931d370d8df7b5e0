"""Documents cut, packed and drawn: ``dataset.batch(step, ...)`` is a function of its arguments and nothing else.

A document longer than the sequence length is cut into pieces; each piece is a document of its own to attention and
positions, but its last token still has the next token of the file as its target. Pieces are shuffled once, packed
best-fit into budgets of one sequence length, and every epoch visits the packs in an order of its own. What a model does
with a batch is not known here.
"""

from dataclasses import dataclass

import numpy as np
import torch

from glm5._runtime import SequencePacker
from glm5.data.random import STREAM_EPOCH, STREAM_PIECES, permutation
from glm5.data.tokenizer import ByteTokenizer

IGNORED_TARGET = -100


@dataclass(frozen=True)
class Batch:
    """One step's tokens, all packs in a row. T = number of tokens; document boundaries are in `ks` and `ke`."""

    tokens: torch.Tensor  # [T] int64
    targets: torch.Tensor  # [T] int64, the next token of the same document, or -100
    positions: torch.Tensor  # [T] int32, counted from the start of the document
    ks: torch.Tensor  # [T] int32, first key the token may see: the start of its document
    ke: torch.Tensor  # [T] int32, one past the last: its own place + 1 (causal)

    def num_bytes(self) -> int:
        """Targets that are bytes of text, the denominator of nats per byte."""
        return int(((self.targets >= 0) & (self.targets < 256)).sum())


# Token ids, and where there is a loss mask, nonzero for those that are targets which count.
Document = tuple[np.ndarray, np.ndarray | None]


def domain_documents(domain) -> list[Document]:
    """All documents of a ``shards.Domain``."""
    return [(domain.tokens(i), domain.mask(i)) for i in range(domain.num_documents)]


class PackedDataset:
    """`documents` as packs of `sequence_length` tokens.

    Args:
        documents: raw bytes, which become byte tokens, or token ids with their masks; in a fixed order.
        sequence_length: the longest piece, and the size of a pack.
        seed: decides how pieces are packed and in which order epochs visit the packs.

    Raises:
        ValueError: no documents, or a sequence length below 2.
    """

    def __init__(self, documents: list[bytes] | list[Document], sequence_length: int, seed: int):
        if not documents:
            raise ValueError("PackedDataset: documents is empty, want at least one")
        if sequence_length < 2:
            raise ValueError(f"PackedDataset: sequence_length is {sequence_length}, want at least 2")
        self.sequence_length, self.seed = sequence_length, seed
        tokenizer = ByteTokenizer()
        if isinstance(documents[0], bytes):
            documents = [(tokenizer.encode_document(document), None) for document in documents]
        encoded = [ids for ids, _ in documents]
        counted = [np.ones(len(ids), bool) if mask is None else mask != 0 for ids, mask in documents]
        self._eos = tokenizer.eos_id
        self._tokens = np.concatenate(encoded)  # [all tokens of all documents]
        lengths = np.array([len(document) for document in encoded])
        # A token's target is the next one, pieces or not, if that counts; the last of a document has none.
        self._has_target = np.append(np.concatenate(counted)[1:], False)
        self._has_target[np.cumsum(lengths) - 1] = False

        starts = np.cumsum(lengths) - lengths
        begins = np.concatenate([np.arange(s, s + n, sequence_length) for s, n in zip(starts, lengths, strict=True)])
        ends = np.concatenate([np.minimum(np.arange(s, s + n, sequence_length) + sequence_length, s + n)
                               for s, n in zip(starts, lengths, strict=True)])  # fmt: skip
        order = permutation(seed, STREAM_PIECES, 0, len(begins))
        self._begins, self._lengths = begins[order], (ends - begins)[order]
        self._packs = SequencePacker(sequence_length).pack(self._lengths)

    @property
    def num_packs(self) -> int:
        return len(self._packs)

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def batch(self, step: int, packs_per_step: int, first_pack: int = 0) -> Batch:
        """Batch number `step` of a stage that begins `first_pack` packs into the endless row of shuffled epochs."""
        begin = first_pack + step * packs_per_step
        places = range(begin, begin + packs_per_step)
        epochs = {place // self.num_packs for place in places}
        orders = {epoch: permutation(self.seed, STREAM_EPOCH, epoch, self.num_packs) for epoch in epochs}
        return self.collate([orders[place // self.num_packs][place % self.num_packs] for place in places])

    def collate(self, pack_ids) -> Batch:
        """The packs `pack_ids` as one flat batch of ``len(pack_ids) * sequence_length`` tokens.

        A pack that is not full ends in padding: end-of-text tokens without a target, a document of their own.
        """
        size = self.sequence_length
        tokens = np.full(len(pack_ids) * size, self._eos, np.int64)
        targets = np.full(len(tokens), IGNORED_TARGET, np.int64)
        positions = np.zeros(len(tokens), np.int32)
        ks = np.zeros(len(tokens), np.int32)
        for i, pack in enumerate(self._packs[p] for p in pack_ids):
            base, used = i * size, pack.num_tokens
            source = np.concatenate([np.arange(self._begins[d], self._begins[d] + self._lengths[d]) for d in pack.documents])
            tokens[base : base + used] = self._tokens[source]
            has_target = self._has_target[source]
            targets[base : base + used][has_target] = self._tokens[source[has_target] + 1]
            positions[base : base + used] = pack.positions()
            ks[base : base + used] = base + pack.ks()
            positions[base + used : base + size] = np.arange(size - used)
            ks[base + used : base + size] = base + used
        ke = np.arange(1, len(tokens) + 1, dtype=np.int32)
        return Batch(*(torch.from_numpy(a) for a in (tokens, targets, positions, ks, ke)))
