"""Causal language modelling: each token from those before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lamina.errors import LaminaError, UnsupportedError
from lamina.model import Model, ModelSpec, Output
from lamina.objectives.loss import IGNORE, Losses
from lamina.objectives.objective import Batch, ByIndex, Example, Examples, Objective, vocabulary_losses

if TYPE_CHECKING:
    from lamina.data import Packed, Prepared


@dataclass(frozen=True, kw_only=True)
class CausalLM(Objective):
    """-log p(x_t+1 | x_<=t), the mean over tokens and not over rows (GPT, section 3.1).

    Rows are cut from the documents laid end to end, or, `packed`, filled with whole documents. Documents in a row do
    not see each other, and their positions start anew; the first token of one is never asked of the one before it.
    """

    NAME = "causal"

    documents: bool = True  # False: a row is one text whatever it is cut from, as in GPT-3 and nanoGPT
    aligned: bool = True  # False: rows begin anywhere, so that an epoch has a row for each token: nanoGPT
    packed: bool = False  # True: rows of whole documents, longer ones in pieces of the length: RETRO
    z_loss: float = 0.0  # times log(Z)^2 of each token: 1e-4 in PaLM
    smoothing: float = 0.0  # of the labels

    def check(self) -> None:
        if self.z_loss < 0 or not 0 <= self.smoothing < 1:
            raise LaminaError(f"z_loss={self.z_loss} must not be below 0, smoothing={self.smoothing} within 0 and 1")
        if self.packed and not (self.documents and self.aligned):
            raise LaminaError("packed rows hold whole documents: documents and aligned must be true with packed")

    def fits(self, spec: ModelSpec) -> None:
        if spec.decoder is None or spec.head is None or spec.two_stacks:
            raise UnsupportedError("a causal objective needs a decoder with a language head, and no encoder")

    def examples(self, prepared: Prepared, length: int) -> Examples:
        from lamina.data import Windows

        if self.packed:
            rows = self.rows(prepared, length)
        else:
            rows = Windows(prepared.column("text"), length, aligned=self.aligned)
        return ByIndex(len(rows), lambda index, random: rows[index])

    def rows(self, prepared: Prepared, length: int) -> Packed:
        """Those of a packed objective, with the pieces that they are made of."""
        from lamina.data import Packed

        return Packed(prepared.column("text"), length, longer="overlap")

    def collate(self, examples: Sequence[Example]) -> Batch:
        tokens = torch.from_numpy(np.stack([one["tokens"] for one in examples]).astype(np.int64))  # (B, T + 1)
        inputs, labels = {"input_ids": tokens[:, :-1]}, tokens[:, 1:]
        if self.documents:
            documents = torch.from_numpy(np.stack([one["documents"] for one in examples]).astype(np.int64))
            if bool((documents != documents[:, :1]).any()):  # else rows are plain, which is faster
                inputs["document_ids"] = documents[:, :-1]
                labels = labels.masked_fill(documents[:, 1:] != documents[:, :-1], IGNORE)
            if bool((documents < 0).any()):  # a row that is not full
                inputs["attention_mask"] = (documents[:, :-1] >= 0).to(torch.int64)
                labels = labels.masked_fill(documents[:, 1:] < 0, IGNORE)
        return Batch(inputs, {"next_token": labels})

    def losses(self, model: Model, batch: Batch, out: Output) -> dict[str, Losses]:
        labels = batch.labels["next_token"]
        return {"next_token": vocabulary_losses(model, out, labels, z_loss=self.z_loss, smoothing=self.smoothing)}
