"""Cache: the slots of a model by the path of their layer, and how far each row has come."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from lamina.cache.expiring import ExpiringLedger
from lamina.cache.fixed import FixedLedger
from lamina.cache.growing import GrowingLedger
from lamina.cache.memory import MemoryLedger
from lamina.cache.neighbours import NeighbourLedger
from lamina.cache.ring import RingLedger
from lamina.cache.sinks import SinksLedger
from lamina.cache.slot import Ledger, Slot
from lamina.cache.summed import SummedLedger
from lamina.errors import LaminaError, UnsupportedError
from lamina.patterns import Retained
from lamina.tokens import Tokens

LEDGERS: tuple[type[Ledger], ...] = (
    MemoryLedger,
    NeighbourLedger,
    SummedLedger,
    RingLedger,
    SinksLedger,
    FixedLedger,
    ExpiringLedger,
    GrowingLedger,
)
"""Who is asked, in this order, whether what a layer keeps is kept there (`Ledger.serves`)."""


class Cache:
    """State of decoding. Layers ask it for their slot; the model and the generation loop do the housekeeping.

    `length` counts the columns that came in, padding included; `next_position` (B, 1) is where each row goes on.
    """

    def __init__(
        self, kind: str, batch: int, capacity: int | None = None, *, device: torch.device | str | None = None
    ) -> None:
        if kind == "fixed" and capacity is None:
            raise UnsupportedError("a fixed cache needs its capacity: new_cache('fixed', batch, capacity)")
        if capacity is not None and capacity < 1:
            raise LaminaError(f"the capacity of a cache is {capacity}; it must be at least 1")
        self.kind, self.batch, self.capacity, self.device = kind, batch, capacity, device
        self.length = 0
        self.plain = True  # no padding, one document: positions follow from `length` alone
        self.next_position = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self.document = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self.slots: dict[str, Slot] = {}
        self.ledgers: dict[Hashable, Ledger] = {}
        self.memory: Tensor | None = None  # (texts, S, width): what the encoder made of the source
        self.source: Tensor | None = None  # (texts, S): its ids, where they were given

    def add(self, path: str, retained: Retained) -> None:
        """Give the layer at `path`, whose pattern keeps `retained`, the slot that this kind of cache has for it."""
        ledger = self._ledger(path, retained)
        self.slots[path] = ledger.slot()

    def add_own(self, path: str, ledger: Ledger) -> None:
        """Give the part at `path` the slot of a ledger of its own, whatever the kind of cache."""
        self.ledgers[path], self.slots[path] = ledger, ledger.slot()

    def slot(self, path: str) -> Slot:
        """The slot of the layer at `path`."""
        return self.slots[path]

    def find(self, path: str) -> Slot | None:
        """The slot of the part at `path`, where it has one."""
        return self.slots.get(path)

    def advance(self, tokens: Tokens) -> None:
        """The model has read `tokens`."""
        self.length += tokens.position.shape[1]
        self.plain = self.plain and tokens.span is not None
        if self.plain:
            self.next_position.fill_(self.length)
        else:
            latest = last_real(tokens.position)  # (B, 1) column of the last real token, or -1
            column = latest.clamp(min=0)
            seen = latest >= 0
            self.next_position = torch.where(seen, tokens.position.gather(1, column) + 1, self.next_position)
            self.document = torch.where(seen, tokens.document.gather(1, column), self.document)

    def reorder(self, index: Tensor, alike: int = 0) -> None:
        """Keep the batch rows `index` (beam search: the parents of the new beams), in that order, in every state.

        alike: a promise that row i and row index[i] have the same first columns, so many, which then stay as they are.
        """
        if index.shape[0] == self.batch and torch.equal(index, torch.arange(self.batch, device=index.device)):
            return
        for ledger in self.ledgers.values():
            ledger.alike = alike
        for part in (*self.ledgers.values(), *self.slots.values()):
            part.reorder(index)
        self.next_position, self.document = self.next_position[index], self.document[index]
        memory = self.ledgers.get("memory")
        if self.memory is not None and isinstance(memory, MemoryLedger) and memory.parents is not None:
            self.memory = self.memory[memory.parents]
            self.source = None if self.source is None else self.source[memory.parents]
        self.batch = index.shape[0]

    def trim(self, length: int) -> None:
        """Roll back to the first `length` columns (speculative decoding). Rings and sinks raise UnsupportedError."""
        if not self.plain:
            raise UnsupportedError("a cache that holds padding or several documents cannot be trimmed")
        if not 0 <= length <= self.length:
            raise LaminaError(f"a cache of {self.length} tokens cannot be trimmed to {length}")
        if fixed := [ledger for ledger in self.ledgers.values() if not ledger.trims]:
            raise UnsupportedError(f"{fixed[0].called} overwrites old keys and cannot be trimmed; {fixed[0].remedy}")
        for part in (*self.ledgers.values(), *self.slots.values()):
            part.trim(length)
        self.length = length
        self.next_position.fill_(length)

    def detach(self) -> None:
        """Let no gradient go further back than this (truncated backpropagation over consecutive pieces of a text)."""
        for slot in self.slots.values():
            slot.detach()

    def bytes(self) -> int:
        """Bytes that all slots hold now."""
        return sum(slot.bytes() for slot in self.slots.values())

    def _ledger(self, path: str, retained: Retained) -> Ledger:
        for one in LEDGERS:
            if reason := one.refuses(self.kind, retained):
                raise UnsupportedError(f"{path} {reason}")
        for one in LEDGERS:
            if (name := one.serves(self.kind, retained)) is not None:
                if name not in self.ledgers:
                    self.ledgers[name] = one.made(retained, self.batch, self.capacity, self.device)
                return self.ledgers[name]
        raise UnsupportedError(f"{path} looks back without limit, so a ring cannot serve it; cache='auto' can")


def last_real(position: Tensor) -> Tensor:
    """(B, T) positions -> (B, 1) column of the last token that is not a hole; -1 where there is none."""
    column = torch.arange(position.shape[1], device=position.device).expand_as(position)
    return torch.where(position >= 0, column, -1).amax(dim=1, keepdim=True)
