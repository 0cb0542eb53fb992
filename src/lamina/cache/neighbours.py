"""What was retrieved for a chunk, while the next one is written: RETRO's keys and values of one chunk a row
(arXiv:2112.04426, section 2.4).

Tokens read the neighbours of the last whole chunk alone, so whatever the length of the text, a row keeps those of one
chunk. Rows need not be in step: each has a chunk number of its own.

Example, chunks of 4 and one row: the token at position 7 ends chunk 1 and brings its neighbours. They stay for the
tokens 8, 9 and 10; token 11 brings those of chunk 2, which take their place.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.cache.slot import Ledger, Slot
from lamina.patterns import Retained
from lamina.tokens import HOLE, Tokens


@dataclass(frozen=True, eq=False, kw_only=True)
class Found(Tokens):
    """The tokens (R, S) of the neighbours of R chunks, all of a chunk in one row; positions count within a neighbour.

    `document` is that of the chunk, in every place.
    """

    row: Tensor  # (R,) int64: of the batch
    chunk: Tensor  # (R,) int64: its number in its document; HOLE where there is none


class NeighbourLedger(Ledger):
    """Of each row the chunk whose neighbours are kept."""

    called = "a cache of what was retrieved"
    remedy = "a new cache reads the text again"

    def __init__(self, batch: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        none = torch.full((batch, 0), HOLE, dtype=torch.int64, device=device)
        row = torch.arange(batch, device=device)
        self.kept = Found(none, none.clamp(min=0), row=row, chunk=torch.full_like(row, HOLE))
        self.pick = row  # (B,): of what is visible in this forward, what is kept

    @classmethod
    def serves(cls, kind: str, retained: Retained) -> Hashable | None:
        return "found" if retained.of == "found" else None

    @classmethod
    def made(
        cls, retained: Retained, batch: int, capacity: int | None, device: torch.device | str | None = None
    ) -> NeighbourLedger:
        return cls(batch, device)

    def note(self, tokens: Tokens) -> Found:
        """New chunks come before those that were kept. Those of a row are in order, and the last one stays."""
        assert isinstance(tokens, Found)
        new, kept = tokens, self.kept
        count, batch = new.row.shape[0], kept.row.shape[0]
        width = max(new.position.shape[1], kept.position.shape[1])
        number = torch.arange(count, device=new.row.device)
        last = torch.full_like(kept.row, HOLE).scatter_reduce(0, new.row, number, "amax")
        self.pick = torch.where(last >= 0, last, count + torch.arange(batch, device=last.device))
        position = torch.cat(
            [F.pad(one.position, (0, width - one.position.shape[1]), value=HOLE) for one in (new, kept)]
        )
        document = torch.cat([_document(one, width) for one in (new, kept)])
        row, chunk = torch.cat([new.row, kept.row]), torch.cat([new.chunk, kept.chunk])
        pick = self.pick
        self.kept = Found(position[pick], document[pick], row=row[pick], chunk=chunk[pick])
        return Found(position, document, row=row, chunk=chunk)

    def visible_with(self, new: Found | None) -> Found | None:
        """What a slot will hand out for these new chunks; for none, what is kept, where there is something."""
        if new is not None:
            found = self.admit(new)
            assert isinstance(found, Found)
            return found
        return self.kept if self.kept.position.shape[1] else None

    def slot(self) -> NeighbourSlot:
        return NeighbourSlot(self)

    def reorder(self, index: Tensor) -> None:
        self.forget()
        kept = self.kept
        row = torch.arange(index.shape[0], device=index.device)
        self.kept = Found(kept.position[index], kept.document[index], row=row, chunk=kept.chunk[index])


def _document(found: Found, width: int) -> Tensor:
    """(R, width): the document of each row, where it holds no key either."""
    if found.document.shape[1] == 0:
        return found.document.new_zeros(found.document.shape[0], width)
    return found.document[:, :1].expand(-1, width)


class NeighbourSlot(Slot):
    """One layer's keys and values of the kept neighbours: (B, G, S, D)."""

    ledger: NeighbourLedger

    def kept(self, new: Tokens | None) -> tuple[Tensor, Tensor, Found] | None:
        """Keys, values and whose they are, where nothing is new and there are some."""
        if new is not None or self.key is None or self.value is None:
            return None
        return self.key, self.value, self.ledger.kept

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """New chunks (R, G, S, D) -> those and the kept ones, (R + B, G, S, D)."""
        batch = self.ledger.pick.shape[0]
        key, value = (_joined(new, old, batch) for new, old in ((key, self.key), (value, self.value)))
        self.key, self.value = key[self.ledger.pick], value[self.ledger.pick]
        return key, value


def _joined(new: Tensor, old: Tensor | None, batch: int) -> Tensor:
    if old is None:
        old = new.new_zeros(batch, *new.shape[1:])
    width = max(new.shape[2], old.shape[2])
    return torch.cat([F.pad(one, (0, 0, 0, width - one.shape[2])) for one in (new, old)])
