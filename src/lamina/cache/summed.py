"""What a memory keeps that sums its past up: a state of fixed size, and the keys of the segment that is not over yet.

Example, segments of 4 positions, after the tokens 0..9: the state sums up 0..7, and 8 and 9 are kept. Tokens 10, 11 and
12 come; 12 begins a segment, so the layer adds 8..11 to the state, and 12 alone is kept. A segment is added when the
first token beyond it comes, so that positions may have gaps. A new document begins with nothing.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import torch
from torch import Tensor

from lamina.cache.slot import Ledger, Slot
from lamina.patterns import Retained
from lamina.tokens import HOLE, Tokens, join


class SummedLedger(Ledger):
    """The tokens of each row's last segment, and the document whose state the slots hold."""

    called = "a memory that sums up what has passed"

    def __init__(self, batch: int, length: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.length = length
        self.tokens: Tokens | None = None
        self.document = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self.held = self.document  # whose state the slots held before the last tokens came
        self.pick: Tensor | None = None  # (B, kept): the columns, of what was visible, that stay; None: the last ones
        self.kept = 0

    @classmethod
    def serves(cls, kind: str, retained: Retained) -> Hashable | None:
        return ("summed", retained.recent) if retained.of == "summed" else None

    @classmethod
    def made(
        cls, retained: Retained, batch: int, capacity: int | None, device: torch.device | str | None = None
    ) -> SummedLedger:
        assert retained.recent is not None
        return cls(batch, retained.recent, device)

    def note(self, tokens: Tokens) -> Tokens:
        seen = tokens if self.tokens is None else join(self.tokens, tokens)
        seen = replace(seen, marked=None)
        self.held = self.document
        if seen.span is not None:
            start, stop = seen.span
            begin = max(start, (stop - 1) // self.length * self.length)
            self.pick, self.kept = None, stop - begin
            kept = slice(seen.position.shape[1] - self.kept, None)
            self.tokens = Tokens(seen.position[:, kept], seen.document[:, kept], span=(begin, stop))
            self.document = seen.document[:, -1:]
            return seen
        column = torch.arange(seen.position.shape[1], device=seen.position.device).expand_as(seen.position)
        last = torch.where(seen.real, column, -1).amax(dim=1, keepdim=True)
        at = last.clamp(min=0)
        position, document = seen.position.gather(1, at), seen.document.gather(1, at)
        keep = seen.real & (seen.document == document) & (seen.position // self.length == position // self.length)
        self.kept = min(self.length, seen.position.shape[1])
        # A stable sort on "stays" brings the columns that do to the end, in their order.
        self.pick = torch.sort(keep.to(torch.int8), dim=1, stable=True).indices[:, -self.kept :]
        position = torch.where(keep, seen.position, HOLE).gather(1, self.pick)
        self.tokens = Tokens(position, seen.document.gather(1, self.pick))
        self.document = torch.where(last >= 0, document, self.document)
        return seen

    def slot(self) -> SummedSlot:
        return SummedSlot(self)

    def reorder(self, index: Tensor) -> None:
        self.forget()
        self.document = self.document[index]
        self.tokens = None if self.tokens is None else self.tokens.select(index)


class SummedSlot(Slot):
    """Keys and values of the last segment, and the state, which the layer reads before and writes after."""

    ledger: SummedLedger

    def __init__(self, ledger: SummedLedger) -> None:
        super().__init__(ledger)
        self.state: tuple[Tensor, ...] = ()  # (B, ...) each, or none yet

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.key is not None and self.value is not None:
            key, value = torch.cat([self.key, key], dim=2), torch.cat([self.value, value], dim=2)
        self.key, self.value = (self._kept(part) for part in (key, value))
        return key, value

    def _kept(self, x: Tensor) -> Tensor:
        pick = self.ledger.pick
        if pick is None:
            return x[:, :, x.shape[2] - self.ledger.kept :]
        return x.gather(2, pick[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    def reorder(self, index: Tensor) -> None:
        super().reorder(index)
        self.state = tuple(part[index] for part in self.state)

    def detach(self) -> None:
        super().detach()
        self.state = tuple(part.detach() for part in self.state)

    def bytes(self) -> int:
        return super().bytes() + sum(part.numel() * part.element_size() for part in self.state)
