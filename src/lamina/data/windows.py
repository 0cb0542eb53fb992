"""Rows of equal length: cut out of the stream of all documents, or filled with whole documents.

A row is `tokens`, `documents` and `positions`, each int64 (length + 1,): one more than a model reads, for each token
but the first is what the one before it has to say. `documents` number the documents of a row from 0, and `positions`
count within each, so nothing leaks from one to the next; both are -1 where there is no token.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from lamina.data.column import Column
from lamina.errors import LaminaError

Row = dict[str, np.ndarray]
HOLE = -1


class Windows:
    """`windows[i]`: length + 1 tokens of the stream, wherever documents begin and end.

    aligned: row i begins at token i * length, so that an epoch asks for each token once; what is left over at the end
    is in no row. Else every token but the last `length` begins a row, as in nanoGPT: a shuffled order of them draws
    random places. Raises LaminaError where the column is shorter than one row.
    """

    def __init__(self, column: Column, length: int, *, aligned: bool = True) -> None:
        _check(column, length)
        if column.tokens < length + 1:
            raise LaminaError(
                f"{column.directory}: {column.tokens:,} tokens; a row of {length:,} needs {length + 1:,}:"
                " give more text, or a shorter length"
            )
        self.column, self.length, self.aligned = column, length, aligned
        self.rows = (column.tokens - 1) // length if aligned else column.tokens - length

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> Row:
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row}; there are {self.rows:,}")
        start = row * self.length if self.aligned else row
        stop = start + self.length + 1
        begins = np.zeros(self.length + 1, np.int64)
        begins[self.column.starts(start, stop)] = 1
        begins[0] = 0  # the row begins with document 0, which may have begun before it
        places = np.arange(self.length + 1)
        positions = places - np.maximum.accumulate(places * begins)
        return {"tokens": self.column.slice(start, stop), "documents": np.cumsum(begins), "positions": positions}


class Packed:
    """`packed[i]`: as many whole documents as fit into length + 1 tokens.

    Documents are taken in order, each goes into the first row that has room for it, and `lookahead` rows are open at a
    time, so the documents of a row lie near each other. longer: what to do with documents that no row holds: "refuse"
    them, "cut" them into rows, "skip" them, or "overlap": cut, and begin each piece with the token that the one before
    it ends with, so that pieces begin at multiples of `length` and every token of a document but the first is asked
    for. `long` counts them. The plan takes 24 bytes a document.
    """

    def __init__(
        self,
        column: Column,
        length: int,
        *,
        lookahead: int = 16,
        longer: Literal["refuse", "cut", "skip", "overlap"] = "refuse",
    ) -> None:
        _check(column, length)
        if type(lookahead) is not int or lookahead < 1:
            raise LaminaError(f"lookahead={lookahead!r}; it must be a whole number, 1 or more")
        if longer not in ("refuse", "cut", "skip", "overlap"):
            raise LaminaError(f"longer={longer!r}; it must be 'refuse', 'cut', 'skip' or 'overlap'")
        self.column, self.length = column, length
        room = length + 1
        sizes = column.lengths()
        self.long = int((sizes > room).sum())
        if self.long and longer == "refuse":
            raise LaminaError(
                f"{column.directory}: {self.long:,} documents have more than {room:,} tokens, as document"
                f" {int(sizes.argmax()):,} with {int(sizes.max()):,}: longer='cut' or 'skip', or more length"
            )
        starts = np.cumsum(sizes) - sizes
        if longer == "skip":
            starts, sizes = starts[sizes <= room], sizes[sizes <= room]
        else:  # a piece a room, and what is left; most documents are one piece
            step = length if longer == "overlap" else room
            pieces = np.maximum(-(-(sizes - (room - step)) // step), 1)
            which = np.repeat(np.arange(len(sizes)), pieces)
            before = (np.arange(len(which)) - (np.cumsum(pieces) - pieces)[which]) * step
            starts, sizes = starts[which] + before, np.minimum(sizes[which] - before, room)
        rows = _first_fit(sizes, room, lookahead)
        kept = np.argsort(rows, kind="stable")
        self.starts, self.sizes = starts[kept], sizes[kept]
        self.rows = int(rows.max()) + 1 if len(rows) else 0
        self.firsts = np.searchsorted(rows[kept], np.arange(self.rows + 1))

    def __len__(self) -> int:
        return self.rows

    def pieces(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """int64, of the documents of a row in their order: where in the stream each begins, and how many tokens."""
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row}; there are {self.rows:,}")
        here = slice(self.firsts[row], self.firsts[row + 1])
        return self.starts[here], self.sizes[here]

    def __getitem__(self, row: int) -> Row:
        starts, sizes = self.pieces(row)
        filled = int(sizes.sum())
        found = {name: np.full(self.length + 1, HOLE) for name in ("documents", "positions")}
        tokens = np.zeros(self.length + 1, np.int64)
        tokens[:filled] = np.concatenate([self.column.slice(int(s), int(s + n)) for s, n in zip(starts, sizes)])
        found["documents"][:filled] = np.repeat(np.arange(len(sizes)), sizes)
        found["positions"][:filled] = np.arange(filled) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return {"tokens": tokens, **found}


def _first_fit(sizes: np.ndarray, room: int, lookahead: int) -> np.ndarray:
    """int64: the row of each document. One step a document; a row that is full, or the oldest of too many, closes."""
    rows = np.empty(len(sizes), np.int64)
    left: dict[int, int] = {}  # row -> tokens that still fit, oldest first
    made = 0
    for i, size in enumerate(sizes.tolist()):
        row = next((row for row, free in left.items() if free >= size), None)
        if row is None:
            if len(left) == lookahead:
                del left[next(iter(left))]
            row, made = made, made + 1
            left[row] = room
        left[row] -= size
        if left[row] == 0:
            del left[row]
        rows[i] = row
    return rows


def _check(column: Column, length: int) -> None:
    if type(length) is not int or length < 1:
        raise LaminaError(f"{column.directory}: length={length!r}; it must be a whole number, 1 or more")
