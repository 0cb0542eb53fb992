"""The fixed cache: room for `capacity` tokens from the start and a cursor that is a tensor, so a step never changes
shape and can be compiled or captured. Empty places are holes."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from lamina.cache.slot import Ledger, Slot
from lamina.errors import LaminaError
from lamina.patterns import Retained
from lamina.tokens import HOLE, Tokens


class FixedLedger(Ledger):
    """Positions and documents of `capacity` places, filled from the left."""

    trims = True

    def __init__(self, batch: int, capacity: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.capacity = capacity
        self.position = torch.full((batch, capacity), HOLE, dtype=torch.int64, device=device)
        self.document = torch.zeros((batch, capacity), dtype=torch.int64, device=device)
        self.marked = torch.zeros((batch, capacity), dtype=torch.bool, device=device)
        self.cursor = torch.zeros((), dtype=torch.int64, device=device)
        self.place = torch.zeros((1,), dtype=torch.int64, device=device)
        self.length: int | None = 0  # in Python, to refuse an overflow; None inside a compiled step

    @classmethod
    def refuses(cls, kind: str, retained: Retained) -> str | None:
        if kind != "fixed":
            return None
        if retained.of == "summed":
            return "sums up what has passed, which a fixed cache cannot; cache='auto' can"
        if retained.every > 1:
            return "compresses what has passed, which a fixed cache cannot; cache='auto' can"
        return None

    @classmethod
    def serves(cls, kind: str, retained: Retained) -> Hashable | None:
        return "fixed" if kind == "fixed" else None

    @classmethod
    def made(
        cls, retained: Retained, batch: int, capacity: int | None, device: torch.device | str | None = None
    ) -> FixedLedger:
        assert capacity is not None
        return cls(batch, capacity, device)

    def note(self, tokens: Tokens) -> Tokens:
        new = tokens.position.shape[1]
        if self.length is not None:
            if self.length + new > self.capacity:
                raise LaminaError(
                    f"the fixed cache has room for {self.capacity} tokens: {self.length} are in, {new} more came"
                )
            self.length += new
        self.place = self.cursor + torch.arange(new, device=self.cursor.device)
        self.position.index_copy_(1, self.place, tokens.position)
        self.document.index_copy_(1, self.place, tokens.document)
        if tokens.marked is not None:
            self.marked.index_copy_(1, self.place, tokens.marked)
        self.cursor.add_(new)
        return Tokens(self.position, self.document, self.marked)

    def slot(self) -> FixedSlot:
        return FixedSlot(self)

    def reorder(self, index: Tensor) -> None:
        self.forget()
        self.position, self.document = self.position[index], self.document[index]
        self.marked = self.marked[index]

    def trim(self, length: int) -> None:
        self.forget()
        self.position[:, length:] = HOLE
        self.cursor.fill_(length)
        self.length = length


class FixedSlot(Slot):
    """Preallocated keys and values, written in place. Inference only: gradients do not flow through it."""

    ledger: FixedLedger

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.key is None or self.value is None:
            capacity = self.ledger.capacity
            self.key = key.new_zeros(*key.shape[:2], capacity, key.shape[3])
            self.value = value.new_zeros(*value.shape[:2], capacity, value.shape[3])
        self.key.index_copy_(2, self.ledger.place, key)
        self.value.index_copy_(2, self.ledger.place, value)
        return self.key, self.value
