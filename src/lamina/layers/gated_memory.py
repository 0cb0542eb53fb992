"""What memories share that are read by an attention of their own and mixed in by a gate for each head."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lamina.layers.initial import Draw

GateKind = Literal["sigmoid", "zero"]
"""sigmoid: y = local + sigmoid(b) (memory - local), as published. zero: tanh(b) in place of sigmoid(b), so that with
b = 0 a new memory changes no bit of a trained model. In both b begins at 0."""


class GatedMemory(nn.Module):
    """The gate b (H,). Where nothing is in the memory yet, the local attention is left as it is."""

    SHARD = {"gate": "heads"}

    def __init__(self, kind: GateKind, heads: int) -> None:
        super().__init__()
        self.path = ""  # set by the model: the name of this memory's slot
        self.kind: GateKind = kind
        self.gate = nn.Parameter(torch.zeros(heads))

    def mix(self, local: Tensor, found: Tensor, some: Tensor) -> Tensor:
        """(B, H, T, D) of the local attention and of the memory; `some` (B, H or 1, T, 1): whether it held anything."""
        share = self.gate.tanh() if self.kind == "zero" else self.gate.sigmoid()
        change = share[:, None, None] * (found - local)
        return local + torch.where(some, change, 0.0)

    def initialise(self, draw: Draw) -> None:
        nn.init.zeros_(self.gate)
