"""Language modelling with neighbours that were found before training (RETRO, arXiv:2112.04426, section 2.5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import Record
from lamina.model import Model, ModelSpec
from lamina.objectives.causal import CausalLM
from lamina.objectives.objective import (
    Batch,
    ByIndex,
    Example,
    Examples,
    Neighbours,
    Objective,
    Opening,
    Total,
    auxiliary,
    forward,
)

if TYPE_CHECKING:
    from lamina.data import Prepared


@dataclass(frozen=True, kw_only=True)
class RetrievalLM(Objective):
    """A causal objective whose model reads, beside each row, the neighbours of its chunks.

    They lie in directories that `lamina index neighbours` wrote, one of each prepared text; whose text is whose is told
    by hashes.
    """

    NAME = "retrieval"

    index: str  # the database that they are of
    neighbours: tuple[str, ...]
    objective: CausalLM = field(default_factory=lambda: CausalLM(packed=True))

    def check(self) -> None:
        if not self.objective.packed:
            raise LaminaError("chunks are counted within documents: objective.packed must be true")
        if not self.neighbours:
            raise LaminaError("neighbours is empty; name a directory that lamina index neighbours wrote for each text")

    def fits(self, spec: ModelSpec) -> None:
        self.objective.fits(spec)
        if spec.retrieval is None:
            raise UnsupportedError("neighbours are for models that retrieve; this one has no ChunkedCrossAttentionSpec")

    def examples(self, prepared: Prepared, length: int) -> Examples:
        """The rows alone."""
        return self.objective.examples(prepared, length)

    def collate(self, examples: Sequence[Example]) -> Batch:
        return self.objective.collate(examples)

    def total(self, model: Model, batch: Batch, record: Record | None = None) -> Total:
        raise UnsupportedError("retrieval needs its neighbours: objective.ready, or Retrieving(objective, find, chunk)")

    def ready(self, opening: Opening) -> Retrieving:
        return Retrieving(self.objective, *opening.neighbours(self.index, self.neighbours))


class Retrieving:
    """A packed causal objective with the neighbours that `find` gives of a prepared text, of chunks of `chunk` tokens.

    Rows hold whole documents, or pieces of them that begin at a multiple of the length, which is one of the chunk: so
    the chunks of a row are those of the documents.
    """

    def __init__(self, objective: CausalLM, find: Callable[[Prepared], Neighbours], chunk: int) -> None:
        if not objective.packed:
            raise LaminaError("chunks are counted within documents: the causal objective must be packed")
        self.objective, self.find, self.chunk = objective, find, chunk

    def fits(self, spec: ModelSpec) -> None:
        self.objective.fits(spec)
        if spec.retrieval is None:
            raise UnsupportedError("neighbours are for models that retrieve; this one has no ChunkedCrossAttentionSpec")
        if spec.retrieval.chunk != self.chunk:
            raise UnsupportedError(
                f"the model reads chunks of {spec.retrieval.chunk} tokens; these neighbours are of chunks of"
                f" {self.chunk}"
            )

    def examples(self, prepared: Prepared, length: int) -> Examples:
        if length % self.chunk:
            raise LaminaError(f"length={length} must be a multiple of the chunk of {self.chunk} tokens")
        rows, neighbours = self.objective.rows(prepared, length), self.find(prepared)
        begins = np.concatenate([[0], np.cumsum(prepared.column("text").lengths())])
        starts = neighbours.starts.numpy()
        if len(starts) != len(begins):
            raise LaminaError(
                f"{prepared.directory}: {len(begins) - 1:,} documents; the neighbours are of {len(starts) - 1:,}"
            )

        def make(index: int, random: np.random.Generator) -> Example:
            numbers = np.full(length // self.chunk, -1)
            ends = _chunks(*rows.pieces(index), begins, starts, length, self.chunk)
            numbers[: len(ends)] = ends
            return {**rows[index], "neighbours": neighbours.values(torch.from_numpy(numbers)).numpy()}

        return ByIndex(len(rows), make)

    def collate(self, examples: Sequence[Example]) -> Batch:
        batch = self.objective.collate(examples)
        found = torch.from_numpy(np.stack([one["neighbours"] for one in examples]))
        return replace(batch, inputs={**batch.inputs, "neighbours": found})

    def total(self, model: Model, batch: Batch, record: Record | None = None) -> Total:
        out = forward(model, batch, record)
        return Total(self.objective.losses(model, batch, out), auxiliary(out))


def _chunks(
    pieces: np.ndarray, sizes: np.ndarray, begins: np.ndarray, starts: np.ndarray, length: int, chunk: int
) -> np.ndarray:
    """int64: the numbers of the chunks that end in the first `length` tokens of a row, in their order; -1 for those of
    which nothing was looked for.

    Example, chunks of 4, a row of 12: documents of 9 and of 4 tokens end the chunks 0 and 1 of the one, and, the 13th
    token being a label alone, none of the other.
    """
    read = np.minimum(np.cumsum(sizes), length) - (np.cumsum(sizes) - sizes)
    count = read // chunk
    document = np.searchsorted(begins, pieces, side="right") - 1
    which = np.repeat(np.arange(len(pieces)), count)
    serial = np.arange(len(which)) - (np.cumsum(count) - count)[which]
    document = document[which]
    number = starts[document] + (pieces[which] - begins[document]) // chunk + serial
    return np.where(number < starts[document + 1], number, -1)
