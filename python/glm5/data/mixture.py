"""Domains mixed, packed and drawn: ``dataset.batch(step, ...)`` is a function of its arguments and nothing else.

Packs are numbered from 0 without end. Which domain pack g is of, the mix decides; a domain's packs come epoch by epoch, and
in an epoch window by window: so many documents in a shuffled order, cut where they are longer than a pack, packed best-fit,
the packs shuffled. Lengths of one window are held in memory and of the rest nothing but where its windows begin, so a
domain may be far larger than memory. A jump forward, to go on with a run, walks over the lengths in between.

Documents without a loss mask are cut into pieces of at most the sequence length; each piece is a document of its own to
attention and positions, but its last token still has the next token of the document as its target. Documents with a mask,
conversations, stay whole: of one that is longer than the sequence length, the first tokens are kept, as many as there is
room for, and if none of them is to be learnt it is left out. What a model does with a batch is not known here.
"""

import bisect
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from glm5._runtime import SequencePacker
from glm5.data.batches import IGNORED_TARGET, Batch
from glm5.data.random import STREAM_COPIES, STREAM_DOCUMENTS, STREAM_PACKS, Order, generator, mixed, permutation
from glm5.data.shards import DataFolder, Domain
from glm5.data.tokenizer import SPECIAL_TOKENS

WINDOW_PIECES = 1 << 16  # a window ends with the document whose pieces make it so many
MIX_PERIOD = 4096  # packs after which a mix repeats itself: shares are multiples of 1 / 4096
_DOCUMENTS_AT_ONCE = 1 << 12


class MixedDataset:
    """Packs of `sequence_length` tokens from several domains of a data folder.

    Args:
        data: where the documents are.
        mix: domain -> weight. Of the first G packs, G * weight / (sum of weights) are of that domain, to within one pack;
            shares are rounded to multiples of 1 / ``MIX_PERIOD`` by largest remainder. Their order means nothing.
        sequence_length: the longest piece, and the size of a pack.
        seed: decides the order of documents and of packs.
        rank, world_size: which share of every step's packs ``batch`` gives: all shares, one after the other, are the step.
        long_document_power: p > 0 draws documents in proportion to length^p: the longest one comes once in every epoch, one
            of length n in (n / longest)^p of them. 0: every document comes once in every epoch.

    Raises:
        ValueError: an argument out of range, a share below 1 / ``MIX_PERIOD``, a domain that is not there or has nothing to
            train on.
    """

    def __init__(
        self,
        data: DataFolder,
        mix: Mapping[str, float],
        sequence_length: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        long_document_power: float = 0.0,
    ):
        if sequence_length < 2:
            raise ValueError(f"MixedDataset: sequence_length is {sequence_length}, want at least 2")
        if not 0 <= rank < world_size:
            raise ValueError(f"MixedDataset: rank is {rank} and world_size {world_size}, want 0 <= rank < world_size")
        if not 0 <= long_document_power < math.inf:
            raise ValueError(f"MixedDataset: long_document_power is {long_document_power}, want a number >= 0")
        self.sequence_length, self.rank, self.world_size = sequence_length, rank, world_size
        self._eos = data.manifest.tokenizer.vocab_size - len(SPECIAL_TOKENS)  # the special tokens come last, this one first
        shares = mix_shares(mix)
        self._mix = _Quotas(list(shares.values()))
        self._domains = [_DomainPacks(data.domain(name), sequence_length, seed, long_document_power) for name in shares]

    def batch(self, step: int, packs_per_step: int, first_pack: int = 0) -> Batch:
        """This rank's share of step number `step` of a stage that begins `first_pack` packs into the endless row.

        Raises:
            ValueError: fewer packs than ranks.
        """
        if packs_per_step < self.world_size:
            raise ValueError(f"MixedDataset: {packs_per_step} packs a step for {self.world_size} ranks, want one for each")
        begin, end = (packs_per_step * rank // self.world_size for rank in (self.rank, self.rank + 1))
        first = first_pack + step * packs_per_step
        return self.collate(range(first + begin, first + end))

    def num_packs(self, at_most: int) -> int:
        """Packs, from the first on, before one is of a second epoch of its domain, or `at_most` if there are more."""
        for pack in range(at_most):
            domain, place = self._mix.place(pack)
            if self._domains[domain].epoch_of(place) > 0:
                return pack
        return at_most

    def collate(self, packs) -> Batch:
        """The packs with these numbers as one flat batch of ``len(packs) * sequence_length`` tokens.

        A pack that is not full ends in padding: end-of-text tokens without a target, a document of their own.
        """
        size = self.sequence_length
        tokens = np.full(len(packs) * size, self._eos, np.int64)
        targets = np.full(len(tokens), IGNORED_TARGET, np.int64)
        ks = np.empty(len(tokens), np.int32)
        for base, pack in zip(range(0, len(tokens), size), packs, strict=True):
            domain, place = self._mix.place(pack)
            at = base
            for piece in self._domains[domain].pack(place):
                start = at
                for document, begin, length in piece:
                    self._domains[domain].copy(document, begin, length, tokens[at:], targets[at:])
                    at += length
                ks[start:at] = start
            ks[at : base + size] = at
        place = np.arange(len(tokens), dtype=np.int32)
        return Batch(*(torch.from_numpy(a) for a in (tokens, targets, place - ks, ks, place + 1)))


def mix_shares(mix: Mapping[str, float]) -> dict[str, int]:
    """Packs of each domain in a period of ``MIX_PERIOD``, in the order of their names: equal shares, equal packs.

    Raises:
        ValueError: no domain, a weight that is not above zero, a share too small.
    """
    weights = dict(sorted(mix.items()))
    if not mix or not all(0 < weight < math.inf for weight in weights.values()):
        raise ValueError(f"mix is {dict(mix)}, want domains with weights above zero")
    total = sum(weights.values())
    shares = dict(zip(weights, _largest_remainder([w / total for w in weights.values()], MIX_PERIOD), strict=True))
    for name, share in shares.items():
        if share == 0:
            raise ValueError(f"mix gives {name} a share below 1 / {MIX_PERIOD}; raise its weight")
    return shares


class _Quotas:
    """Which domain pack g is of, and how many of that domain come before it: O(1), from a table of one period."""

    def __init__(self, shares: list[int]):
        self.shares = shares
        self._domain, self._before = _earliest_deadlines(shares)

    def place(self, pack: int) -> tuple[int, int]:
        """(number of the domain, number of the pack among those of the domain)."""
        period, offset = divmod(pack, MIX_PERIOD)
        domain = self._domain[offset]
        return domain, period * self.shares[domain] + self._before[offset]


def _largest_remainder(shares: list[float], total: int) -> list[int]:
    """Whole numbers in proportion to `shares` whose sum is `total` (Hamilton's method; ties go to the first)."""
    quotas = [math.floor(share * total) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: quotas[i] - shares[i] * total)
    for i in by_remainder[: total - sum(quotas)]:
        quotas[i] += 1
    return quotas


def _earliest_deadlines(shares: list[int]) -> tuple[list[int], list[int]]:
    """For each place of a period its domain and how many of that domain come before.

    Of a domain with q packs in a period of M, pack number j (from 0) may stand from place floor(j M / q) on and must stand
    before place ceil((j + 1) M / q); the one that must come first comes next. Then every domain is always within one pack of
    its due (Baruah et al. 1996, proportionate progress).
    """
    total, done, domains, before = sum(shares), [0] * len(shares), [], []
    for place in range(total):
        due = [
            (-(-(done[d] + 1) * total // q), d)
            for d, q in enumerate(shares)
            if done[d] < q and done[d] * total // q <= place
        ]
        domain = min(due)[1]
        domains.append(domain)
        before.append(done[domain])
        done[domain] += 1
    return domains, before


@dataclass(frozen=True)
class _Window:
    """The packs of one window. Pack i has pieces ``pack_begin[i]:pack_begin[i + 1]`` of `pieces`, each a number; piece p has
    spans ``span_begin[p]:span_begin[p + 1]``: runs of tokens of one document."""

    first_pack: int  # of the window, among the packs of its domain
    pack_begin: np.ndarray  # [packs + 1]
    pieces: np.ndarray  # [pieces], in the order of packs
    span_begin: np.ndarray  # [pieces + 1]
    spans: np.ndarray  # [spans, 3]: document, first token, tokens


class _DomainPacks:
    """The endless row of packs of one domain."""

    def __init__(self, domain: Domain, sequence_length: int, seed: int, power: float):
        self._domain, self._size, self._seed = domain, sequence_length, seed
        if domain.num_documents == 0:
            raise ValueError(f"MixedDataset: domain {domain.name} has no documents")
        self._whole = domain.mask(0) is not None
        self._of = int.from_bytes(hashlib.sha256(domain.name.encode()).digest()[:8], "little")  # its own random streams
        self._packer = SequencePacker(sequence_length)
        self._copies = _Copies(domain, seed, self._of, power) if power else None
        # Windows seen so far, of all epochs: where each begins, and how many packs come before it and after.
        self._begins: list[tuple[int, int]] = [(0, 0)]  # (epoch, place in its order); the last is the next to be seen
        self._ends: list[int] = []  # packs of the domain up to the end of each window
        self._held: dict[int, _Window] = {}  # the last two that were asked for

    def pack(self, place: int) -> Iterator[list[tuple[int, int, int]]]:
        """The pieces of pack number `place`, each as its spans (document, first token, tokens)."""
        window = self._window_of(place)
        i = place - window.first_pack
        for piece in window.pieces[window.pack_begin[i] : window.pack_begin[i + 1]]:
            yield window.spans[window.span_begin[piece] : window.span_begin[piece + 1]].tolist()

    def epoch_of(self, place: int) -> int:
        """Which epoch pack number `place` is of."""
        self._window_of(place)
        return self._begins[bisect.bisect_right(self._ends, place)][0]

    def copy(self, document: int, begin: int, length: int, tokens: np.ndarray, targets: np.ndarray) -> None:
        """Copies tokens of a document, and their targets where there is one that counts."""
        ids = self._domain.tokens(document)[begin : begin + length + 1]
        tokens[:length] = ids[:length]
        following = ids[1:]
        if self._whole:
            counts = self._domain.mask(document)[begin + 1 : begin + length + 1]
            following = np.where(counts, following.astype(np.int64), IGNORED_TARGET)
        targets[: len(following)] = following

    def _window_of(self, place: int) -> _Window:
        """The window that has pack number `place`; windows not yet seen are walked over."""
        while not self._ends or self._ends[-1] <= place:
            self._hold(len(self._ends))
        number = bisect.bisect_right(self._ends, place)
        return self._held[number] if number in self._held else self._hold(number)

    def _hold(self, number: int) -> _Window:
        window, following = self._make(number)
        if number == len(self._ends):
            self._ends.append(window.first_pack + len(window.pack_begin) - 1)
            self._begins.append(following)
        while len(self._held) > 1:
            self._held.pop(next(iter(self._held)))
        self._held[number] = window
        return window

    def _make(self, number: int) -> tuple[_Window, tuple[int, int]]:
        """Window `number`, and where the next one begins: a function of (seed, epoch, place)."""
        epoch, place = self._begins[number]
        order = Order(self._seed, STREAM_DOCUMENTS, epoch, self._domain.num_documents, self._of)
        found, num_pieces, begin = [], 0, place
        while num_pieces < WINDOW_PIECES and place < order.length:
            places = np.arange(place, min(place + _DOCUMENTS_AT_ONCE, order.length))
            documents = order[places]
            lengths = self._domain.lengths[documents]
            pieces = self._pieces_of(epoch, documents, lengths)
            enough = int(np.searchsorted(np.cumsum(pieces), WINDOW_PIECES - num_pieces)) + 1
            found.append((documents[:enough], lengths[:enough], pieces[:enough]))
            num_pieces += int(pieces[:enough].sum())
            place = int(places[0]) + min(enough, len(places))
        window = self._packed(number, epoch, begin, *(np.concatenate(parts) for parts in zip(*found, strict=True)))
        following = (epoch, place) if place < order.length else (epoch + 1, 0)
        if following[0] > epoch and begin == 0 and not len(window.pieces):
            raise ValueError(f"MixedDataset: domain {self._domain.name} has nothing to train on: {self._why_empty()}")
        return window, following

    def _why_empty(self) -> str:
        return f"no conversation has a token to learn among its first {self._size}"

    def _pieces_of(self, epoch: int, documents: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Into how many pieces each document is cut; 0 where it is not drawn."""
        if self._whole:
            pieces = np.ones(len(documents), np.int64)
            for i in np.flatnonzero(lengths > self._size):
                pieces[i] = bool(self._domain.mask(int(documents[i]))[1 : self._size + 1].any())
        else:
            pieces = -(-lengths // self._size)
        if self._copies:
            pieces *= self._copies.drawn(epoch, documents, lengths)
        return pieces

    def _packed(self, number: int, epoch: int, begin: int, documents, lengths, pieces) -> _Window:
        owner = np.repeat(np.arange(len(documents)), pieces)  # of each piece, a place in documents
        nth = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        first_token = nth * self._size
        spans = np.stack([documents[owner], first_token, np.minimum(lengths[owner] - first_token, self._size)], axis=1)
        packs = self._packer.pack(spans[:, 2])
        members = [
            packs[i].documents for i in permutation(self._seed, STREAM_PACKS, epoch << 40 | begin, len(packs), self._of)
        ]
        return _Window(
            first_pack=self._ends[number - 1] if number else 0,
            pack_begin=np.cumsum([0, *map(len, members)]),
            pieces=np.concatenate([np.empty(0, np.int64), *members]),
            span_begin=np.arange(len(spans) + 1),
            spans=spans,
        )


class _Copies:
    """Which epochs a document is drawn in, if documents are drawn in proportion to length^power.

    A document of weight w, (its length / the longest one's)^power, comes in epoch e where floor(e w + u) makes a step: in
    w E of E epochs, to within one, from a first one that its own u in [0, 1) decides.
    """

    def __init__(self, domain: Domain, seed: int, of: int, power: float):
        self._power = power
        parts = range(0, domain.num_documents, _DOCUMENTS_AT_ONCE)
        self._longest = max(int(domain.lengths[i : min(i + _DOCUMENTS_AT_ONCE, domain.num_documents)].max()) for i in parts)
        self._key = generator(seed, STREAM_COPIES, 0, of).integers(0, 1 << 64, dtype=np.uint64)

    def drawn(self, epoch: int, documents: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """bool [documents]."""
        weights = (lengths / self._longest) ** self._power
        begins = (mixed(documents.astype(np.uint64) ^ self._key) >> np.uint64(32)) / 2.0**32
        return np.floor((epoch + 1) * weights + begins) > np.floor(epoch * weights + begins)
