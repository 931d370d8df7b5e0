"""Counter-based randomness: every draw is a function of (seed, stream, index), so there is no state to save or to lose."""

import numpy as np

# Streams keep draws for different purposes apart. A number, once used, keeps its meaning.
STREAM_PIECES = 1
STREAM_EPOCH = 2
# 3 is glm5.model.selection's, for random keys.


def generator(seed: int, stream: int, index: int = 0) -> np.random.Generator:
    """A Philox generator keyed by (seed, stream) and starting at a block of its counter that belongs to `index` alone."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, index, 0]))


def permutation(seed: int, stream: int, index: int, length: int) -> np.ndarray:
    """The order of `length` items in round `index`: int64 [length]."""
    return generator(seed, stream, index).permutation(length)
