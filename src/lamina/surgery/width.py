"""Feed-forward networks with more or fewer hidden units (Net2Wider, arXiv:1511.05641, section 3), and with a gate or
without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.layers import FeedForwardSpec
from lamina.model import ModelSpec
from lamina.specs import Spec
from lamina.surgery.calibration import Calibration, Texts, check_text, energy
from lamina.surgery.operation import Changed, FittedOperation, Operation, Promise
from lamina.surgery.patterns import Restore
from lamina.surgery.places import EVERYWHERE, Place, edited
from lamina.surgery.upcycle import networks
from lamina.surgery.weights import Made, Weights, in_float32, own_generator


@dataclass(frozen=True, kw_only=True)
class Widen(Operation):
    """Networks of `hidden` units. "zero": new units are drawn with the deviation of the old ones, and nothing of them
    goes out at first. "split": new units are copies of the old ones in turn, and all copies share what went out of one;
    with `noise`, in deviations of each weight, copies differ, and the model is another one."""

    NAME = "widen"

    hidden: int
    by: Literal["zero", "split"] = "zero"
    noise: float = 0.0
    seed: int = 0
    at: tuple[str, ...] = EVERYWHERE

    def check(self) -> None:
        if self.hidden < 1 or self.noise < 0 or (self.noise and self.by == "zero"):
            raise LaminaError(
                f"hidden={self.hidden} must be at least 1, and noise={self.noise} at least 0, and 0 for by: zero"
            )

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        found = networks(spec, self.at)
        made: dict[str, Made] = {}
        for place in found:
            old = place.part.hidden
            if old > self.hidden:
                raise LaminaError(f"{place.shown} has {old} hidden units; prune makes them fewer than that")
            how = f"{self.hidden - old} new units" + (f" with noise {self.noise:g}" if self.noise else "")
            for name, part in _parts(place, weights):
                grown = partial(self._out, old=old) if part == "down" else partial(self._in, old=old, name=name)
                made[name] = Made((name,), how, in_float32(grown))
        new = _of_width(spec, found, self.hidden)
        if self.noise:
            return Changed(new, Weights(weights, made), Promise("lossy", "copies begin with noise"))
        if self.by == "zero":
            promise, undo = Promise("exact", "nothing of the new units goes out"), (Restore(spec=spec.to_json()),)
            return Changed(new, Weights(weights, made), promise, undo)
        before = {place.part.hidden for place in found}
        at = tuple(sorted(place.path for place in found))
        undo = (Prune(hidden=before.pop(), by="copies", at=at),) if len(before) == 1 else None
        promise = Promise("exact", "copies of a unit share what goes out")
        return Changed(new, Weights(weights, made), promise, undo)

    def _in(self, x: Tensor, old: int, name: str) -> Tensor:
        """Gate and up, (hidden, ...)."""
        random = own_generator(name, self.seed)
        if self.by == "zero":
            deviation = x.std() if x.dim() > 1 else 0.0
            return torch.cat([x, deviation * torch.randn(self.hidden - old, *x.shape[1:], generator=random)])
        copies = x[torch.arange(self.hidden) % old]
        if self.noise:
            copies[old:] += self.noise * x.std() * torch.randn(copies[old:].shape, generator=random)
        return copies

    def _out(self, x: Tensor, old: int) -> Tensor:
        """Down, (width, hidden)."""
        if self.by == "zero":
            return torch.cat([x, x.new_zeros(len(x), self.hidden - old)], dim=1)
        index = torch.arange(self.hidden) % old
        return x[:, index] / index.bincount()[index]


@dataclass(frozen=True, kw_only=True)
class Prune(FittedOperation):
    """Networks of their `hidden` best units: by the `norm` of what goes in times that of what goes out, or by the
    `energy` of what goes out on a text. "copies": what `widen` has split becomes one unit again."""

    NAME = "prune"

    hidden: int
    by: Literal["norm", "energy", "copies"] = "norm"
    text: str | None = None  # the file that `energy` is found on; None: the packaged sample
    at: tuple[str, ...] = EVERYWHERE

    def check(self) -> None:
        if self.hidden < 1:
            raise LaminaError(f"hidden is {self.hidden}; it must be at least 1")
        if self.text is not None and self.by != "energy":
            raise LaminaError(f"text is for by: energy, and not for by: {self.by}")

    def fit(self, spec: ModelSpec, weights: Mapping[str, Tensor], texts: Texts) -> Changed:
        found = networks(spec, self.at)
        if self.by == "energy":
            check_text(spec, self.text)
        downs = [place.weight("down") for place in found]
        calibration = Calibration(spec, weights, lambda: texts(self.text), downs, measure=energy)
        made: dict[str, Made] = {}
        fits: dict[str, float] = {}
        for place in found:
            if place.part.hidden < self.hidden:
                raise LaminaError(
                    f"{place.shown} has {place.part.hidden} hidden units; widen makes them more than that"
                )
            how = f"{self.hidden} of {place.part.hidden} units, by {self.by}"
            kept = partial(self._kept, place, weights, calibration, fits)
            if self.by != "copies":
                kept = lru_cache(maxsize=1)(kept)
            for name, part in _parts(place, weights):
                made[name] = Made((name,), how, in_float32(partial(self._fewer, kept=kept, dim=int(part == "down"))))
        return Changed(
            _of_width(spec, found, self.hidden),
            Weights(weights, made),
            Promise("lossy", "what other units do goes"),
            None,
            fits,
        )

    def _kept(
        self,
        place: Place[FeedForwardSpec],
        weights: Mapping[str, Tensor],
        calibration: Calibration,
        fits: dict[str, float],
    ) -> Tensor:
        """The units that stay, (hidden,), in their order."""
        out = weights[place.weight("down.weight")].double().norm(dim=0)
        if self.by == "energy":
            score = calibration(place.weight("down")).sqrt() * out
        else:
            score = out
            for part in ("gate", "up"):
                names = [place.weight(f"{part}.{kind}") for kind in ("weight", "bias")]
                rows = [weights[name].double() for name in names if name in weights]
                if rows:
                    score = score * torch.cat([row.view(len(row), -1) for row in rows], dim=1).norm(dim=1)
        best = score.topk(self.hidden)
        if self.by == "energy":
            fits[place.shown] = float((1 - best.values.square().sum() / score.square().sum()).clamp(min=0).sqrt())
        return best.indices.sort().values

    def _fewer(self, x: Tensor, kept: Callable[[], Tensor], dim: int) -> Tensor:
        if self.by != "copies":
            return x.index_select(dim, kept())
        if dim == 0:
            return x[: self.hidden]
        index = torch.arange(x.shape[1]) % self.hidden
        return x.new_zeros(len(x), self.hidden).index_add(1, index, x)


@dataclass(frozen=True, kw_only=True)
class Gated(Operation):
    """Gated networks in place of plain ones: the gate is what was there, act(x W), and what it weighs begins as 1, by a
    bias; so a network without biases gets them."""

    NAME = "gated"

    at: tuple[str, ...] = EVERYWHERE

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        found = networks(spec, self.at)
        made: dict[str, Made] = {}
        for place in found:
            if place.part.gated:
                raise LaminaError(f"{place.shown} has a gate already")
            up, bias = place.weight("up.weight"), place.weight("up.bias")
            made[place.weight("gate.weight")] = Made((up,), "what was up", torch.clone)
            made[place.weight("gate.bias")] = (
                Made((bias,), "what was up", torch.clone) if place.part.bias else Made((up,), "zeros", _column)
            )
            made[up] = Made((up,), "zeros", torch.zeros_like)
            made[bias] = Made((up,), "ones", lambda x: x.new_ones(len(x)))
            if not place.part.bias:
                made[place.weight("down.bias")] = Made((place.weight("down.weight"),), "zeros", _column)
        biases = {place.part.bias for place in found}
        at = tuple(sorted(place.path for place in found))
        undo = (Plain(bias=biases.pop(), at=at),) if len(biases) == 1 else None
        new = _edited(spec, found, lambda part: part.replace(gated=True, bias=True))
        return Changed(new, Weights(weights, made), Promise("exact", "gates weigh 1", bits=True), undo)


@dataclass(frozen=True, kw_only=True)
class Plain(Operation):
    """Plain networks in place of gated ones: the gate alone, with its activation."""

    NAME = "plain"

    bias: bool = True  # False: what biases there are go
    at: tuple[str, ...] = EVERYWHERE

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        found = networks(spec, self.at)
        made: dict[str, Made] = {}
        gone: list[str] = []
        for place in found:
            if not place.part.gated:
                raise LaminaError(f"{place.shown} has no gate")
            gone += [place.weight("gate.weight"), place.weight("gate.bias")]
            made[place.weight("up.weight")] = Made((place.weight("gate.weight"),), "what was the gate", torch.clone)
            if place.part.bias and self.bias:
                made[place.weight("up.bias")] = Made((place.weight("gate.bias"),), "what was the gate", torch.clone)
            elif place.part.bias:
                gone += [place.weight("up.bias"), place.weight("down.bias")]
        new = _edited(spec, found, lambda part: part.replace(gated=False, bias=part.bias and self.bias))
        return Changed(new, Weights(weights, made, gone), Promise("lossy", "what gates weigh goes"))


def _column(x: Tensor) -> Tensor:
    return x.new_zeros(len(x))


def _parts(place: Place[FeedForwardSpec], weights: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """The weights of which hidden units are a dimension, and what they are of."""
    names = [(place.weight(f"{part}.{kind}"), part) for part in ("gate", "up") for kind in ("weight", "bias")]
    return [one for one in [*names, (place.weight("down.weight"), "down")] if one[0] in weights]


def _edited(
    spec: ModelSpec, found: list[Place[FeedForwardSpec]], change: Callable[[FeedForwardSpec], Spec]
) -> ModelSpec:
    chosen = {place.path for place in found}
    return edited(
        spec, lambda path, part: change(part) if path in chosen and isinstance(part, FeedForwardSpec) else part
    )


def _of_width(spec: ModelSpec, found: list[Place[FeedForwardSpec]], hidden: int) -> ModelSpec:
    return _edited(spec, found, lambda part: part.replace(hidden=hidden))
