"""Slot and ledger: a slot keeps one layer's keys and values; a ledger, shared by like layers, keeps whose they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable

import torch
from torch import Tensor

from lamina.patterns import Retained
from lamina.tokens import Tokens


class Ledger(ABC):
    """Where the tokens of a cache lie. It is told of each forward once, by whichever slot comes first.

    The ledger decides where new keys go; each slot follows it with its own tensors. Layers that keep the same tokens
    share one ledger, so masks are built once a forward and not once a layer.
    """

    called = "this cache"
    """Its name in messages."""

    remedy = "a growing cache can"
    """What can be trimmed where this cannot."""

    late = False
    """True when keys are renumbered inside the cache, so that rotary phases must be applied after `extend`."""

    trims = False
    """True when `trim` can roll it back: nothing that was kept is overwritten."""

    def __init__(self) -> None:
        self.incoming: Tokens | None = None
        self.visible: Tokens | None = None
        self.alike = 0  # in a `reorder`: so many first columns are the same in each row and the one it takes over

    @classmethod
    def refuses(cls, kind: str, retained: Retained) -> str | None:
        """What a layer that keeps `retained` does that a cache of this kind cannot serve, and what can."""
        return None

    @classmethod
    def serves(cls, kind: str, retained: Retained) -> Hashable | None:
        """Whether this is the ledger, in a cache of that kind, of a layer that keeps `retained`: then its name there,
        which is that of every layer that can share it."""
        return None

    @classmethod
    def made(
        cls, retained: Retained, batch: int, capacity: int | None, device: torch.device | str | None = None
    ) -> Ledger:
        """A new one, for the layers that it serves."""
        return cls()

    def admit(self, tokens: Tokens) -> Tokens:
        """Take note of new tokens (B, T); return the tokens of all keys that a slot will hand out for them."""
        if self.incoming is not tokens or self.visible is None:
            self.visible = self.note(tokens)
            self.incoming = tokens
        return self.visible

    def queries(self, tokens: Tokens) -> Tokens:
        """The new tokens under the numbering of this cache (the same, unless `late`)."""
        return tokens

    @abstractmethod
    def note(self, tokens: Tokens) -> Tokens:
        """`admit` for tokens that are really new."""

    @abstractmethod
    def slot(self) -> Slot:
        """A new slot that follows this ledger."""

    @abstractmethod
    def reorder(self, index: Tensor) -> None:
        """Keep the batch rows `index`, in that order."""

    def trim(self, length: int) -> None:
        """Forget all but the first `length` columns, where it `trims`."""
        raise NotImplementedError

    def forget(self) -> None:
        """Drop what was noted of the last forward: the next tokens are new even if they are the same object."""
        self.incoming = self.visible = None


class Slot(ABC):
    """One layer's keys (B, G, S, D) and values (B, G, S, value size)."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    @property
    def late(self) -> bool:
        """Whether rotary phases are applied after `extend`."""
        return self.ledger.late

    def extend(self, key: Tensor, value: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tokens]:
        """New keys (B, G, T, D), values and whose they are; returns all to look at, and whose *they* are."""
        visible = self.ledger.admit(tokens)
        if tokens.span is None:  # what padding computed, even NaN, is not kept: a weight of zero would not stop it
            hole = ~tokens.real[:, None, :, None]
            key, value = key.masked_fill(hole, 0.0), value.masked_fill(hole, 0.0)
        key, value = self.store(key, value)
        return key, value, visible

    @abstractmethod
    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new keys and values where the ledger says; return all that are visible."""

    def reorder(self, index: Tensor) -> None:
        """Keep the batch rows `index`, in that order."""
        if self.key is not None and self.value is not None:
            self.key, self.value = self.key[index], self.value[index]

    def trim(self, length: int) -> None:  # noqa: B027 - most slots look at the ledger's length only
        """Forget all but the first `length` columns."""

    def detach(self) -> None:
        """Keep the values and drop how they were computed: no gradient goes further back."""
        self.key = None if self.key is None else self.key.detach()
        self.value = None if self.value is None else self.value.detach()

    def bytes(self) -> int:
        """Bytes that are allocated now."""
        return sum(t.numel() * t.element_size() for t in (self.key, self.value) if t is not None)
