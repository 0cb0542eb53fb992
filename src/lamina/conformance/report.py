"""Rows and reports: one property, what was compared, the worst difference, what was allowed, the verdict."""

from __future__ import annotations

import math
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


def gap(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; infinite where a number is NaN."""
    if not a.numel():
        return 0.0
    worst = float((a.double() - b.double()).abs().max())
    return math.inf if math.isnan(worst) else worst
