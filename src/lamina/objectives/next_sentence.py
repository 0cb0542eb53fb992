"""Pairs of segments for next-sentence prediction, as BERT's create_pretraining_data.py makes them."""

from __future__ import annotations

import numpy as np

from lamina.errors import LaminaError
from lamina.objectives.stream import Bodies


class Segments:
    """`pair(index, random)`: (A, B, whether B is from another document), together at most `room` tokens.

    A chunk is sentences of a document until they have `target` tokens: `room`, or, in a share `short` of all, any
    number from 2 to `room`. A is the first sentences of it, at least one. B is the rest, or, if there is none and in
    half of all other cases, sentences of another document from any on, until `target` is reached; what was the rest is
    then left for the next chunk. Where the pair is too long, the longer one loses tokens, at the front or at the end.

    Where chunks begin is found once, by one such pass over all documents; all else is drawn anew each time. So any pair
    can be made by itself. 8 bytes a pair.
    """

    def __init__(self, bodies: Bodies, ends: np.ndarray, room: int, short: float) -> None:
        """ends: where sentences end, every document's last included. Raises LaminaError for a single document."""
        self.bodies, self.ends, self.room, self.short = bodies, ends, room, short
        self.starts_at = np.concatenate([[0], ends])  # sentence i is the tokens starts_at[i] to starts_at[i + 1]
        self.firsts = np.searchsorted(self.starts_at, bodies.begins)  # the first sentence of each document
        self.documents = len(self.firsts) - 1
        if self.documents < 2:
            raise LaminaError(
                f"{bodies.column.directory}: holds one document; next_sentence needs another to take sentences from"
            )
        self.chunks = self._plan(np.random.Generator(np.random.Philox(key=[room, 0])))

    def __len__(self) -> int:
        return len(self.chunks)

    def pair(self, index: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, bool]:
        first = int(self.chunks[index])
        document = int(np.searchsorted(self.firsts, first, side="right")) - 1
        target = int(random.integers(2, self.room + 1)) if random.random() < self.short else self.room
        stop = int(self._stop(first, document, target))
        split = first + 1 if stop == first + 1 else int(random.integers(first + 1, stop))
        other = split == stop or bool(random.random() < 0.5)
        before = self._tokens(first, split)
        if other:
            document += 1 + int(random.integers(self.documents - 1))  # any but itself
            document %= self.documents
            split = int(random.integers(self.firsts[document], self.firsts[document + 1]))
            stop = int(self._stop(split, document, max(target - len(before), 1)))
        return *shortened(before, self._tokens(split, stop), self.room, random), other

    def _tokens(self, first: int, stop: int) -> np.ndarray:
        return self.bodies.slice(int(self.starts_at[first]), int(self.starts_at[stop]))

    def _stop(self, first: np.ndarray | int, document: np.ndarray | int, target: np.ndarray | int) -> np.ndarray:
        """The sentence before which a chunk ends: once it has `target` tokens, or with its document."""
        reached = np.searchsorted(self.ends, self.starts_at[first] + target) + 1
        return np.minimum(reached, self.firsts[np.asarray(document) + 1])

    def _plan(self, random: np.random.Generator) -> np.ndarray:
        """The first sentence of each chunk. All documents go on together, a chunk a step."""
        document = np.arange(self.documents)
        small = random.random(self.documents) < self.short
        target = np.where(small, random.integers(2, self.room + 1, size=self.documents), self.room)
        first, found = self.firsts[:-1], []
        while len(first):
            found.append(first)
            stop = self._stop(first, document, target)
            split = random.integers(first + 1, np.maximum(stop, first + 2))
            other = (stop == first + 1) | (random.random(len(first)) < 0.5)
            first = np.where(other, split, stop)
            left = first < self.firsts[document + 1]
            first, document, target = first[left], document[left], target[left]
        return np.sort(np.concatenate(found))


def shortened(
    first: np.ndarray, second: np.ndarray, room: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Both, with at most `room` tokens: one token after the other goes from the longer one (from the second where they
    are equal), each from the front or the end with equal chance."""
    excess = max(len(first) + len(second) - room, 0)
    difference = len(first) - len(second)
    uneven = min(excess, abs(difference))  # until they are equal, or short enough
    left = excess - uneven
    from_first = (uneven if difference > 0 else 0) + left // 2
    pieces = []
    for row, lost in ((first, from_first), (second, excess - from_first)):
        front = int(random.binomial(lost, 0.5))
        pieces.append(row[front : len(row) - (lost - front)])
    return pieces[0], pieces[1]
