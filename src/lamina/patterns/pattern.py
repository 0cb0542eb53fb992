"""Pattern: who may attend to whom, as a predicate over token metadata. Patterns compose with & and |.

There is one definition of the mask, `allowed`; every backend asks it, for a whole block or for one pair. What else a
pattern answers follows from it and saves work: which blocks of tokens have anything to say to each other (`over`), in
which order blocks are best cut (`groups`), and until when a key can be seen (`lasts`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lamina.specs import Spec
from lamina.tokens import Tokens

Span = tuple[int, int]
Reach = Literal["all", "causal"] | None
Band = tuple[int | None, int | None]
Predicate = Callable[[Tokens, Tokens], Tensor]
Kept = Literal["text", "memory", "summed", "found"]
"""Whose keys a cache keeps: the text's own; those of what is read beside it, filled once and kept whole; those of its
last segment, what came before being summed up in a state; those of what was retrieved for the last whole chunk."""
FOREVER = 2**62
"""In `lasts`: keys that every later query may see."""


@dataclass(frozen=True)
class Retained:
    """Which keys later queries can still see: the `recent` last ones (None: all of them) and the `first` ones."""

    recent: int | None
    first: int = 0
    of: Kept = "text"
    segment: int | None = field(default=None, repr=False)  # of so many positions, which nothing may renumber
    every: int = field(default=1, repr=False)  # tokens of the text that have one key together
    pattern: Pattern | None = field(default=None, compare=False, repr=False)  # whose `lasts` may say more


@dataclass(frozen=True)
class Extent:
    """What is known of a block of tokens: numbers for one block, or tensors that broadcast for many.

    Queries that are holes count as position -1, as they do in the mask; keys that are holes do not count at all.
    """

    first: Any  # the smallest position
    last: Any  # the largest
    residues: Callable[[int], tuple[Any, Any]]  # m -> smallest and largest position modulo m
    has: Callable[[int], Any]  # whether a position is among them
    some_marked: Any = True
    all_marked: Any = False


def extent(span: Span) -> Extent:
    """The extent of the plain positions start, ..., stop - 1, of which nothing is known to be marked."""
    first, last = span[0], span[1] - 1

    def residues(modulus: int) -> tuple[int, int]:
        low, high = first % modulus, last % modulus
        return (low, high) if last - first < modulus and low <= high else (0, modulus - 1)

    return Extent(first, last, residues, lambda position: first <= position <= last)


class Pattern(Spec):
    """A predicate `pattern(query, key) -> bool` over Tokens of any broadcastable shape."""

    def __call__(self, query: Tokens, key: Tokens) -> Tensor:
        raise NotImplementedError

    def drawn(self, positions: int, device: torch.device) -> Predicate:
        """The same predicate for positions below that number, which asks no tensor for its values: a kernel that is
        compiled for single pairs cannot wait for them."""
        return self

    def band(self) -> Band | None:
        """(behind, ahead), None for no limit: allowed are exactly the keys at query - behind, ..., query + ahead.

        None: the pattern is no such band, or does not know that it is.
        """
        return None

    def over(self, query: Extent, key: Extent) -> tuple[Any, Any]:
        """Of two blocks: whether some pair may be allowed, and whether every pair is. (True, False) is always right."""
        return True, False

    def reach(self, query: Span, key: Span) -> Reach:
        """What plain spans of positions allow: "all" keys, a square "causal" triangle, or None: ask the mask."""
        return "all" if self.over(extent(query), extent(key))[1] else None

    def groups(self, tokens: Tokens, alone: bool = True) -> Tensor | None:
        """(B, T) int64: tokens of one number look at, and are seen by, much the same; None: neighbours do.

        `alone` is False beside another pattern, which wants neighbours together.
        """
        return None

    def lasts(self, key: Tokens) -> Tensor | None:
        """The position of the last query, from the key's own on, that may see the key; FOREVER: no last one.

        -1: none does. None: every key lasts forever.
        """
        return None

    def retained(self) -> Retained:
        """What a cache has to keep for this pattern."""
        return Retained(None)

    def looks_ahead(self) -> bool:
        """Whether a query sees keys that come after it, other than a prefix: such text cannot be read in pieces."""
        return False

    def __and__(self, other: Pattern) -> Pattern:
        return Both(first=self, second=other)

    def __or__(self, other: Pattern) -> Pattern:
        return Either(first=self, second=other)


@dataclass(frozen=True, kw_only=True)
class Both(Pattern):
    """Where both patterns allow it: `first & second`."""

    first: Pattern
    second: Pattern

    def __call__(self, query: Tokens, key: Tokens) -> Tensor:
        return self.first(query, key) & self.second(query, key)

    def drawn(self, positions: int, device: torch.device) -> Predicate:
        first, second = (one.drawn(positions, device) for one in (self.first, self.second))
        return lambda query, key: first(query, key) & second(query, key)

    def band(self) -> Band | None:
        a, b = self.first.band(), self.second.band()
        if a is None or b is None:
            return None
        behind, ahead = (min((x for x in pair if x is not None), default=None) for pair in zip(a, b, strict=True))
        return behind, ahead

    def over(self, query: Extent, key: Extent) -> tuple[Any, Any]:
        a, b = self.first.over(query, key), self.second.over(query, key)
        return a[0] & b[0], a[1] & b[1]

    def reach(self, query: Span, key: Span) -> Reach:
        a, b = self.first.reach(query, key), self.second.reach(query, key)
        if a is None or b is None:
            return None
        return "causal" if "causal" in (a, b) else "all"

    def groups(self, tokens: Tokens, alone: bool = True) -> Tensor | None:
        return _joined(self.first.groups(tokens, alone), self.second.groups(tokens, alone))

    def lasts(self, key: Tokens) -> Tensor | None:
        a, b = self.first.lasts(key), self.second.lasts(key)
        return b if a is None else a if b is None else torch.minimum(a, b)

    def looks_ahead(self) -> bool:
        return self.first.looks_ahead() and self.second.looks_ahead()

    def retained(self) -> Retained:
        # What both allow, either one retains: the one that asks for less will do.
        both = (self.first.retained(), self.second.retained())
        return min(both, key=lambda one: math.inf if one.recent is None else one.recent + one.first)


@dataclass(frozen=True, kw_only=True)
class Either(Pattern):
    """Where at least one pattern allows it: `first | second`."""

    first: Pattern
    second: Pattern

    def __call__(self, query: Tokens, key: Tokens) -> Tensor:
        return self.first(query, key) | self.second(query, key)

    def drawn(self, positions: int, device: torch.device) -> Predicate:
        first, second = (one.drawn(positions, device) for one in (self.first, self.second))
        return lambda query, key: first(query, key) | second(query, key)

    def over(self, query: Extent, key: Extent) -> tuple[Any, Any]:
        a, b = self.first.over(query, key), self.second.over(query, key)
        return a[0] | b[0], a[1] | b[1]

    def reach(self, query: Span, key: Span) -> Reach:
        return "all" if "all" in (self.first.reach(query, key), self.second.reach(query, key)) else None

    def groups(self, tokens: Tokens, alone: bool = True) -> Tensor | None:
        return _joined(self.first.groups(tokens, False), self.second.groups(tokens, False))

    def lasts(self, key: Tokens) -> Tensor | None:
        a, b = self.first.lasts(key), self.second.lasts(key)
        return None if a is None or b is None else torch.maximum(a, b)

    def looks_ahead(self) -> bool:
        return self.first.looks_ahead() or self.second.looks_ahead()

    def retained(self) -> Retained:
        a, b = self.first.retained(), self.second.retained()
        recent = None if a.recent is None or b.recent is None else max(a.recent, b.recent)
        return Retained(recent, max(a.first, b.first))


def _joined(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Groups within groups."""
    if a is None or b is None:
        return b if a is None else a
    return a * (b.amax() + 1) + b


def allowed(pattern: Predicate, query: Tokens, key: Tokens) -> Tensor:
    """The mask: the pattern, within one document, and never a hole. Shapes broadcast; True where attention may look."""
    return pattern(query, key) & (query.document == key.document) & (key.position >= 0)
