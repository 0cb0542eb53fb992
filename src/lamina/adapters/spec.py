"""What a LoRA is (arXiv:2106.09685), as data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lamina.errors import LaminaError
from lamina.specs import Spec


@dataclass(frozen=True, kw_only=True)
class LoRASpec(Spec):
    """A change of rank `rank` beside each of some linear layers: y = W x + b + scale B A x."""

    NAME = "lora"
    rank: int = 8  # of A (rank, in) and B (out, rank)
    alpha: float = 16.0  # scale = alpha / rank
    dropout: float = 0.0  # of what A reads
    targets: tuple[str, ...] | None = None  # names or paths of layers, ours or the checkpoint's; None: all in attention
    rslora: bool = False  # scale = alpha / sqrt(rank), which does not shrink with the rank (arXiv:2312.03732)
    merge: bool = True  # a run also writes the merged model

    def check(self) -> None:
        if self.rank < 1:
            raise LaminaError(f"rank is {self.rank}; it must be 1 or more")
        if not 0 <= self.dropout < 1:
            raise LaminaError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.targets == ():
            raise LaminaError("targets is empty: no layer would be changed; leave it out for all that are in attention")

    @property
    def scale(self) -> float:
        """What B A x is multiplied with."""
        return scale(self.alpha, self.rank, self.rslora)


def scale(alpha: float, rank: int, rslora: bool) -> float:
    """alpha / rank, or alpha / sqrt(rank) (arXiv:2312.03732, theorem 3.2)."""
    return alpha / (math.sqrt(rank) if rslora else rank)
