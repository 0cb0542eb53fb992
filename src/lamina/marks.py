"""Marks: which tokens are marked (global, in Longformer and BigBird) where the caller does not say it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.specs import Spec
from lamina.tokens import Tokens, earlier


def later(which: Tensor, documents: Tensor) -> Tensor:
    """(B, T): how many of those tokens of its document come after each token."""
    return earlier(which.flip(1), documents.flip(1)).flip(1)


def after_question(id: int, ids: Tensor, tokens: Tokens) -> Tensor:
    """(B, T) bool: what follows the first token of this id in its document; all but the first token of one without."""
    ends = (ids == id) & tokens.real
    before = earlier(ends, tokens.document)
    some = before + ends + later(ends, tokens.document) > 0
    return torch.where(some, before > 0, earlier(tokens.real, tokens.document) > 0) & tokens.real


class Marks(Spec):
    """A rule for the marks of a text."""

    def mark(self, ids: Tensor, tokens: Tokens) -> Tensor:
        """(B, T) bool."""
        raise NotImplementedError

    def put(self, ids: Tensor, tokens: Tokens) -> Tokens:
        """The tokens, marked. What was promised of their positions still holds."""
        return replace(tokens, marked=self.mark(ids, tokens) & tokens.real)


@dataclass(frozen=True, kw_only=True)
class FirstToken(Marks):
    """The first token of each document: where Longformer classifies sequences."""

    def mark(self, ids: Tensor, tokens: Tokens) -> Tensor:
        return earlier(tokens.real, tokens.document) == 0


@dataclass(frozen=True, kw_only=True)
class BeforeToken(Marks):
    """All that stands before the first token of this id in its document: the question, where Longformer answers
    questions; nothing in a document that has none."""

    id: int

    def mark(self, ids: Tensor, tokens: Tokens) -> Tensor:
        ends = (ids == self.id) & tokens.real
        follows = later(ends, tokens.document)
        return (earlier(ends, tokens.document) == 0) & ~ends & (follows > 0)


@dataclass(frozen=True, kw_only=True)
class AfterToken(Marks):
    """All that stands after the first token of this id in its document and the one behind that: the choice, where
    Longformer chooses (two separators stand before it); nothing in a document that has none."""

    id: int

    def mark(self, ids: Tensor, tokens: Tokens) -> Tensor:
        behind = earlier((ids == self.id) & tokens.real, tokens.document) > 0
        return behind & (earlier(behind & tokens.real, tokens.document) > 0)


@dataclass(frozen=True, kw_only=True)
class EndBlocks(Marks):
    """The first and the last block of `size` tokens of each document, and all of one of at most `short`: BigBird."""

    size: int
    short: int = 0

    def check(self) -> None:
        if self.size < 1 or self.short < 0:
            raise LaminaError(
                f"EndBlocks(size={self.size}, short={self.short}): size must be 1 or more, short 0 or more"
            )

    def mark(self, ids: Tensor, tokens: Tokens) -> Tensor:
        before = earlier(tokens.real, tokens.document)
        after = later(tokens.real, tokens.document)
        length = before + after + 1
        last = torch.div(length - 1, self.size, rounding_mode="floor")
        ends = (before < self.size) | (torch.div(before, self.size, rounding_mode="floor") == last)
        return ends | (length <= self.short)
