"""Rows and reports: one property, what was compared, the worst difference, what was allowed, the verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

FACTOR = {torch.float64: 256.0, torch.float32: 256.0, torch.bfloat16: 16.0, torch.float16: 64.0}
"""By how many units of precision (torch.finfo.eps) of the largest number two ways of computing one may differ."""

Verdict = Literal["holds", "fails", "not tried"]


@dataclass(frozen=True)
class Row:
    """One property of a model."""

    property: str
    compared: str
    worst: float | None  # the worst difference; None where there was nothing to measure
    allowed: float | None
    verdict: Verdict
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What holds. `passed` is False when something fails; what does not apply or was too large says so in its row."""

    rows: tuple[Row, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        return all(row.verdict != "fails" for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: a difference that is none (NaN came) is null, and its note says so."""
        rows = [asdict(row) for row in self.rows]
        for row in rows:
            if row["worst"] == math.inf:
                row |= {"worst": None, "note": f"{row['note']} NaN or infinity came".strip()}
        return {"passed": self.passed, "seconds": round(self.seconds, 2), "rows": rows}

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            worst = "" if row.worst is None else f" (worst {row.worst:.2g}, allowed {row.allowed or 0:.2g})"
            lines.append(f"{row.verdict:9} {row.property}: {row.compared}{worst}{'; ' + row.note if row.note else ''}")
        return "\n".join(lines)


def judged(property: str, compared: str, worst: float, allowed: float = 0.0, note: str = "") -> Row:
    """A row whose verdict is whether `worst` is within what is allowed."""
    return Row(property, compared, worst, allowed, "holds" if worst <= allowed else "fails", note)


def left_out(property: str, why: str) -> Row:
    """A row for what does not apply to the model, or would take too long."""
    return Row(property, "", None, None, "not tried", why)


def refused(property: str, error: Exception) -> Row:
    """A row for what the model refuses by name: no number is wrong, and none was compared."""
    return left_out(property, f"refused: {' '.join(str(error).split())[:200]}")


def failed(property: str, error: Exception) -> Row:
    """A row for what a model raised on sound input."""
    said = " ".join(str(error).split())
    return Row(property, "", None, None, "fails", f"{type(error).__name__}: {said[:200]}")


RAISED = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What a model may raise that a check turns into a row: all that says something about the model."""


class Difference:
    """The worst of several comparisons: the one that used up the largest share of what was allowed for it."""

    def __init__(self) -> None:
        self.worst = self.allowed = self.share = 0.0

    def add(self, ours: Tensor, reference: Tensor) -> None:
        """Compare two ways of computing `reference`; NaN in either is an infinite difference."""
        scale = float(reference.double().abs().max()) if reference.numel() else 0.0
        allowed = FACTOR[reference.dtype] * torch.finfo(reference.dtype).eps * max(scale, 1e-6)
        worst = gap(ours, reference)
        if worst / allowed >= self.share:
            self.worst, self.allowed, self.share = worst, allowed, worst / allowed

    def row(self, property: str, compared: str) -> Row:
        return judged(property, compared, self.worst, self.allowed)


def compared(ours: Iterable[Tensor], reference: Iterable[Tensor]) -> Difference:
    """Two answers, list against list."""
    worst = Difference()
    for one, other in zip(ours, reference, strict=True):
        worst.add(one, other)
    return worst


def alike(ours: Iterable[Tensor], reference: Iterable[Tensor]) -> bool:
    """Whether two answers are equal to rounding."""
    return compared(ours, reference).share <= 1


def gap(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; infinite where a number is NaN."""
    if not a.numel():
        return 0.0
    worst = float((a.double() - b.double()).abs().max())
    return math.inf if math.isnan(worst) else worst


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bytes; NaN equals NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    return torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
