"""A shuffled order of which only the position is kept: a keyed permutation of 0 to count - 1, another each epoch."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from lamina.errors import LaminaError

ROUNDS = 8  # four make a Feistel network of random functions a random permutation (Luby and Rackoff, 1988)
SMALLEST = 4


class Order:
    """`order[position]`: which of `count` samples stands there. Positions go on without end, an epoch after the other.

    A Feistel network permutes the smallest square that holds `count`: a number is a row and a column of it, and each
    round adds a keyed function of one to the other. What comes to lie beyond `count` is permuted again until it is
    below (cycle walking; both in Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    Nothing is stored and nothing depends on what was asked before, so a place in the data is one number, whatever the
    number of readers. Raises LaminaError for a count below 1.
    """

    def __init__(self, count: int, seed: int = 0) -> None:
        if type(count) is not int or not 1 <= count < 1 << 62:
            raise LaminaError(f"an order of {count!r} samples; at least one is needed")
        if type(seed) is not int:
            raise LaminaError(f"seed={seed!r}; it must be a whole number")
        self.count, self.seed = count, seed
        # With a smaller square, some permutations of a few samples come oftener than others.
        self.side = max(math.isqrt(count - 1) + 1, SMALLEST)

    def __repr__(self) -> str:
        return f"Order({self.count}, seed={self.seed})"

    def __getitem__(self, position: int) -> int:
        return int(self.take(position, position + 1)[0])

    def take(self, start: int, stop: int) -> np.ndarray:
        """int64 (stop - start,): the samples at the positions start to stop - 1."""
        if not 0 <= start <= stop:
            raise LaminaError(f"positions {start} to {stop} of an order; they count from 0 upwards")
        parts = []
        while start < stop:
            epoch, first = divmod(start, self.count)
            last = min(self.count, first + stop - start)
            parts.append(self._permuted(np.arange(first, last, dtype=np.uint64), self._keys(epoch)))
            start += last - first
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _keys(self, epoch: int) -> np.ndarray:
        """uint64 (ROUNDS,): a key a round, of the seed and the epoch."""
        text = f"lamina order {self.seed} {epoch}".encode()
        return np.frombuffer(hashlib.shake_128(text).digest(8 * ROUNDS), "<u8").astype(np.uint64)

    def _permuted(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        values = self._feistel(values, keys)
        beyond = np.flatnonzero(values >= self.count)
        while beyond.size:
            values[beyond] = self._feistel(values[beyond], keys)
            beyond = beyond[values[beyond] >= self.count]
        return values.astype(np.int64)

    def _feistel(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        side = np.uint64(self.side)
        left, right = values // side, values % side
        for i in range(ROUNDS):
            left, right = right, (left + (_mixed(right + keys[i]) >> np.uint64(1))) % side
        return left * side + right


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): each bit of x moves half of the bits that come out."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
