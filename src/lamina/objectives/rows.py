"""Documents as rows: which are read, with what around them, and what becomes of those that are too long."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from lamina.errors import LaminaError
from lamina.objectives.boundaries import around
from lamina.objectives.stream import Bodies

if TYPE_CHECKING:
    from lamina.data import Prepared

Longer = Literal["refuse", "cut", "skip"]
"""What is done with texts that are longer than a row: the run is refused, they end early, or they are left out."""


class Texts:
    """`row(index)`: a document with what the tokenizer puts around a text, as `lamina.embed` reads it, or with
    nothing; at most `length` tokens."""

    def __init__(self, prepared: Prepared, name: str, length: int, *, framed: bool = True) -> None:
        self.column, self.length = prepared.column(name), length
        nothing = np.zeros(0, np.int64)
        self.before, self.after = around(prepared.tokenizer()) if framed else (nothing, nothing)
        # What ends a document of the data is what ends a text, said once: </s> of RoBERTa.
        self.ended = framed and len(self.after) > 0 and prepared.end is not None
        self.bodies = Bodies(self.column, prepared.end if self.ended else None)
        self.room = length - len(self.before) - len(self.after)
        if self.room < 1:
            raise LaminaError(f"length={length} has no room for a token between what stands around a text")
        self.sizes = np.diff(self.bodies.begins)

    def row(self, index: int) -> np.ndarray:
        return np.concatenate([self.before, self.body(index), self.after])

    def body(self, index: int) -> np.ndarray:
        """Without what stands around it."""
        return self.bodies.document(index)[: self.room]


def kept(longer: Longer, *texts: Texts) -> np.ndarray:
    """The documents that are read, of one column or of several that belong together. Raises LaminaError for texts that
    are too long where they are refused, and where none is left."""
    long = np.any([one.sizes > one.room for one in texts], axis=0)
    worst = max(texts, key=lambda one: int(one.sizes.max()))
    if longer == "refuse" and long.any():
        raise LaminaError(
            f"{worst.column.directory}: {int(long.sum()):,} documents have more tokens than the {worst.room:,} that fit"
            f" into a row, as document {int(worst.sizes.argmax()):,} of {worst.column.stream.name!r} with"
            f" {int(worst.sizes.max()):,}: objective.longer=cut or skip, or more length"
        )
    found = np.flatnonzero(~long) if longer == "skip" else np.arange(len(long))
    if not len(found):
        raise LaminaError(f"{worst.column.directory}: every document is longer than a row of {worst.length:,} tokens")
    return found
