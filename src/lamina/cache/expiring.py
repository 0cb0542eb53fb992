"""The expiring cache: it keeps a key for as long as its pattern says that a query may still see it (`Pattern.lasts`),
and gives its place to a new one. A ring is the special case of a window; sinks, prefixes, global tokens and blocks work
the same way.

Example, Causal() & (Window(back=3) | Sinks(count=1)), after the tokens 0..5: token 0 lasts forever, 4 and 5 until 6 and
7. Tokens 1, 2 and 3 were seen last by 3, 4 and 5, so their places are free: token 6 takes one of them.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from lamina.cache.slot import Ledger, Slot
from lamina.patterns import FOREVER, Pattern, Retained
from lamina.tokens import HOLE, Tokens, join, plain

FIRST_ROOM = 16


class ExpiringLedger(Ledger):
    """Places for the tokens that may still be seen, in no order, and a spare one at the end that stays a hole."""

    called = "a cache that forgets"

    def __init__(self, batch: int, pattern: Pattern, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.pattern = pattern
        self.room = 0  # places, without the spare one; it doubles where they do not suffice
        self.position = torch.full((batch, 1), HOLE, dtype=torch.int64, device=device)
        self.document = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self.marked = torch.zeros((batch, 1), dtype=torch.bool, device=device)
        self.last = torch.full((batch, 1), HOLE, dtype=torch.int64, device=device)  # query that sees what lies there
        self.place = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self.single = False
        self.seen = 0  # columns so far

    @classmethod
    def serves(cls, kind: str, retained: Retained) -> Hashable | None:
        windowed = kind in ("auto", "ring") and retained.recent is not None
        forgets = kind == "auto" and retained.pattern is not None and retained.pattern.lasts(plain(1, 1)) is not None
        return retained.pattern if windowed or forgets else None

    @classmethod
    def made(
        cls, retained: Retained, batch: int, capacity: int | None, device: torch.device | str | None = None
    ) -> ExpiringLedger:
        assert retained.pattern is not None
        return cls(batch, retained.pattern, device)

    def note(self, tokens: Tokens) -> Tokens:
        before = self._tokens()
        lasts = self.pattern.lasts(tokens)
        last = torch.full_like(tokens.position, FOREVER) if lasts is None else lasts.expand_as(tokens.position)
        latest, document = _end(tokens, self)
        kept = tokens.real & (tokens.document == document) & (last > latest)  # what a later query may see
        held = (self.position >= 0) & (self.document == document) & (self.last > latest)
        self.single = tokens.position.shape[1] == 1
        if self.single:  # the new token sees what its own step still sees, and must be seen by itself
            kept = tokens.real
            held = (self.position >= 0) & (self.document == document) & (self.last >= latest)
        self._make_room(held, kept)
        held = torch.nn.functional.pad(held, (0, self.position.shape[1] - held.shape[1]))
        free = held[:, : self.room].to(torch.int8).argsort(dim=1, stable=True)  # (B, room): free places first
        serial = (kept.cumsum(1) - 1).clamp(min=0)
        spare = torch.full_like(serial, self.room)
        chosen = free.gather(1, serial.clamp(max=max(self.room - 1, 0))) if self.room else spare
        self.place = torch.where(kept, chosen, spare)
        marked = torch.zeros_like(kept) if tokens.marked is None else tokens.marked
        self.position = torch.where(held, self.position, HOLE)
        self.position = self.position.scatter(1, self.place, torch.where(kept, tokens.position, HOLE))
        self.document = self.document.scatter(1, self.place, tokens.document)
        self.marked = self.marked.scatter(1, self.place, marked)
        self.last = self.last.scatter(1, self.place, last)
        return self._tokens() if self.single else join(before, tokens)

    def _make_room(self, held: Tensor, kept: Tensor) -> None:
        """As many places as there will be tokens in the fullest row. The spare place moves to the end."""
        self.seen += kept.shape[1]
        if (
            kept.device.type == "meta"
        ):  # only counted: as many as a plain text of that length keeps, without room to spare
            needed = room = self._kept_of(self.seen)
        else:
            needed = int((held.sum(1) + kept.sum(1)).max())
            room = max(FIRST_ROOM, needed + needed // 4)
        if needed <= self.room:
            return
        more = room - self.room
        self.room += more
        pad = torch.nn.functional.pad
        self.position, self.last = (pad(one, (0, more), value=HOLE) for one in (self.position, self.last))
        self.document, self.marked = pad(self.document, (0, more)), pad(self.marked, (0, more))

    def _kept_of(self, length: int) -> int:
        lasts = self.pattern.lasts(plain(1, length))
        return length if lasts is None else max(1, int((lasts >= length - 1).sum()))

    def slot(self) -> ExpiringSlot:
        return ExpiringSlot(self)

    def reorder(self, index: Tensor) -> None:
        self.forget()
        self.position, self.document = self.position[index], self.document[index]
        self.marked, self.last = self.marked[index], self.last[index]

    def _tokens(self) -> Tokens:
        return Tokens(self.position, self.document, self.marked)


def _end(tokens: Tokens, ledger: ExpiringLedger) -> tuple[Tensor, Tensor]:
    """(B, 1) position and document of the last real token of each row; of a row without any, what it ended with."""
    column = torch.arange(tokens.position.shape[1], device=tokens.position.device)
    latest = torch.where(tokens.real, column, -1).amax(dim=1, keepdim=True)
    there, latest = latest >= 0, latest.clamp(min=0)
    newest = ledger.position.argmax(dim=1, keepdim=True)
    position = torch.where(there, tokens.position.gather(1, latest), ledger.position.gather(1, newest))
    return position, torch.where(there, tokens.document.gather(1, latest), ledger.document.gather(1, newest))


class ExpiringSlot(Slot):
    """Keys and values at the places of the ledger. A block of several tokens also sees what lay there before."""

    ledger: ExpiringLedger

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        ledger = self.ledger
        old_key, old_value = (self._grown(old, new, 0) for old, new in ((self.key, key), (self.value, value)))
        places = ledger.room + 1
        at = ledger.place
        self.key = _put(self._grown(self.key, key, places), at, key)
        self.value = _put(self._grown(self.value, value, places), at, value)
        if ledger.single:
            return self.key, self.value
        return torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)

    def _grown(self, old: Tensor | None, new: Tensor, places: int) -> Tensor:
        """The buffer with at least so many places, and one in any case."""
        if old is None:
            return new.new_zeros(*new.shape[:2], max(places, 1), new.shape[3])
        return old if old.shape[2] >= places else torch.nn.functional.pad(old, (0, 0, 0, places - old.shape[2]))


def _put(buffer: Tensor, place: Tensor, new: Tensor) -> Tensor:
    index = place[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
    if place.shape[1] > 1 or torch.is_grad_enabled() or buffer.is_inference() != torch.is_inference_mode_enabled():
        return buffer.scatter(2, index, new)
    return buffer.scatter_(2, index, new)
