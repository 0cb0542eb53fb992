"""Classification of texts (BERT, arXiv:1810.04805, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lamina.errors import LaminaError
from lamina.model import Model, ModelSpec, Output
from lamina.objectives.classes import check_smoothing, class_batch, needs_labels
from lamina.objectives.loss import Losses
from lamina.objectives.objective import Batch, ByIndex, Example, Examples, Objective, class_losses
from lamina.objectives.rows import Longer, Texts, kept

if TYPE_CHECKING:
    from lamina.data import Prepared


@dataclass(frozen=True, kw_only=True)
class SequenceClassification(Objective):
    """-log p of the label of each text. The share of right ones is logged as `accuracy`."""

    NAME = "sequence_classes"

    smoothing: float = 0.0  # of the labels
    longer: Longer = "refuse"  # texts that are longer than a row

    def check(self) -> None:
        check_smoothing(self.smoothing)

    def fits(self, spec: ModelSpec) -> None:
        needs_labels(spec, "sequence")

    def examples(self, prepared: Prepared, length: int) -> Examples:
        texts = Texts(prepared, "text", length)
        read, labels = kept(self.longer, texts), prepared.labels
        if labels is None:
            raise LaminaError(f"{prepared.directory}: {prepared.kind} has no labels; sequence classes need them")

        def make(index: int, random: np.random.Generator) -> Example:
            document = int(read[index])
            return {"input_ids": texts.row(document), "label": labels[document]}

        return ByIndex(len(read), make)

    def collate(self, examples: Sequence[Example]) -> Batch:
        return class_batch(examples, torch.tensor([int(one["label"]) for one in examples]))

    def losses(self, model: Model, batch: Batch, out: Output) -> dict[str, Losses]:
        return {"class": class_losses(out, batch.labels["class"], smoothing=self.smoothing)}
