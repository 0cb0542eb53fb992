"""Language modelling with neighbours that were found before training (RETRO, arXiv:2112.04426, section 2.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import Record
from lamina.model import Model, ModelSpec
from lamina.objectives.causal import CausalLM
from lamina.objectives.loss import IGNORE
from lamina.objectives.objective import Batch, ByIndex, Example, Examples, Total, auxiliary, forward

if TYPE_CHECKING:
    from lamina.data import Prepared


class Neighbours(Protocol):
    """What was found for the chunks of prepared text: chunk u of document i has the number `starts[i]` + u, as far as
    that is below `starts[i + 1]`. What continues a chunk must not be among its neighbours."""

    starts: Tensor  # (documents + 1,) int64

    def values(self, chunks: Tensor) -> Tensor:
        """Numbers (...) int64, -1 for none -> ids (..., k, r) int64, -1 where there is no token."""
        ...


class Retrieving:
    """A causal objective whose model reads the neighbours of the chunks of `chunk` tokens.

    Rows hold whole documents, or pieces of them that begin at a multiple of the length, which is one of the chunk: so
    the chunks of a row are those of the documents.
    """

    def __init__(self, objective: CausalLM, neighbours: Neighbours, chunk: int) -> None:
        if not objective.documents or not objective.aligned:
            raise LaminaError("chunks are counted within documents: documents=True and aligned=True")
        self.objective, self.neighbours, self.chunk = objective, neighbours, chunk

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
        from lamina.data import Packed

        if length % self.chunk:
            raise LaminaError(f"length={length} must be a multiple of the chunk of {self.chunk} tokens")
        column = prepared.column("text")
        packed = Packed(column, length, longer="overlap")
        begins = np.concatenate([[0], np.cumsum(column.lengths())])
        starts = self.neighbours.starts.numpy()
        if len(starts) != len(begins):
            raise LaminaError(
                f"{prepared.directory}: {len(begins) - 1:,} documents; the neighbours are of {len(starts) - 1:,}"
            )

        def make(index: int, random: np.random.Generator) -> Example:
            numbers = np.full(length // self.chunk, -1)
            ends = _chunks(*packed.pieces(index), begins, starts, length, self.chunk)
            numbers[: len(ends)] = ends
            found = self.neighbours.values(torch.from_numpy(numbers)).numpy()
            return {**packed[index], "neighbours": found}

        return ByIndex(len(packed), make)

    def collate(self, examples: Sequence[Example]) -> Batch:
        batch = self.objective.collate(examples)
        inputs = {**batch.inputs, "neighbours": torch.from_numpy(np.stack([one["neighbours"] for one in examples]))}
        documents = torch.from_numpy(np.stack([one["documents"] for one in examples]))
        if bool((documents < 0).any()):  # a row that is not full
            inputs["attention_mask"] = (documents[:, :-1] >= 0).to(torch.int64)
        labels = batch.labels["next_token"].masked_fill(documents[:, 1:] < 0, IGNORE)
        return replace(batch, inputs=inputs, labels={"next_token": labels})

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
