"""Merging models of one shape: the mean (arXiv:2203.05482), SLERP (Shoemake 1985), task arithmetic (arXiv:2212.04089),
TIES (arXiv:2306.01708) and DARE (arXiv:2311.03099).

A weight is merged by itself, and an expert too, so one of each model is in memory at a time. Parts of a vector that a
method looks at as a whole (the angle of SLERP, the largest of TIES) are therefore those of one weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.layers import ExpertsSpec
from lamina.model import ModelSpec
from lamina.specs import Spec, diff
from lamina.surgery.operation import Changed, Joining, Other, Others, Promise
from lamina.surgery.places import places
from lamina.surgery.weights import Beside, Made, Weights, in_float32, own_generator

FREE = ("initial", "special", "context", "embedding.padding")
"""Fields of a spec that no weight and no output depends on: they may differ, and stay those of the model itself."""
RATES = ("dropout", "drop_branch")
"""Ends of fields that count in training alone, and may differ too."""


@dataclass(frozen=True, kw_only=True)
class Merged(Spec):
    """One of the models that are merged."""

    source: str | None = None  # None: the model that is operated on
    weight: float = 1.0
    density: float = 1.0  # the part of its change that is kept: ties, dare


@dataclass(frozen=True, kw_only=True)
class Merge(Joining):
    """The merger of `models`. With x_i their weights, w_i their shares, b the base and d_i = x_i - b:

    linear: sum w_i x_i / sum w_i. slerp: of two, on the arc between them, at w_2 / (w_1 + w_2). task_arithmetic:
    b + scale sum w_i d_i. dare: that, of what is left of d_i when each number is dropped with the chance 1 - density,
    divided by density. ties: of each d_i the largest numbers, a part `density` of them; where their sum is positive the
    mean of the positive ones, else of the negative ones; b + scale times that.
    """

    NAME = "merge"

    models: tuple[Merged, ...]
    method: Literal["linear", "slerp", "task_arithmetic", "ties", "dare"] = "linear"
    base: str | None = None  # of the last three; None: the model that is operated on
    scale: float = 1.0  # of the last three
    seed: int = 0  # of dare

    def check(self) -> None:
        own = sum(one.source is None for one in self.models)
        changes = self.method not in ("linear", "slerp")
        if not changes and (self.base is not None or self.scale != 1.0):
            raise LaminaError(f"{self.method} has neither base nor scale; task_arithmetic, ties and dare have")
        if own != int(not changes or self.base is not None):
            raise LaminaError(
                "the model that is operated on is the base, and so none of models: give each a source, or name a base"
                if changes and self.base is None
                else f"one of models, and not {own}, is the model that is operated on: it has no source"
            )
        if self.method == "slerp" and len(self.models) != 2:
            raise LaminaError(f"slerp is for two models, and not {len(self.models)}")
        sources = [one.source for one in self.models]
        if not self.models or len(set(sources)) < len(sources):
            raise LaminaError(f"models are {sources}; each is to be there once")
        for one in self.models:
            if not 0 < one.density <= 1 or (one.density < 1 and self.method not in ("ties", "dare")):
                raise LaminaError(f"density={one.density}: above 0 and at most 1, and 1 where the method has none")
            if one.weight < 0 and self.method in ("slerp", "ties"):
                raise LaminaError(f"weight={one.weight} must be at least 0 in {self.method}")
        if not sum(one.weight for one in self.models):
            raise LaminaError("the weights of models add up to 0")

    def sources(self) -> tuple[str, ...]:
        named = [self.base, *(one.source for one in self.models)]
        return tuple(dict.fromkeys(source for source in named if source is not None))

    def join(self, spec: ModelSpec, weights: Mapping[str, Tensor], others: Others) -> Changed:
        found = {source: others(source) for source in self.sources()}
        for source, other in found.items():
            check_same(source, other, spec)
        has_experts = any(isinstance(part, ExpertsSpec) for _, part in spec.walk())
        experts = tuple(place.weight("experts.") for place in places(spec, ExpertsSpec)) if has_experts else ()
        made = {}
        for name in weights:
            each = [f"{source}:{name}" for source in found]
            function = partial(self._merged, name=name, apart=name.startswith(experts))
            made[name] = Made((name, *each), f"{self.method} of {len(self.models)} models", in_float32(function))
        beside = Beside(weights, {source: other.weights for source, other in found.items()})
        gone = [f"{source}:{name}" for source, other in found.items() for name in other.weights]
        return Changed(spec, Weights(beside, made, gone), Promise("lossy", f"{len(self.models)} models became one"))

    def _merged(self, own: Tensor, *others: Tensor, name: str, apart: bool) -> Tensor:
        """The new weight, of the model's own and those of its sources; `apart`: the first dimension is of experts."""
        rows = own.shape[0] if apart else 1
        known = dict(zip((None, *self.sources()), (one.reshape(rows, -1) for one in (own, *others)), strict=True))
        x, w = [known[one.source] for one in self.models], [one.weight for one in self.models]
        if self.method == "linear":
            new = linear(x, w)
        elif self.method == "slerp":
            new = slerp(x[0], x[1], w[1] / sum(w))
        else:
            base = known[self.base]
            changes = [one - base for one in x]
            new = base + self.scale * self._change(changes, w, name)
        return new.reshape(own.shape)

    def _change(self, changes: list[Tensor], w: list[float], name: str) -> Tensor:
        """What is added to the base, of changes (rows, n) each."""
        densities = [one.density for one in self.models]
        if self.method == "ties":
            return ties([trimmed(one, density) for one, density in zip(changes, densities, strict=True)], w)
        if self.method == "dare":
            for i, (model, density) in enumerate(zip(self.models, densities, strict=True)):
                kept = (
                    torch.rand(changes[i].shape, generator=own_generator(f"{model.source}:{name}", self.seed)) < density
                )
                changes[i] = changes[i] * kept.to(changes[i].device) / density
        return sum_of(changes, w)


def linear(x: list[Tensor], w: list[float]) -> Tensor:
    """sum w_i x_i / sum w_i, by what the others have more than the first: equal models give the same bits."""
    return x[0] + sum_of([one - x[0] for one in x[1:]], [one / sum(w) for one in w[1:]]) if len(x) > 1 else x[0]


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(rows, n), row by row: (sin((1 - t) angle) a + sin(t angle) b) / sin(angle) (Shoemake 1985, section 3.3).

    The angle is that of the directions. Where they are one, or there is none, a straight line is what the arc becomes.
    """
    size = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    one, other = a / size[0].clamp(min=1e-30), b / size[1].clamp(min=1e-30)
    # Near 0 the cosine does not tell angles apart.
    angle = 2 * torch.atan2((one - other).norm(dim=1, keepdim=True), (one + other).norm(dim=1, keepdim=True))
    sine = angle.sin()
    curved = (sine > 1e-6) & (size[0] > 0) & (size[1] > 0)
    safe = torch.where(curved, sine, 1.0)
    arc = ((1 - t) * angle).sin() / safe * a + (t * angle).sin() / safe * b
    return torch.where(curved, arc, a + t * (b - a))


def sum_of(x: list[Tensor], w: list[float]) -> Tensor:
    """sum w_i x_i."""
    return sum((weight * one for one, weight in zip(x[1:], w[1:], strict=True)), w[0] * x[0])


def trimmed(change: Tensor, density: float) -> Tensor:
    """(rows, n), of each row the largest numbers, a part `density` of all; the others are 0 (arXiv:2306.01708, 3.2)."""
    if density == 1:
        return change
    index = change.abs().topk(max(round(density * change.shape[1]), 1), dim=1).indices
    return torch.zeros_like(change).scatter(1, index, change.gather(1, index))


def ties(changes: list[Tensor], w: list[float]) -> Tensor:
    """The mean, by weight, of those numbers whose sign is that of the weighted sum of all (arXiv:2306.01708, 3.2)."""
    sign = sum_of(changes, w).sign()
    agree = [(one.sign() == sign) & (sign != 0) for one in changes]
    total = sum_of([one * same for one, same in zip(changes, agree, strict=True)], w)
    share = sum_of([same.to(total.dtype) for same in agree], w)
    return torch.where(share > 0, total / share.clamp(min=1e-30), 0.0)


def check_same(source: str, other: Other, spec: ModelSpec) -> None:
    """Raise LaminaError where a model has another spec than this one, or other tokens."""
    differing = [row for row in diff(spec, other.spec) if not (row[0].startswith(FREE) or row[0].endswith(RATES))]
    if differing:
        path, here, there = differing[0]
        raise LaminaError(f"{source}: {path} is {there!r}, and here {here!r}; only models of one spec can be merged")
    if other.same_tokens is False:
        raise LaminaError(f"{source} has other tokens: the same id means another text; swap the tokenizer of one first")
