"""Counter-based randomness: every draw is a function of (seed, stream, index), so there is no state to save or to lose."""

import numpy as np

# Streams keep draws for different purposes apart. A number, once used, keeps its meaning.
# 1 and 2 were the first loader's, 3 is glm5.model.selection's, for random keys.
STREAM_DOCUMENTS = 4
STREAM_PACKS = 5
STREAM_COPIES = 6
STREAM_DIALOGUES = 10
STREAM_SYNTHETIC = 20
STREAM_SYNTHETIC_HELD_OUT = 21

_ROUNDS = 8
_U = np.uint64


def generator(seed: int, stream: int, index: int = 0, of: int = 0) -> np.random.Generator:
    """A Philox generator keyed by (seed, stream), at a block of its counter that belongs to (index, of) alone."""
    # As uint64: a list with a number past 2^63 in it becomes floating point.
    counter = np.array([0, 0, index, of], np.uint64)
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=counter))


def permutation(seed: int, stream: int, index: int, length: int, of: int = 0) -> np.ndarray:
    """The order of `length` items in round `index`: int64 [length]."""
    return generator(seed, stream, index, of).permutation(length)


class Order:
    """The order of `length` items in round `index`, of which any part can be had without the rest.

    A Feistel network of eight rounds, keyed by Philox, over the next power of four; what falls outside walks on until it
    falls inside (Black and Rogaway 2002). Time and memory of a part are those of its size.
    """

    def __init__(self, seed: int, stream: int, index: int, length: int, of: int = 0):
        self.length = length
        self._half = _U(max(1, (max(length - 1, 1).bit_length() + 1) // 2))
        self._keys = generator(seed, stream, index, of).integers(0, 1 << 64, _ROUNDS, dtype=np.uint64)

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """The items at `places`, each in [0, length): int64 of the same shape."""
        found = self._shuffle(np.asarray(places).astype(np.uint64))
        while len(outside := np.flatnonzero(found >= _U(self.length))):
            found[outside] = self._shuffle(found[outside])
        return found.astype(np.int64)

    def _shuffle(self, x: np.ndarray) -> np.ndarray:
        low = (_U(1) << self._half) - _U(1)
        left, right = x >> self._half, x & low
        for key in self._keys:
            left, right = right, left ^ (mixed(right ^ key) >> (_U(64) - self._half))
        return (left << self._half) | right


def mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: a hash of uint64 numbers."""
    x = (x ^ (x >> _U(30))) * _U(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U(27))) * _U(0x94D049BB133111EB)
    return x ^ (x >> _U(31))
