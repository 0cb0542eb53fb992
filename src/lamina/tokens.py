"""Tokens: what attention may know of a token. Keys carry theirs, so that no offset is ever computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HOLE = -1
"""The position of a slot that holds no token: padding, or an empty place in a cache."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """The metadata of a (B, T) block of tokens.

    `span` is a promise known without looking at a tensor: every row holds the positions start, ..., stop - 1 of one
    document, in order and without holes. Backends use it to leave the mask out.
    """

    position: Tensor  # (B, T) int64, counted within the document; HOLE where there is no token
    document: Tensor  # (B, T) int64; tokens of different documents do not see each other
    marked: Tensor | None = None  # (B, T) bool: the prefix of a prefix-LM, Longformer's global tokens
    span: tuple[int, int] | None = None

    @property
    def real(self) -> Tensor:
        """(B, T) bool: where there is a token."""
        return self.position >= 0

    def query(self) -> Tokens:
        """As queries: (B, T, 1), to be broadcast against keys."""
        marked = None if self.marked is None else self.marked[:, :, None]
        return Tokens(self.position[:, :, None], self.document[:, :, None], marked)

    def key(self) -> Tokens:
        """As keys: (B, 1, S), to be broadcast against queries."""
        marked = None if self.marked is None else self.marked[:, None, :]
        return Tokens(self.position[:, None, :], self.document[:, None, :], marked)

    def select(self, index: Tensor) -> Tokens:
        """The rows `index` of the batch, in that order."""
        marked = None if self.marked is None else self.marked[index]
        return Tokens(self.position[index], self.document[index], marked, self.span)


def join(first: Tokens, second: Tokens) -> Tokens:
    """Two blocks one after the other: (B, S) and (B, T) give (B, S + T)."""
    span = None
    if first.span and second.span and first.span[1] == second.span[0]:
        span = (first.span[0], second.span[1])
    marked = None
    if first.marked is not None or second.marked is not None:
        marked = torch.cat([_marks(first), _marks(second)], dim=1)
    return Tokens(
        torch.cat([first.position, second.position], dim=1),
        torch.cat([first.document, second.document], dim=1),
        marked,
        span,
    )


def _marks(tokens: Tokens) -> Tensor:
    return torch.zeros_like(tokens.position, dtype=torch.bool) if tokens.marked is None else tokens.marked


def plain(batch: int, length: int, *, start: int = 0, device: torch.device | str | None = None) -> Tokens:
    """One document a row, no padding, positions start, ..., start + length - 1."""
    position = torch.arange(start, start + length, device=device).expand(batch, length)
    return Tokens(position, torch.zeros_like(position), span=(start, start + length))


def earlier(which: Tensor, documents: Tensor) -> Tensor:
    """(B, T): how many of those tokens of its document came before each token, also where documents alternate."""
    order = documents.argsort(dim=1, stable=True)
    kind, one = documents.gather(1, order), which.gather(1, order).to(torch.int64)
    before = one.cumsum(1) - one
    starts = torch.nn.functional.pad(kind[:, 1:] != kind[:, :-1], (1, 0), value=True)
    count = before - torch.where(starts, before, 0).cummax(dim=1).values
    return torch.empty_like(count).scatter_(1, order, count)
