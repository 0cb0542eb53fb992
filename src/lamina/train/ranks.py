"""What a loop asks of the other ranks. Alone, it asks nobody."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn


class Ranks(Protocol):
    """The ranks of a run, as the loop sees them. `data` of `data_ranks` reads its own examples."""

    rank: int
    world: int
    data: int
    data_ranks: int

    def sum(self, values: list[float]) -> list[float]:
        """Of each value, over the ranks that read different examples."""
        ...

    def norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """The norm of the gradient of the whole model."""
        ...


class Alone:
    """One process."""

    rank, world, data, data_ranks = 0, 1, 0, 1

    def sum(self, values: list[float]) -> list[float]:
        """Of each value: itself."""
        return values

    def norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """The norm of all gradients."""
        found = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(found) if found else torch.zeros(())
