"""Several models of one shape as the experts of one (Branch-Train-Mix, arXiv:2403.07816, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.layers import ExpertsSpec, FeedForwardSpec, TopKSpec
from lamina.model import ModelSpec
from lamina.specs import Spec
from lamina.surgery.merging import check_same
from lamina.surgery.operation import Changed, Joining, Others, Promise
from lamina.surgery.places import EVERYWHERE, edited
from lamina.surgery.upcycle import networks
from lamina.surgery.weights import Beside, Made, Weights


@dataclass(frozen=True, kw_only=True)
class Mixture(Joining):
    """Experts in place of feed-forward networks: that of the model and those of `models`, `chosen` of them for a token.

    All else is the model's own, where the paper has the mean of all. Of equal models comes the one that they are,
    whatever the new router says.
    """

    NAME = "mixture"

    models: tuple[str, ...]  # SOURCEs
    chosen: int = 2
    at: tuple[str, ...] = EVERYWHERE

    def check(self) -> None:
        if not self.models or len(set(self.models)) < len(self.models):
            raise LaminaError(f"models are {list(self.models)}; at least one is needed, and each once")
        if not 1 <= self.chosen <= len(self.models) + 1:
            raise LaminaError(f"chosen={self.chosen} must be from 1 to the {len(self.models) + 1} models there are")

    def sources(self) -> tuple[str, ...]:
        return self.models

    def join(self, spec: ModelSpec, weights: Mapping[str, Tensor], others: Others) -> Changed:
        found = {source: others(source) for source in self.models}
        for source, other in found.items():
            check_same(source, other, spec)
        count = len(found) + 1
        made: dict[str, Made] = {}
        gone = [f"{source}:{name}" for source, other in found.items() for name in other.weights]
        chosen = {place.path: place for place in networks(spec, self.at)}
        for place in chosen.values():
            for name in (one for one in weights if one.startswith(f"{place.path}.")):
                each = (name, *(f"{source}:{name}" for source in found))
                new = place.weight(f"experts.{name.removeprefix(f'{place.path}.')}")
                made[new] = Made(each, f"networks of {count} models", _stacked)
                gone.append(name)

        def change(path: str, part: Spec) -> Spec:
            if path not in chosen or not isinstance(part, FeedForwardSpec):
                return part
            return ExpertsSpec(router=TopKSpec(experts=count, chosen=self.chosen), expert=part)

        beside = Beside(weights, {source: other.weights for source, other in found.items()})
        promise = Promise("lossy", f"networks of {count} models behind a new router")
        return Changed(edited(spec, change), Weights(beside, made, gone), promise)


def _stacked(first: Tensor, *others: Tensor) -> Tensor:
    return torch.stack([first, *(other.to(first.dtype) for other in others)])
