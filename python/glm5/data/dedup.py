"""Duplicates, exact and near, of a corpus of any size: everything that grows with it is on disk, in sorted runs.

A document is dropped when an earlier one has the same bytes, or when the MinHash signatures of both agree in at least a
given share of their places, which estimates the Jaccard similarity of their sets of 5-word shingles. All training documents
count as earlier than held-out ones, so a copy always leaves the held-out side. Knows nothing of files, tokens or recipes.

MinHash here is one permutation hashing (Li, Owen, Zhang 2012): each shingle is hashed once, to a bin and a value, and a bin
keeps its smallest value; an empty bin borrows from another by a fixed order (Shrivastava 2017). That is one hash a shingle
where the textbook takes 120.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

NUM_BINS, NUM_BANDS = 120, 20  # of bins; at similarity 0.8 all 20 bands of 6 miss one pair in 400, at 0.9 one in 10^6
SHINGLE_WORDS = 5
HELD_OUT = np.uint64(1) << np.uint64(63)  # in a rank: after every document without it
BLOCK_BYTES = 1 << 16  # text hashed at once: the arrays stay in the cache
_RUN_RECORDS = 1 << 17  # sorted in memory at once
_RUNS_AT_ONCE = 64  # merged in one pass; where there are more, there are more passes
_PAIRS_AT_ONCE = 1 << 12

_EMPTY = np.uint32(0xFFFFFFFF)
_U = np.uint64


def _constants(seed: int, count: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, 0x6C6D35])).integers(0, 1 << 64, count, dtype=np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, in place."""
    x ^= x >> _U(30)
    x *= _U(0xBF58476D1CE4E5B9)
    x ^= x >> _U(27)
    x *= _U(0x94D049BB133111EB)
    x ^= x >> _U(31)
    return x


# ---- signatures ----

# Words are runs of ASCII letters, digits, _ and bytes past ASCII, without regard to case. A character of three bytes or more
# (Chinese, Japanese, Korean, but also typographic quotes) begins a word: those scripts have no spaces.
_BREAK, _WORD, _FIRST = range(3)
_CLASSES = bytes(_FIRST if b >= 0xE0 else _WORD if b >= 128 or b == 95 or chr(b).isalnum() else _BREAK for b in range(256))
_VALUES = _constants(1, 256)
_VALUES[65:91] = _VALUES[97:123]

# A word's hash is the sum of value * base^place over its bytes, divided by base^begin: differences of one running sum.
_BASE = int(_constants(2, 1)[0]) | 1


def _powers(base: int, count: int) -> np.ndarray:
    powers = np.full(count, base, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


_POWERS = _powers(_BASE, BLOCK_BYTES + 1)
_INVERSES = _powers(pow(_BASE, -1, 1 << 64), BLOCK_BYTES + 1)
_SHINGLE = _constants(3, SHINGLE_WORDS) | _U(1)
_BAND = _constants(4, NUM_BINS) | _U(1)
_BAND_START = _constants(5, NUM_BANDS)
_LENDERS = np.argsort(_constants(6, NUM_BINS * NUM_BINS).reshape(NUM_BINS, NUM_BINS), axis=0)  # [attempt, empty bin] -> bin


def word_hashes(block: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Begins (int64 [words]) and hashes (uint64 [words]) of the words of a block of at most ``BLOCK_BYTES``."""
    classes = np.frombuffer(block.translate(_CLASSES), np.uint8)
    bounded = np.zeros(len(block) + 2, bool)
    is_word = bounded[1:-1]
    np.not_equal(classes, _BREAK, out=is_word)
    edges = np.flatnonzero(bounded[1:] != bounded[:-1])  # where runs of word bytes begin and end, in turn
    begin, end = edges[::2], edges[1::2]
    inside = np.flatnonzero((classes[1:] == _FIRST) & is_word[:-1]) + 1  # words that begin where another one ends
    if len(inside):
        begin, end = np.sort(np.append(begin, inside)), np.sort(np.append(end, inside))
    running = np.zeros(len(block) + 1, np.uint64)
    np.cumsum(_VALUES[np.frombuffer(block, np.uint8)] * _POWERS[: len(block)], out=running[1:])
    return begin, (running[end] - running[begin]) * _INVERSES[begin]


def _fill(table: np.ndarray, owner: np.ndarray, block: bytes) -> None:
    """Puts the shingles of a block into `table`, uint32 [rows * bins]; `owner` gives the first byte of each row."""
    begin, words = word_hashes(block)
    if len(words) < SHINGLE_WORDS:
        return
    row = np.searchsorted(owner, begin, side="right") - 1
    count = len(words) - SHINGLE_WORDS + 1
    shingles = words[:count] * _SHINGLE[0]
    for i in range(1, SHINGLE_WORDS):
        shingles += words[i : i + count] * _SHINGLE[i]
    _mix(shingles)
    whole = row[:count] == row[SHINGLE_WORDS - 1 :]
    shingles, row = shingles[whole], row[:count][whole]
    bins = ((shingles >> _U(32)) * _U(NUM_BINS) >> _U(32)).astype(np.int64)
    np.minimum.at(table, row * NUM_BINS + bins, shingles.astype(np.uint32))


def signatures(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """MinHash signatures of `texts`.

    Text is hashed in blocks, and shingles over the edge of a block of one text are left out.

    Returns:
        uint32 [n, NUM_BINS], and bool [n]: whether a text has ``SHINGLE_WORDS`` words, without which there is no signature.
    """
    table = np.full((len(texts), NUM_BINS), _EMPTY, np.uint32)
    group: list[int] = []
    size = 0

    def flush() -> None:
        nonlocal group, size
        if group:
            starts = np.cumsum([0] + [len(texts[i]) + 1 for i in group[:-1]])
            part = np.full((len(group), NUM_BINS), _EMPTY, np.uint32)
            _fill(part.reshape(-1), starts, b"\n".join(texts[i] for i in group))
            table[group] = part
        group, size = [], 0

    for i, text in enumerate(texts):
        if len(text) > BLOCK_BYTES:
            for begin in range(0, len(text), BLOCK_BYTES):
                _fill(table[i], np.zeros(1, np.int64), text[begin : begin + BLOCK_BYTES])
        else:
            if size + len(text) + 1 > BLOCK_BYTES:
                flush()
            group.append(i)
            size += len(text) + 1
    flush()
    full = table != _EMPTY
    meaningful = full.any(1)
    row, column = np.nonzero(~full & meaningful[:, None])
    for lenders in _LENDERS:
        if not len(row):
            break
        lender = lenders[column]
        found = full[row, lender]
        table[row[found], column[found]] = table[row[found], lender[found]]
        row, column = row[~found], column[~found]
    return table, meaningful


def band_keys(table: np.ndarray) -> np.ndarray:
    """Keys under which similar signatures meet, one a band: uint64 [n, NUM_BANDS]."""
    terms = (table * _BAND).reshape(-1, NUM_BANDS, NUM_BINS // NUM_BANDS)
    return _mix(terms.sum(2, dtype=np.uint64) + _BAND_START)


# ---- sorting on disk ----


class SortedRuns:
    """(key, rank) pairs, uint64 both, in any number, that come back sorted. Holds ``_RUN_RECORDS`` of them in memory."""

    def __init__(self, path: Path, run_records: int = _RUN_RECORDS):
        self._file = open(path, "w+b", buffering=0)
        self._runs: list[tuple[int, int]] = []  # first record, number of records
        self._waiting: list[np.ndarray] = []
        self._num_waiting = self._num_written = 0
        self._run_records = run_records

    def add(self, keys: np.ndarray, ranks: np.ndarray) -> None:
        pairs = np.empty((len(keys), 2), np.uint64)
        pairs[:, 0], pairs[:, 1] = keys, ranks
        self._waiting.append(pairs)
        self._num_waiting += len(pairs)
        if self._num_waiting >= self._run_records:
            self._write_run()

    def _write_run(self) -> None:
        if self._num_waiting:
            pairs = np.concatenate(self._waiting)
            self._waiting, self._num_waiting = [], 0
            self._runs.append(self._write([pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]]))

    def _write(self, blocks: Iterable[np.ndarray]) -> tuple[int, int]:
        """Adds a run to the file: its first record, and how many."""
        first = self._num_written
        for block in blocks:
            os.pwrite(self._file.fileno(), memoryview(block).cast("B"), 16 * self._num_written)
            self._num_written += len(block)
        return first, self._num_written - first

    def merged(self) -> Iterator[np.ndarray]:
        """All pairs by key, then rank, in blocks uint64 [n, 2]. Ends the adding; may be asked for again."""
        self._write_run()
        while len(self._runs) > _RUNS_AT_ONCE:
            groups = [self._runs[i : i + _RUNS_AT_ONCE] for i in range(0, len(self._runs), _RUNS_AT_ONCE)]
            self._runs = [self._write(self._merge(group)) for group in groups]
        return self._merge(self._runs)

    def _merge(self, runs: list[tuple[int, int]]) -> Iterator[np.ndarray]:
        share = max(self._run_records // max(len(runs), 1), 1)
        left = dict(enumerate(runs))
        blocks: dict[int, np.ndarray] = {}
        while left or blocks:
            for run, (first, count) in list(left.items()):
                if run not in blocks:
                    taken = min(share, count)
                    raw = os.pread(self._file.fileno(), 16 * taken, 16 * first)
                    blocks[run] = np.frombuffer(raw, np.uint64).reshape(-1, 2)
                    left[run] = (first + taken, count - taken)
                    if taken == count:
                        del left[run]
            # Everything up to the smallest last pair of a run that goes on is here.
            limits = [tuple(blocks[run][-1].tolist()) for run in left]
            ready, limit = [], min(limits, default=None)
            for run, block in list(blocks.items()):
                cut = len(block) if limit is None else _count_up_to(block, limit)
                ready.append(block[:cut])
                if cut < len(block):
                    blocks[run] = block[cut:]
                else:
                    del blocks[run]
            pairs = np.concatenate(ready)
            yield pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]

    def close(self) -> None:
        self._file.close()


def _count_up_to(block: np.ndarray, limit: tuple[int, int]) -> int:
    """How many pairs of a sorted block are at most `limit`."""
    key, rank = _U(limit[0]), _U(limit[1])
    low, high = (int(np.searchsorted(block[:, 0], key, side=side)) for side in ("left", "right"))
    return low + int(np.searchsorted(block[low:high, 1], rank, side="right"))


def _meetings(runs: SortedRuns) -> Iterator[np.ndarray]:
    """Ranks (earlier, later) [n, 2] that have a key in common: each later one with the first and with the one before it."""
    last_key, first_rank, last_rank = None, _U(0), _U(0)
    for block in runs.merged():
        key, rank = block[:, 0], block[:, 1]
        starts = np.empty(len(key), bool)
        starts[0] = last_key is None or key[0] != last_key
        starts[1:] = key[1:] != key[:-1]
        place = np.maximum.accumulate(np.where(starts, np.arange(len(key)), -1))
        first = np.where(place >= 0, rank[place], first_rank)
        before = np.concatenate([[last_rank], rank[:-1]])
        later = ~starts
        yield np.stack([first[later], rank[later]], 1)
        other = later & (before != first)
        yield np.stack([before[other], rank[other]], 1)
        last_key, first_rank, last_rank = key[-1], first[-1], rank[-1]


# ---- rows of fixed size on disk ----


class Rows:
    """An array that grows on disk and is read row by row, without mapping it: a mapping counts as memory."""

    def __init__(self, path: Path, dtype, width: int):
        self._file = open(path, "w+b", buffering=1 << 16)
        self._dtype, self._width = np.dtype(dtype), width
        self._size = self._dtype.itemsize * width

    def append(self, rows: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(rows, self._dtype).tobytes())

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """Rows [n, width]."""
        self._file.flush()
        unique, where = np.unique(numbers, return_inverse=True)
        raw = b"".join(os.pread(self._file.fileno(), self._size, self._size * int(n)) for n in unique)
        return np.frombuffer(raw, self._dtype).reshape(-1, self._width)[where]

    def close(self) -> None:
        self._file.close()


# ---- the whole ----


class Deduplicator:
    """Add every document in order, then ask for those to drop.

    Args:
        folder: for its files; the caller removes them.
        exact: drop a document whose very bytes an earlier one has. If not, only a held-out copy of a training document goes.
        near: drop one whose similarity to an earlier one is at least this; 0: none.
    """

    def __init__(self, folder: Path, exact: bool, near: float):
        self._exact, self._near = exact, near
        self._ids, self._id_rows = SortedRuns(folder / "ids"), Rows(folder / "id-rows", np.uint64, 2)
        self._texts, self._text_rows = SortedRuns(folder / "texts"), Rows(folder / "text-rows", np.uint64, 2)
        self._bands = SortedRuns(folder / "bands") if near else None
        self._signatures = Rows(folder / "signatures", np.uint32, NUM_BINS) if near else None
        self._drops = SortedRuns(folder / "drops")
        self._count = 0

    def add(self, id_digests: np.ndarray, text_digests: np.ndarray, held_out: np.ndarray, texts: list[bytes]) -> None:
        """Some documents: digests uint64 [n, 2] of ids and of bytes, bool [n], and the bytes."""
        number = np.arange(self._count, self._count + len(texts), dtype=np.uint64)
        rank = np.where(held_out, number | HELD_OUT, number)
        self._count += len(texts)
        self._ids.add(id_digests[:, 0], number)
        self._id_rows.append(id_digests)
        self._texts.add(text_digests[:, 0], rank)
        self._text_rows.append(text_digests)
        if self._near:
            table, meaningful = signatures(texts)
            self._signatures.append(table)
            self._bands.add(band_keys(table[meaningful]).reshape(-1), np.repeat(rank[meaningful], NUM_BANDS))

    def duplicate_ids(self) -> tuple[int, int] | None:
        """Numbers of the first document whose id an earlier one has, the earlier one's first; None: all ids differ."""
        found = None
        for pairs in _meetings(self._ids):
            for earlier, later in pairs[_agreement(self._id_rows, pairs) == 1].tolist():
                if found is None or later < found[1]:
                    found = earlier, later
        return found

    def compare(self) -> None:
        """Ends the adding and finds what is to be dropped."""
        for pairs in _meetings(self._texts):
            if not self._exact:
                pairs = pairs[(pairs[:, 0] < HELD_OUT) & (pairs[:, 1] >= HELD_OUT)]
            same = pairs[_agreement(self._text_rows, pairs) == 1, 1]
            self._drops.add(same & ~HELD_OUT, np.zeros(len(same), np.uint64))
        if self._near:
            for pairs in _meetings(self._bands):
                similar = np.unique(pairs[_agreement(self._signatures, pairs) >= self._near, 1])
                self._drops.add(similar & ~HELD_OUT, np.ones(len(similar), np.uint64))

    def drops(self) -> Iterator[tuple[int, str]]:
        """(number, rule) of each document to drop, by number; the rule is "exact_duplicate" or "near_duplicate"."""
        last = None
        for block in self._drops.merged():
            for number, rule in block.tolist():
                if number != last:
                    yield number, ("near_duplicate" if rule else "exact_duplicate")
                last = number

    def close(self) -> None:
        for part in vars(self).values():
            if isinstance(part, SortedRuns | Rows):
                part.close()


def _agreement(rows: Rows, pairs: np.ndarray) -> np.ndarray:
    """Share of equal places in the rows of each pair of ranks: float64 [n]."""
    shares = np.empty(len(pairs))
    for begin in range(0, len(pairs), _PAIRS_AT_ONCE):
        part = (pairs[begin : begin + _PAIRS_AT_ONCE] & ~HELD_OUT).astype(np.int64)
        shares[begin : begin + len(part)] = (rows.take(part[:, 0]) == rows.take(part[:, 1])).mean(1)
    return shares
