"""Learning rates over a run: a factor for each step, as functions of the step alone: nothing has to be saved."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lamina.errors import LaminaError
from lamina.specs import Spec


@dataclass(frozen=True, kw_only=True)
class Constant(Spec):
    """The rate, after a linear warm-up."""

    NAME = "constant"

    warmup: int = 0  # steps from (nearly) nothing to the whole rate

    def check(self) -> None:
        _counts(self, "warmup")

    def factor(self, step: int, steps: int) -> float:
        """Of the rate, at `step` of `steps`, both counted from 0."""
        return _warm(step, self.warmup)


@dataclass(frozen=True, kw_only=True)
class LinearDecay(Spec):
    """Warm-up, then a straight line to `final` of the rate (BERT, arXiv:1810.04805, appendix A.2)."""

    NAME = "linear"

    warmup: int = 0
    final: float = 0.0

    def check(self) -> None:
        _counts(self, "warmup")
        _share(self, "final")

    def factor(self, step: int, steps: int) -> float:
        """Of the rate, at `step` of `steps`."""
        return _warm(step, self.warmup) * (1 - (1 - self.final) * _done(step, self.warmup, steps))


@dataclass(frozen=True, kw_only=True)
class Cosine(Spec):
    """Warm-up, then half a cosine to `final` of the rate (arXiv:1608.03983; GPT-3, arXiv:2005.14165, appendix B)."""

    NAME = "cosine"

    warmup: int = 0
    final: float = 0.1

    def check(self) -> None:
        _counts(self, "warmup")
        _share(self, "final")

    def factor(self, step: int, steps: int) -> float:
        """Of the rate, at `step` of `steps`."""
        fall = 0.5 * (1 + math.cos(math.pi * _done(step, self.warmup, steps)))
        return _warm(step, self.warmup) * (self.final + (1 - self.final) * fall)


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Spec):
    """Warm-up, the whole rate, then a line to `final` over the last `decay` steps (arXiv:2404.06395, section 4)."""

    NAME = "wsd"

    decay: int
    warmup: int = 0
    final: float = 0.0

    def check(self) -> None:
        _counts(self, "warmup", "decay")
        _share(self, "final")

    def factor(self, step: int, steps: int) -> float:
        """Of the rate, at `step` of `steps`."""
        return _warm(step, self.warmup) * (1 - (1 - self.final) * _done(step, steps - self.decay, steps))


@dataclass(frozen=True, kw_only=True)
class InverseRoot(Spec):
    """Warm-up, then the rate times sqrt(warmup / step) (arXiv:1706.03762, section 5.3; T5, arXiv:1910.10683)."""

    NAME = "inverse_root"

    warmup: int = 10_000

    def check(self) -> None:
        _counts(self, "warmup")

    def factor(self, step: int, steps: int) -> float:
        """Of the rate, at `step` of `steps`."""
        warm = max(self.warmup, 1)
        return min((step + 1) / warm, math.sqrt(warm / (step + 1)))


Schedule = Constant | LinearDecay | Cosine | WarmupStableDecay | InverseRoot


def _warm(step: int, warmup: int) -> float:
    """1 / warmup at the first step, 1 from step `warmup - 1` on."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _done(step: int, start: int, stop: int) -> float:
    """How much of the way from `start` to the last step, 0 to 1."""
    return min(max((step - start) / max(stop - start, 1), 0.0), 1.0)


def _counts(spec: Spec, *names: str) -> None:
    for name in names:
        if getattr(spec, name) < 0:
            raise LaminaError(f"{name} is {getattr(spec, name)}; a number of steps is 0 or more")


def _share(spec: Spec, name: str) -> None:
    if not 0 <= getattr(spec, name) <= 1:
        raise LaminaError(f"{name} is {getattr(spec, name)}; it is a share of the rate, within 0 and 1")
