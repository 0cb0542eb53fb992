"""Supervised sequence-to-sequence learning: a target from its source (arXiv:1409.3215; arXiv:1706.03762)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lamina.model import Model, ModelSpec, Output
from lamina.objectives.classes import check_smoothing
from lamina.objectives.loss import Losses
from lamina.objectives.objective import (
    Batch,
    ByIndex,
    Example,
    Examples,
    Objective,
    documented_batch,
    needs_pair,
    pair_batch,
    vocabulary_losses,
)
from lamina.objectives.rows import Longer, Texts, kept
from lamina.objectives.stream import fill

if TYPE_CHECKING:
    from lamina.data import Prepared


@dataclass(frozen=True, kw_only=True)
class SequenceToSequence(Objective):
    """-log p of the tokens of a target, given its source: translation, summaries, answers.

    Around both stands what the tokenizer puts around a text. `packed`: a row holds as many pairs, in order, as fit on
    both sides; each target sees its own source alone, and its positions start anew.
    """

    NAME = "pairs"

    packed: bool = False
    smoothing: float = 0.0  # 0.1 in "Attention is all you need"
    longer: Longer = "refuse"  # pairs of which one is longer than a row

    def check(self) -> None:
        check_smoothing(self.smoothing)

    def fits(self, spec: ModelSpec) -> None:
        needs_pair(spec, "an objective of pairs")

    def examples(self, prepared: Prepared, length: int) -> Examples:
        source, target = Texts(prepared, "source", length), Texts(prepared, "target", length)
        read = kept(self.longer, source, target)
        firsts = np.arange(len(read) + 1)
        if self.packed:
            more = len(source.before) + len(source.after)
            sizes = [np.minimum(one.sizes[read], one.room) + more for one in (source, target)]
            firsts = fill([np.cumsum(one) for one in sizes], length)

        def make(index: int, random: np.random.Generator) -> Example:
            found: Example = {}
            chosen = read[firsts[index] : firsts[index + 1]]
            for name, texts in (("source", source), ("target", target)):
                rows = [texts.row(int(one)) for one in chosen]
                found[name] = np.concatenate(rows)
                found[f"{name}_documents"] = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
            return found

        return ByIndex(len(firsts) - 1, make)

    def collate(self, examples: Sequence[Example]) -> Batch:
        sides = [[one[name] for one in examples] for name in ("source", "target")]
        if not self.packed:
            return pair_batch(*sides)
        return documented_batch(*sides, *([one[f"{n}_documents"] for one in examples] for n in ("source", "target")))

    def losses(self, model: Model, batch: Batch, out: Output) -> dict[str, Losses]:
        return {"target": vocabulary_losses(model, out, batch.labels["target"], smoothing=self.smoothing)}
