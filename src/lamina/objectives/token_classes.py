"""Classification of tokens: names, parts of speech (BERT, arXiv:1810.04805, section 5.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lamina.errors import LaminaError
from lamina.model import Model, ModelSpec, Output
from lamina.objectives.classes import check_smoothing, class_batch, needs_labels
from lamina.objectives.loss import IGNORE, Losses
from lamina.objectives.objective import Batch, ByIndex, Example, Examples, Objective, class_losses, padded
from lamina.objectives.rows import Longer, Texts, kept
from lamina.objectives.stream import Bodies

if TYPE_CHECKING:
    from lamina.data import Prepared


@dataclass(frozen=True, kw_only=True)
class TokenClassification(Objective):
    """-log p of the label of each token that has one: -100 in the data asks nothing, as for later pieces of a word."""

    NAME = "token_classes"

    smoothing: float = 0.0  # of the labels
    longer: Longer = "refuse"  # texts that are longer than a row

    def check(self) -> None:
        check_smoothing(self.smoothing)

    def fits(self, spec: ModelSpec) -> None:
        needs_labels(spec, "token")

    def examples(self, prepared: Prepared, length: int) -> Examples:
        texts = Texts(prepared, "tokens", length)
        labels = Bodies(prepared.column("labels"), prepared.end if texts.ended else None)
        if not np.array_equal(labels.begins, texts.bodies.begins):
            raise LaminaError(f"{prepared.directory}: labels and tokens are not of the same numbers")
        read = kept(self.longer, texts)
        before, after = (np.full(len(one), IGNORE) for one in (texts.before, texts.after))

        def make(index: int, random: np.random.Generator) -> Example:
            document = int(read[index])
            asked = labels.document(document)[: texts.room]
            return {"input_ids": texts.row(document), "labels": np.concatenate([before, asked, after])}

        return ByIndex(len(read), make)

    def collate(self, examples: Sequence[Example]) -> Batch:
        return class_batch(examples, padded([one["labels"] for one in examples], IGNORE))

    def losses(self, model: Model, batch: Batch, out: Output) -> dict[str, Losses]:
        return {"class": class_losses(out, batch.labels["class"], smoothing=self.smoothing)}
