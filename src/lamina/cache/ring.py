"""The ring cache: for a window of W keys it holds W keys, whatever the length of the text (arXiv:2310.06825, sec. 2).

Example, W = 4, one row, after the tokens 0..5: token n lies at place n mod 4, so the places hold 4 5 2 3. Token 6
comes, is written at 6 mod 4 = 2 (over token 2, which nobody will see again), and the places hold 4 5 6 3.
Padding is never kept: each row counts its own real tokens, and holes go to a spare place that stays a hole. So do, of a
block, the tokens of other documents than the one it ends with: between that one's tokens they would take its places.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from lamina.cache.slot import Ledger, Slot
from lamina.patterns import Retained
from lamina.tokens import HOLE, Tokens, join


class RingLedger(Ledger):
    """The last `window` real tokens of each row; place `window` is the spare one."""

    called = "a ring cache"

    def __init__(self, batch: int, window: int, device: torch.device | str | None = None, *, every: int = 1) -> None:
        super().__init__()
        self.window = window
        self.every = every  # tokens of the text that have one place together
        self.count = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self.position = torch.full((batch, window + 1), HOLE, dtype=torch.int64, device=device)
        self.document = torch.zeros((batch, window + 1), dtype=torch.int64, device=device)
        self.marked = torch.zeros((batch, window + 1), dtype=torch.bool, device=device)
        self.place = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self.single = False

    @classmethod
    def serves(cls, kind: str, retained: Retained) -> Hashable | None:
        windowed = kind in ("auto", "ring") and retained.recent is not None and retained.first == 0
        compressed = retained.every > 1  # whatever the kind: its tokens are not the text's
        return ("ring", retained.recent, retained.every) if compressed or windowed else None

    @classmethod
    def made(
        cls, retained: Retained, batch: int, capacity: int | None, device: torch.device | str | None = None
    ) -> RingLedger:
        assert retained.recent is not None
        return cls(batch, retained.recent, device, every=retained.every)

    def note(self, tokens: Tokens) -> Tokens:
        real = _goes_on(tokens)
        serial = self.count + real.cumsum(1) - 1  # (B, T): the number of each of these tokens in its row
        last = serial[:, -1:]
        kept = real & (serial > last - self.window)
        self.place = torch.where(kept, serial % self.window, self.window)
        self.count = last + 1
        self.single = tokens.position.shape[1] == 1
        before = None if self.single else self._tokens()
        marked = torch.zeros_like(real) if tokens.marked is None else tokens.marked
        self.position = self.position.scatter(1, self.place, torch.where(kept, tokens.position, HOLE))
        self.document = self.document.scatter(1, self.place, tokens.document)
        self.marked = self.marked.scatter(1, self.place, marked)
        return self._tokens() if before is None else join(before, tokens)

    def slot(self) -> RingSlot:
        return RingSlot(self)

    def reorder(self, index: Tensor) -> None:
        self.forget()
        self.count, self.position = self.count[index], self.position[index]
        self.document, self.marked = self.document[index], self.marked[index]

    def _tokens(self) -> Tokens:
        return Tokens(self.position, self.document, self.marked)


class RingSlot(Slot):
    """Keys and values at the places of the ledger. A block of several tokens also sees the ring as it was before."""

    ledger: RingLedger

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        ledger = self.ledger
        if self.key is None or self.value is None:
            self.key = key.new_zeros(*key.shape[:2], ledger.window + 1, key.shape[3])
            self.value = value.new_zeros(*value.shape[:2], ledger.window + 1, value.shape[3])
        old = (self.key, self.value)
        self.key, self.value = _scatter(self.key, ledger.place, key), _scatter(self.value, ledger.place, value)
        if ledger.single:
            return self.key, self.value
        return torch.cat([old[0], key], dim=2), torch.cat([old[1], value], dim=2)


def _goes_on(tokens: Tokens) -> Tensor:
    """(B, T) bool: the real tokens of the document that the row ends with."""
    if tokens.span is not None or tokens.position.shape[1] == 1:
        return tokens.real
    column = torch.arange(tokens.position.shape[1], device=tokens.position.device)
    end = torch.where(tokens.real, column, 0).amax(dim=1, keepdim=True)
    return tokens.real & (tokens.document == tokens.document.gather(1, end))


def _scatter(buffer: Tensor, place: Tensor, new: Tensor) -> Tensor:
    index = place[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
    # Out of place when several tokens came, since the caller still reads the ring as it was, and when gradients will.
    if place.shape[1] > 1 or torch.is_grad_enabled() or buffer.is_inference() != torch.is_inference_mode_enabled():
        return buffer.scatter(2, index, new)
    return buffer.scatter_(2, index, new)
