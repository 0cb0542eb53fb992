"""Causal language modelling: each token from those before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lamina.data import Prepared, Windows
from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import Record
from lamina.model import Model, ModelSpec
from lamina.objectives.loss import IGNORE, cross_entropy
from lamina.objectives.objective import Batch, Example, Examples, Objective, Total, forward


class _Rows:
    """Windows of the stream as examples, none of which is random."""

    def __init__(self, windows: Windows) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def example(self, index: int, random: np.random.Generator) -> Example:
        return self.windows[index]


@dataclass(frozen=True, kw_only=True)
class CausalLM(Objective):
    """-log p(x_t+1 | x_<=t), the mean over tokens and not over rows (GPT, section 3.1).

    Rows are cut from the documents laid end to end. Documents in a row do not see each other, and their positions start
    anew; the first token of one is never asked of the one before it.
    """

    NAME = "causal"

    documents: bool = True  # False: a row is one text whatever it is cut from, as in GPT-3 and nanoGPT
    aligned: bool = True  # False: rows begin anywhere, so that an epoch has a row for each token: nanoGPT
    z_loss: float = 0.0  # times log(Z)^2 of each token: 1e-4 in PaLM
    smoothing: float = 0.0  # of the labels

    def check(self) -> None:
        if self.z_loss < 0 or not 0 <= self.smoothing < 1:
            raise LaminaError(f"z_loss={self.z_loss} must not be below 0, smoothing={self.smoothing} within 0 and 1")

    def fits(self, spec: ModelSpec) -> None:
        if spec.decoder is None or spec.head is None or spec.two_stacks:
            raise UnsupportedError("a causal objective needs a decoder with a language head, and no encoder")

    def examples(self, prepared: Prepared, length: int) -> Examples:
        return _Rows(Windows(prepared.column("text"), length, aligned=self.aligned))

    def collate(self, examples: Sequence[Example]) -> Batch:
        tokens = torch.from_numpy(np.stack([one["tokens"] for one in examples]).astype(np.int64))  # (B, T + 1)
        inputs, labels = {"input_ids": tokens[:, :-1]}, tokens[:, 1:]
        if self.documents:
            documents = torch.from_numpy(np.stack([one["documents"] for one in examples]).astype(np.int64))
            if bool((documents != documents[:, :1]).any()):  # else rows are plain, which is faster
                inputs["document_ids"] = documents[:, :-1]
                labels = labels.masked_fill(documents[:, 1:] != documents[:, :-1], IGNORE)
        return Batch(inputs, labels)

    def total(self, model: Model, batch: Batch, record: Record | None = None) -> Total:
        out, auxiliary = forward(model, batch, record, keep_logits=0)
        assert model.head is not None
        table = model.embedding.weight
        found = cross_entropy(out.hidden, batch.labels, model.head, table, z_loss=self.z_loss, smoothing=self.smoothing)
        return Total(found.total, found.asked, {"nats": found.nats}, auxiliary)
