"""The growing cache: every key is kept. Room is doubled when it runs out, so a step copies nothing on most steps."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from lamina.cache.slot import Ledger, Slot
from lamina.patterns import Retained
from lamina.tokens import Tokens, join

FIRST_ROOM = 64


class GrowingLedger(Ledger):
    """All tokens, in the order in which they came."""

    trims = True

    def __init__(self) -> None:
        super().__init__()
        self.tokens: Tokens | None = None
        self.length = 0
        self.before = 0

    @classmethod
    def serves(cls, kind: str, retained: Retained) -> Hashable | None:
        return "growing" if kind in ("auto", "growing") else None

    def note(self, tokens: Tokens) -> Tokens:
        self.before = self.length
        self.length += tokens.position.shape[1]
        self.tokens = tokens if self.tokens is None else join(self.tokens, tokens)
        return self.tokens

    def slot(self) -> GrowingSlot:
        return GrowingSlot(self)

    def reorder(self, index: Tensor) -> None:
        self.forget()
        if self.tokens is not None:
            self.tokens = self.tokens.select(index)

    def trim(self, length: int) -> None:
        self.forget()
        if self.tokens is not None:
            t = self.tokens
            marked = None if t.marked is None else t.marked[:, :length]
            span = None if t.span is None else (t.span[0], t.span[0] + length)
            self.tokens = Tokens(t.position[:, :length], t.document[:, :length], marked, span)
        self.length = self.before = length


class GrowingSlot(Slot):
    """Keys and values in buffers with room to spare; with gradients, by concatenation instead."""

    ledger: GrowingLedger

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        start, stop = self.ledger.before, self.ledger.length
        self.key = _put(self.key, key, start, stop)
        self.value = _put(self.value, value, start, stop)
        return self.key[:, :, :stop], self.value[:, :, :stop]

    def reorder(self, index: Tensor) -> None:
        if self.key is not None and self.value is not None:
            self.key, self.value = (_select(each, index, self.ledger) for each in (self.key, self.value))


def _select(buffer: Tensor, index: Tensor, ledger: GrowingLedger) -> Tensor:
    """The rows `index` of `buffer`: in place, where nobody else can be reading it, and only the columns that differ."""
    if not (buffer.is_inference() and torch.is_inference_mode_enabled()):
        return buffer[index]
    if index.shape[0] == buffer.shape[0]:
        part = buffer[:, :, ledger.alike : ledger.length]
        part.copy_(part.index_select(0, index))
        return buffer
    chosen = buffer.new_empty(index.shape[0], *buffer.shape[1:])
    chosen[:, :, : ledger.length] = buffer[:, :, : ledger.length].index_select(0, index)
    return chosen


def _put(buffer: Tensor | None, new: Tensor, start: int, stop: int) -> Tensor:
    """`buffer` with `new` at start..stop; a larger one where it does not fit."""
    if torch.is_grad_enabled():  # even keys that need no gradient are saved for that of the query
        return new if buffer is None else torch.cat([buffer[:, :, :start], new], dim=2)
    if buffer is None or buffer.shape[2] < stop or buffer.is_inference() != torch.is_inference_mode_enabled():
        larger = new.new_empty(*new.shape[:2], max(FIRST_ROOM, stop + stop // 2), new.shape[3])
        if buffer is not None:
            larger[:, :, :start] = buffer[:, :, :start]
        buffer = larger
    buffer[:, :, start:stop] = new
    return buffer
