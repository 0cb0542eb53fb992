"""Distillation: a student learns what a teacher says of every token (arXiv:1503.02531)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import LanguageHead, Record
from lamina.model import Model, ModelSpec
from lamina.objectives.causal import CausalLM
from lamina.objectives.denoising import Denoising
from lamina.objectives.loss import Losses, asking, chosen, scored
from lamina.objectives.masked import MaskedLM
from lamina.objectives.objective import Batch, Example, Examples, Objective, Opening, Total, auxiliary, forward
from lamina.objectives.pairs import SequenceToSequence
from lamina.objectives.prefix import PrefixLM
from lamina.objectives.spans import SpanCorruption

if TYPE_CHECKING:
    from lamina.data import Prepared

Language = CausalLM | PrefixLM | MaskedLM | SpanCorruption | Denoising | SequenceToSequence
"""Objectives whose labels are tokens of the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Distillation(Objective):
    """mix * T^2 * KL(teacher || student), both softened by the temperature T, + (1 - mix) * the loss of the labels.

    The divergence is asked wherever `objective` asks for a token, a mean over these places, and logged as `teacher`,
    T^2 included. The teacher reads what the student reads, with its own weights alone: no dropout, no gradient. T^2
    keeps gradients as large as they were (section 2 of the paper).
    """

    NAME = "distillation"

    teacher: str  # any SOURCE with the same vocabulary
    objective: Language = field(default_factory=CausalLM)
    temperature: float = 1.0
    mix: float = 0.5  # 1: the teacher alone

    def check(self) -> None:
        if self.temperature <= 0 or not 0 <= self.mix <= 1:
            raise LaminaError(f"temperature={self.temperature} must be above 0, mix={self.mix} within 0 and 1")

    def fits(self, spec: ModelSpec) -> None:
        self.objective.fits(spec)

    def examples(self, prepared: Prepared, length: int) -> Examples:
        return self.objective.examples(prepared, length)

    def collate(self, examples: Sequence[Example]) -> Batch:
        batch = self.objective.collate(examples)
        return replace(batch, labels={**batch.labels, "teacher": next(iter(batch.labels.values()))})

    def total(self, model: Model, batch: Batch, record: Record | None = None) -> Total:
        raise UnsupportedError("distillation needs its teacher: objective.ready, or Taught(objective, model)")

    def ready(self, opening: Opening) -> Taught:
        return Taught(self, opening.model(self.teacher))


class Taught:
    """A distillation with its teacher, which is made to answer as it is: in evaluation mode, without gradients."""

    def __init__(self, spec: Distillation, teacher: Model) -> None:
        if teacher.head is None:
            raise UnsupportedError("the teacher has no language head: it says nothing of tokens")
        spec.objective.fits(teacher.spec)
        self.spec, self.teacher = spec, teacher.eval().requires_grad_(False)

    def fits(self, spec: ModelSpec) -> None:
        self.spec.fits(spec)
        theirs, own = self.teacher.spec.embedding.vocabulary, spec.embedding.vocabulary
        if theirs != own:
            raise UnsupportedError(
                f"the teacher has a vocabulary of {theirs:,} and the student of {own:,}; they must agree"
            )

    def examples(self, prepared: Prepared, length: int) -> Examples:
        return self.spec.examples(prepared, length)

    def collate(self, examples: Sequence[Example]) -> Batch:
        return self.spec.collate(examples)

    def total(self, model: Model, batch: Batch, record: Record | None = None) -> Total:
        out = forward(model, batch, record)
        with torch.no_grad():
            their = forward(self.teacher, batch)
        rows, mix = asking(batch.labels["teacher"]), self.spec.mix
        kinds = {
            kind: replace(one, weight=(1 - mix) * one.weight)
            for kind, one in self.spec.objective.losses(model, batch, out).items()
        }
        assert model.head is not None and self.teacher.head is not None
        total = divergence(
            (chosen(out.hidden, rows), model.head, model.embedding.weight),
            (chosen(their.hidden, rows), self.teacher.head, self.teacher.embedding.weight),
            self.spec.temperature,
        )
        kinds["teacher"] = Losses(total, total.detach(), len(rows), weight=mix)
        return Total(kinds, auxiliary(out))


Scores = tuple[Tensor, LanguageHead, Tensor]
"""Hidden states (N, width), a head, and the embedding for a head that is tied to it."""


def divergence(student: Scores, teacher: Scores, temperature: float = 1.0) -> Tensor:
    """The sum over rows of T^2 KL(softmax(t / T) || softmax(s / T)), some rows at a time; only the student learns.

    A student whose ranks have a part of the vocabulary each gathers the scores of all rows."""
    hidden, head, table = teacher
    own = student[2] if student[1].weight is None else student[1].weight
    if type(own.data) is not Tensor:
        scores = student[1](student[0], student[2]) / temperature
        with torch.no_grad():
            target = (head(hidden, table).to(scores.dtype) / temperature).log_softmax(dim=-1)
        return temperature**2 * F.kl_div(scores.log_softmax(dim=-1), target, reduction="sum", log_target=True)
    with torch.no_grad():
        hidden = head.begin(hidden)
    matrix = table if head.weight is None else head.weight

    def score(scores: Tensor, start: int, sums: tuple[Tensor, Tensor], need: bool) -> Tensor | None:
        part = F.linear(hidden[start : start + len(scores)], matrix, head.bias)
        target = (head.finish(part.to(scores.dtype)) / temperature).log_softmax(dim=-1)
        found = (scores / temperature).log_softmax(dim=-1)
        sums[0].add_((target.exp() * (target - found)).sum(), alpha=temperature**2)
        return (found.exp() - target.exp()) * temperature if need else None

    return scored(*student, score)[0]
