"""Dense to experts: every expert begins as a copy of the network that it replaces (arXiv:2212.05055, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.layers import ExpertsSpec, FeedForwardSpec, TopKSpec
from lamina.model import ModelSpec
from lamina.specs import Spec
from lamina.surgery.operation import Changed, Operation, Promise
from lamina.surgery.places import EVERYWHERE, Place, edited, places
from lamina.surgery.weights import Made, Weights, own_generator


@dataclass(frozen=True, kw_only=True)
class Upcycle(Operation):
    """Experts in place of feed-forward networks: `experts` copies, of which each token uses `chosen`.

    Gates that sum to 1 over equal experts give what the one network gave, whatever the router says; it is new, and
    begins as `spec.initial` says. noise: experts begin apart, by so many deviations of each weight, and the model is
    then another one.
    """

    NAME = "experts"

    experts: int
    chosen: int = 2
    noise: float = 0.0
    seed: int = 0
    at: tuple[str, ...] = EVERYWHERE

    def check(self) -> None:
        if not 1 <= self.chosen <= self.experts or self.noise < 0:
            raise LaminaError(
                f"chosen={self.chosen} must be from 1 to experts={self.experts}, and noise={self.noise} at least 0"
            )

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        found = networks(spec, self.at)
        made: dict[str, Made] = {}
        gone: list[str] = []
        for place in found:
            for part in ("gate", "up", "down"):
                for kind in ("weight", "bias"):
                    name = place.weight(f"{part}.{kind}")
                    if name in weights:
                        copies = partial(_copies, count=self.experts, noise=self.noise, seed=self.seed, name=name)
                        how = f"{self.experts} copies" + (f" with noise {self.noise}" if self.noise else "")
                        made[place.weight(f"experts.{part}.{kind}")] = Made((name,), how, copies)
                        gone.append(name)
        chosen = {place.path for place in found}

        def change(path: str, part: Spec) -> Spec:
            if path not in chosen or not isinstance(part, FeedForwardSpec):
                return part
            return ExpertsSpec(router=TopKSpec(experts=self.experts, chosen=self.chosen), expert=part)

        promise = (
            Promise("lossy", "experts begin with noise")
            if self.noise
            else Promise("exact", "equal experts, and gates that sum to 1")
        )
        undo = None if self.noise else (PickExpert(expert=0, at=tuple(sorted(chosen))),)
        return Changed(edited(spec, change), Weights(weights, made, gone), promise, undo)


@dataclass(frozen=True, kw_only=True)
class PickExpert(Operation):
    """One network in place of experts: expert number `expert`, or their mean."""

    NAME = "dense"

    expert: int | None = None  # None: the mean of all
    at: tuple[str, ...] = EVERYWHERE

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        found = places(spec, ExpertsSpec, self.at)
        made: dict[str, Made] = {}
        gone: list[str] = []
        for place in found:
            experts = place.part.router.experts
            if place.part.shared is not None:
                raise LaminaError(f"{place.shown} has a shared network beside its experts, which would be lost")
            if self.expert is not None and not 0 <= self.expert < experts:
                raise LaminaError(f"expert={self.expert} must be from 0 to {experts - 1} at {place.shown}")
            inside = [name for name in weights if name.startswith(f"{place.path}.")]
            gone += inside
            begin = place.weight("experts.")
            for name in inside:
                if name.startswith(begin):
                    how = "mean of the experts" if self.expert is None else f"expert {self.expert}"
                    new = place.weight(name.removeprefix(begin))
                    made[new] = Made((name,), how, partial(_picked, expert=self.expert))
        chosen = {place.path for place in found}

        def change(path: str, part: Spec) -> Spec:
            return part.expert if path in chosen and isinstance(part, ExpertsSpec) else part

        return Changed(
            edited(spec, change), Weights(weights, made, gone), Promise("lossy", "what other experts know goes")
        )


def networks(spec: ModelSpec, at: tuple[str, ...]) -> list[Place[FeedForwardSpec]]:
    """The feed-forward networks there that are no experts. Raises LaminaError where there are none."""
    inside = tuple(f"{place.path}." for place in places_of_experts(spec))
    found = [place for place in places(spec, FeedForwardSpec, at) if not place.path.startswith(inside)]
    if not found:
        raise LaminaError("every feed-forward network of this model is an expert already")
    return found


def places_of_experts(spec: ModelSpec) -> list[Place[ExpertsSpec]]:
    """Where experts are already; none is fine."""
    return [] if not any(isinstance(part, ExpertsSpec) for _, part in spec.walk()) else places(spec, ExpertsSpec)


def _copies(x: Tensor, count: int, noise: float, seed: int, name: str) -> Tensor:
    copies = x.expand(count, *x.shape)
    if not noise:
        return copies.contiguous()
    drawn = torch.randn(copies.shape, generator=own_generator(name, seed))
    return (copies.float() + noise * x.float().std() * drawn).to(x.dtype)


def _picked(x: Tensor, expert: int | None) -> Tensor:
    return x.float().mean(dim=0).to(x.dtype) if expert is None else x[expert].contiguous()
