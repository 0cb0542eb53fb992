"""What a recurrent stack keeps between forwards: the memory that a segment has left, and how far each row is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from lamina.cache.slot import Ledger, Slot
from lamina.tokens import Tokens


@dataclass(frozen=True, eq=False)
class Progress:
    """How far the rows of a batch are. A row that has read nothing is in segment -1."""

    memory: Tensor  # (B, n, width): what stands before and after the tokens of the segment that each row is in
    serial: Tensor  # (B, 1): how many segments a row has begun; tokens of different ones do not see each other
    document: Tensor  # (B, 1): of the last token
    segment: Tensor  # (B, 1): that of the last token, counted within its document

    def select(self, index: Tensor) -> Progress:
        """The rows `index`, in that order."""
        return Progress(self.memory[index], self.serial[index], self.document[index], self.segment[index])


class RecurrentLedger(Ledger):
    """There are no keys here, and nothing to note."""

    called = "the memory of a recurrent stack"

    def note(self, tokens: Tokens) -> Tokens:
        return tokens

    def slot(self) -> RecurrentSlot:
        return RecurrentSlot(self)

    def reorder(self, index: Tensor) -> None:
        self.forget()


class RecurrentSlot(Slot):
    """The progress of a stack, which reads it before and writes it after."""

    def __init__(self, ledger: RecurrentLedger) -> None:
        super().__init__(ledger)
        self.progress: Progress | None = None

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return key, value

    def reorder(self, index: Tensor) -> None:
        self.progress = None if self.progress is None else self.progress.select(index)

    def detach(self) -> None:
        """Let no gradient go further back than this."""
        if self.progress is not None:
            self.progress = replace(self.progress, memory=self.progress.memory.detach())

    def bytes(self) -> int:
        return 0 if self.progress is None else self.progress.memory.numel() * self.progress.memory.element_size()
