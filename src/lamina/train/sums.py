"""The sums of a step, by kind of label, until they are divided by the labels of the whole global batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lamina.objectives import Total


def loss_of(total: Total, asked: Mapping[str, float]) -> Tensor:
    """What one micro-batch adds to the loss of a step that asks `asked` labels of each kind."""
    parts = [one.total * one.weight / max(asked[kind], 1.0) for kind, one in total.kinds.items()]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


class Sums:
    """Adds totals up on their device; `figures` waits for it, once."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], Tensor] = {}  # (kind, what)
        self.weights: dict[str, float] = {}
        self.auxiliary: Tensor | None = None

    def add(self, total: Total, share: float) -> None:
        """One micro-batch; `share`: of the tokens of the step."""
        for kind, one in total.kinds.items():
            self.weights[kind] = one.weight
            for what, value in {"total": one.total, "nats": one.nats, **one.more}.items():
                value = value.detach()
                self.values[kind, what] = self.values[kind, what] + value if (kind, what) in self.values else value
        if total.auxiliary is not None:
            value = total.auxiliary.detach() * share
            self.auxiliary = value if self.auxiliary is None else self.auxiliary + value

    def figures(
        self, asked: Mapping[str, float], summed: Callable[[list[float]], list[float]] = list
    ) -> tuple[float, float, dict[str, float]]:
        """(the loss that was minimised, the same in nats alone, and each figure by name), all of them means.

        summed: adds up over ranks, which all have the same kinds. A kind is named as it is, what else is summed over it
        by its own name. Nothing at all gives NaN.
        """
        names = sorted(self.values)
        tensors = [self.values[name] for name in names] + ([] if self.auxiliary is None else [self.auxiliary])
        if not names:
            return math.nan, math.nan, {}
        numbers = summed(torch.stack([one.double() for one in tensors]).tolist())
        found = {name: value / max(asked[name[0]], 1.0) for name, value in zip(names, numbers, strict=False)}
        loss = sum(weight * found[kind, "total"] for kind, weight in self.weights.items())
        nats = sum(weight * found[kind, "nats"] for kind, weight in self.weights.items())
        parts = {kind if what == "nats" else what: v for (kind, what), v in found.items() if what != "total"}
        if self.auxiliary is not None:
            parts["auxiliary"] = numbers[-1]
        return loss, nats, parts
