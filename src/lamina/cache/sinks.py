"""Attention sinks: the first keys and the last ones are kept, and are renumbered without gaps inside the cache
(StreamingLLM, arXiv:2309.17453, section 3.2), so a model reads text of any length at the positions it was trained on.

Example, 2 sinks and 3 recent keys, after tokens 0..9: kept are 0 1 7 8 9, which count as positions 0 1 2 3 4. Keys are
kept without their rotary phases, since those positions move; the phases are applied after `extend` (`late`).
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from lamina.cache.slot import Ledger, Slot
from lamina.errors import UnsupportedError
from lamina.patterns import Retained
from lamina.tokens import HOLE, Tokens


class SinksLedger(Ledger):
    """Columns in order of age: the first `first` and the last `recent` real tokens of each row."""

    called = "a sinks cache"
    late = True

    def __init__(self, first: int = 4, recent: int = 508) -> None:
        super().__init__()
        self.first, self.recent = first, recent
        self.serial: Tensor | None = None  # (B, S): the number of each token in its row, HOLE where there is none
        self.count: Tensor | None = None  # (B, 1): real tokens so far
        self.document: Tensor | None = None  # (B, 1): the one of each row
        self.pick: Tensor | None = None  # (B, kept): the columns, of what was visible, that stay
        self.renumbered: Tokens | None = None

    @classmethod
    def refuses(cls, kind: str, retained: Retained) -> str | None:
        if kind != "sinks":
            return None
        if retained.segment is not None:
            return "goes by positions, which a sinks cache renumbers; cache='auto' keeps them"
        if retained.of == "found":
            return "counts chunks by position, and a sinks cache renumbers them; 'auto' does not"
        return None

    @classmethod
    def serves(cls, kind: str, retained: Retained) -> Hashable | None:
        return "sinks" if kind == "sinks" else None

    @classmethod
    def made(
        cls, retained: Retained, batch: int, capacity: int | None, device: torch.device | str | None = None
    ) -> SinksLedger:
        return cls() if capacity is None else cls(4, max(capacity - 4, 1))

    def note(self, tokens: Tokens) -> Tokens:
        batch, new = tokens.position.shape
        real = tokens.real
        self._check(tokens)
        count = torch.zeros((batch, 1), dtype=torch.int64, device=real.device) if self.count is None else self.count
        serial = torch.where(real, count + real.cumsum(1) - 1, HOLE)
        self.count = count + real.sum(1, keepdim=True)
        seen = serial if self.serial is None else torch.cat([self.serial, serial], dim=1)
        holds = seen >= 0
        rank = torch.where(holds, holds.cumsum(1) - 1, HOLE)  # positions without gaps
        document = torch.zeros_like(rank)
        self.renumbered = Tokens(rank[:, -new:], document[:, -new:])
        keep = (seen >= 0) & ((seen < self.first) | (seen >= self.count - self.recent))
        width = min(self.first + self.recent, seen.shape[1])
        # A stable sort on "dropped" brings the kept columns to the end, still in order of age.
        self.pick = torch.sort(keep.to(torch.int8), dim=1, stable=True).indices[:, -width:]
        self.serial = torch.where(keep, seen, HOLE).gather(1, self.pick)
        return Tokens(rank, document)

    def _check(self, tokens: Tokens) -> None:
        """Refuse what renumbering would lose: marks, and a second document in a row, in this forward or a later one."""
        first = tokens.document.gather(1, tokens.real.to(torch.int8).argmax(dim=1, keepdim=True))
        if self.document is not None and self.count is not None:
            first = torch.where(self.count > 0, self.document, first)
        if tokens.marked is not None or bool((tokens.real & (tokens.document != first)).any()):
            raise UnsupportedError("a sinks cache renumbers positions and holds one plain document a row")
        self.document = first

    def queries(self, tokens: Tokens) -> Tokens:
        assert self.renumbered is not None
        return self.renumbered

    def slot(self) -> SinksSlot:
        return SinksSlot(self)

    def reorder(self, index: Tensor) -> None:
        self.forget()
        if self.serial is not None and self.count is not None:
            self.serial, self.count = self.serial[index], self.count[index]
        if self.document is not None:
            self.document = self.document[index]


class SinksSlot(Slot):
    """Unrotated keys and values of the kept tokens."""

    ledger: SinksLedger

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.key is not None and self.value is not None:
            key, value = torch.cat([self.key, key], dim=2), torch.cat([self.value, value], dim=2)
        pick = self.ledger.pick
        assert pick is not None
        index = pick[:, None, :, None]
        self.key = key.gather(2, index.expand(-1, key.shape[1], -1, key.shape[3]))
        self.value = value.gather(2, index.expand(-1, value.shape[1], -1, value.shape[3]))
        return key, value
