"""The memory of an encoder-decoder: keys and values of what the encoder read, computed once and never evicted.

Beams of one text share them: where the cache has B * n rows, n for each text, the memory has B.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from lamina.cache.slot import Ledger, Slot
from lamina.patterns import Retained
from lamina.tokens import Tokens


class MemoryLedger(Ledger):
    """Whose the kept keys are. Trimming the text that is being written leaves what was read as it is."""

    called = "the memory of an encoder"
    trims = True

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.rows = batch  # of the cache: as many as texts, or a multiple
        self.tokens: Tokens | None = None
        self.parents: Tensor | None = None  # of the last `reorder`, where texts changed places

    @classmethod
    def serves(cls, kind: str, retained: Retained) -> Hashable | None:
        return "memory" if retained.of == "memory" else None

    @classmethod
    def made(
        cls, retained: Retained, batch: int, capacity: int | None, device: torch.device | str | None = None
    ) -> MemoryLedger:
        return cls(batch)

    def note(self, tokens: Tokens) -> Tokens:
        self.tokens = tokens
        return tokens

    def slot(self) -> MemorySlot:
        return MemorySlot(self)

    def reorder(self, index: Tensor) -> None:
        self.parents = None
        if self.tokens is not None:
            self.parents = self._texts(index, self.tokens.position.shape[0])
            if self.parents is not None:
                self.tokens = self.tokens.select(self.parents)
                self.forget()

    def trim(self, length: int) -> None:
        """Nothing of the source is forgotten."""

    def _texts(self, index: Tensor, texts: int) -> Tensor | None:
        """The text of each new row; None where every text keeps its place, in as many rows each: beams share it."""
        texts_of_rows = index // (self.rows // texts)
        self.rows = index.shape[0]
        each, rest = divmod(index.shape[0], texts)
        alike = torch.arange(texts, device=index.device).repeat_interleave(each)
        if rest == 0 and each and bool(torch.equal(texts_of_rows, alike)):
            return None
        return texts_of_rows


class MemorySlot(Slot):
    """One layer's keys and values of the memory, filled by the first step that reads it."""

    ledger: MemoryLedger

    def kept(self, new: Tokens | None) -> tuple[Tensor, Tensor, Tokens] | None:
        """Keys, values and whose they are, once they are there, whatever is new."""
        if self.key is None or self.value is None or self.ledger.tokens is None:
            return None
        return self.key, self.value, self.ledger.tokens

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.key, self.value = key, value
        return key, value

    def reorder(self, index: Tensor) -> None:
        if self.ledger.parents is not None:
            super().reorder(self.ledger.parents)
