"""A shuffle of which only the position is kept: every epoch a permutation, another each time, without a pattern."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from lamina.data import Order
from lamina.errors import LaminaError


@pytest.mark.parametrize("count", [*range(1, 40), 63, 64, 65, 255, 257, 1000, 4095, 4096, 4097, 65_537, 100_003])
def test_every_epoch_is_a_permutation(count: int):
    order = Order(count, seed=count)
    for epoch in range(3):
        taken = order.take(epoch * count, (epoch + 1) * count)
        assert taken.dtype == np.int64 and np.array_equal(np.sort(taken), np.arange(count))


def test_one_place_is_the_same_alone_and_among_others():
    order = Order(37, seed=5)
    stretch = order.take(0, 37 * 4)
    assert [order[i] for i in range(37 * 4)] == stretch.tolist()
    for start, stop in ((0, 0), (30, 50), (36, 38), (37, 37 * 3), (5, 37 * 4)):
        assert np.array_equal(order.take(start, stop), stretch[start:stop])
    assert Order(37, seed=5).take(0, 148).tolist() == stretch.tolist()


def test_positions_have_no_end():
    order = Order(2**40 + 15, seed=1)
    far = order[3 * 10**30]
    assert 0 <= far < order.count and far == order[3 * 10**30]
    assert len(set(order.take(2**80, 2**80 + 1000).tolist())) == 1000


def test_seeds_and_epochs_differ():
    taken = [tuple(Order(100, seed=seed).take(epoch * 100, epoch * 100 + 100)) for seed in range(5) for epoch in (0, 1)]
    assert len(set(taken)) == 10
    # Two random permutations of 100 agree in one place on average.
    for one, other in itertools.combinations(taken, 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) <= 8


def test_it_never_changes():
    """Runs go on from a position, so the order is a promise. Worked out here in plain integers, one at a time."""
    import hashlib

    def mixed(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    def place(position: int, count: int, seed: int) -> int:
        epoch, value = divmod(position, count)
        digest = hashlib.shake_128(f"lamina order {seed} {epoch}".encode()).digest(64)
        keys = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 64, 8)]
        side = max(math.isqrt(count - 1) + 1, 4)
        while True:
            left, right = divmod(value, side)
            for key in keys:
                left, right = right, (left + (mixed((right + key) % 2**64) >> 1)) % side
            value = left * side + right
            if value < count:
                return value

    for count, seed in ((3, 0), (37, 9), (1000, 2**70), (1003, -4)):
        order = Order(count, seed)
        assert order.take(0, 2 * count).tolist() == [place(i, count, seed) for i in range(2 * count)]


def chi_square(counts: np.ndarray) -> float:
    """Of counts that should be equal, in standard deviations above its mean."""
    free = counts.size - 1
    found = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    return (found - free) / math.sqrt(2 * free)


@pytest.mark.parametrize("count", [1000, 4096, 5003])
def test_neighbours_and_places_have_no_pattern(count: int):
    order = Order(count, seed=3)
    epochs = np.stack([order.take(e * count, (e + 1) * count) for e in range(40)])
    bins = epochs * 10 // count  # tenths of the data
    # Which tenth stands in which tenth of the epoch; which tenth follows which.
    where = np.stack([[np.bincount(part, minlength=10) for part in np.array_split(row, 10)] for row in bins]).sum(0)
    pairs = np.bincount((bins[:, :-1] * 10 + bins[:, 1:]).ravel(), minlength=100)
    steps = np.bincount(((np.diff(epochs) % count) * 50 // count).ravel(), minlength=50)
    parity = np.bincount((epochs[:, :-1] % 2 * 2 + epochs[:, 1:] % 2).ravel(), minlength=4)
    for counts in (where.ravel(), pairs, steps, parity):
        assert chi_square(counts) < 5
    correlation = np.corrcoef(epochs[:, :-1].ravel(), epochs[:, 1:].ravel())[0, 1]
    assert abs(correlation) < 5 / math.sqrt(epochs.size)


def test_few_samples_come_in_every_order():
    order = Order(3, seed=0)
    taken = Counter(tuple(order.take(3 * e, 3 * e + 3).tolist()) for e in range(600))
    assert len(taken) == 6 and chi_square(np.array(list(taken.values()))) < 5
    order = Order(4, seed=0)
    taken = Counter(tuple(order.take(4 * e, 4 * e + 4).tolist()) for e in range(1200))
    assert len(taken) == 24 and chi_square(np.array(list(taken.values()))) < 5


@pytest.mark.parametrize("count", [0, -1, 2.0, True, 1 << 62])
def test_counts_that_are_none(count):
    with pytest.raises(LaminaError, match="an order of"):
        Order(count)


def test_other_mistakes():
    with pytest.raises(LaminaError, match="seed=None"):
        Order(3, None)  # pyright: ignore[reportArgumentType]
    for start, stop in ((-1, 2), (3, 2)):
        with pytest.raises(LaminaError, match="count from 0"):
            Order(3).take(start, stop)
