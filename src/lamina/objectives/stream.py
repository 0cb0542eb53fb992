"""Texts as one stream without the tokens that end documents, and rows of whole pieces of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lamina.errors import LaminaError

if TYPE_CHECKING:
    from lamina.data import Column

BLOCK = 1 << 22
"""Tokens that are looked at together."""


class Bodies:
    """The documents of a column one after the other, without the token that ends each where there is one.

    Documents A B . and C D E . make the stream A B C D E, whose documents begin at 0 and 2: `begins` is [0, 2, 5].
    """

    def __init__(self, column: Column, end: int | None) -> None:
        self.column, self.ended = column, int(end is not None)
        self.begins = np.concatenate([[0], np.cumsum(column.lengths() - self.ended)])
        self.tokens = int(self.begins[-1])

    def slice(self, start: int, stop: int) -> np.ndarray:
        """int64 (stop - start,)."""
        if start == stop:
            return np.zeros(0, np.int64)
        first, last = np.searchsorted(self.begins, [start, stop - 1], side="right") - 1
        found = self.column.slice(int(start + first * self.ended), int(stop + last * self.ended))
        if self.ended and last > first:
            found = np.delete(found, self.begins[first + 1 : last + 1] - start + np.arange(last - first))
        return found

    def document(self, index: int) -> np.ndarray:
        """int64: one document."""
        return self.slice(int(self.begins[index]), int(self.begins[index + 1]))

    def rows(self, length: int) -> int:
        """How many rows of `length` tokens there are; what is left over is in none. Raises LaminaError for none."""
        if self.tokens < length:
            raise LaminaError(
                f"{self.column.directory}: {self.tokens:,} tokens; a row needs {length:,}: give more text, or a shorter"
                " length"
            )
        return self.tokens // length

    def sentence_ends(self, stops: np.ndarray) -> np.ndarray:
        """int64: where sentences end in the stream, by `ends_of`, and where documents do. stops: (vocabulary,) bool.

        It reads the whole stream once; a sentence costs 8 bytes.
        """
        parts, before = [self.begins[1:]], False
        for start in range(0, self.tokens, BLOCK):
            stop = min(start + BLOCK, self.tokens)
            found = stops[self.slice(start, stop)]
            previous = np.concatenate([[before], found[:-1]])
            low, high = np.searchsorted(self.begins, [start, stop])
            previous[self.begins[low:high] - start] = False
            parts.append(np.flatnonzero(found & ~previous) + start + 1)
            before = bool(found[-1])
        return np.unique(np.concatenate(parts))


def ends_of(stops: np.ndarray) -> np.ndarray:
    """int64: where the sentences of a row end, whose full stops are `stops` (T,) bool: after each full stop that does
    not follow another, and at the end of the row. What stands after the first of some full stops at the end ends
    nowhere (fairseq, denoising_dataset.py)."""
    stops = np.concatenate([stops[:-1], [True]])
    return np.flatnonzero(stops & ~np.concatenate([[False], stops[:-1]])) + 1


def cut(ends: np.ndarray, room: int) -> np.ndarray:
    """The same ends, and more of them where a piece is longer than `room`."""
    sizes = np.diff(ends, prepend=0)
    if not len(sizes) or int(sizes.max()) <= room:
        return ends
    pieces = -(-sizes // room)
    which = np.repeat(np.arange(len(sizes)), pieces)
    number = np.arange(len(which)) - (np.cumsum(pieces) - pieces)[which]
    return (ends - sizes)[which] + np.minimum((number + 1) * room, sizes[which])


def fill(ends: Sequence[np.ndarray], room: int) -> np.ndarray:
    """int64 (rows + 1,): the first piece of each row, pieces in order, as many as fit into `room` by each measure.

    ends: where each piece ends, by one or several measures (the tokens of a source and of a target). No piece may be
    longer than `room`. One step a row.
    """
    firsts = [0]
    while firsts[-1] < len(ends[0]):
        row = firsts[-1]
        begins = [int(one[row - 1]) if row else 0 for one in ends]
        fits = [int(np.searchsorted(one, begin + room, side="right")) for one, begin in zip(ends, begins, strict=True)]
        assert min(fits) > row
        firsts.append(min(fits))
    return np.array(firsts, np.int64)
