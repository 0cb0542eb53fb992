"""Patterns: who may attend to whom, as predicates over token metadata that compose with & and |.

There is one definition of the mask, `allowed`; every backend asks it, for a whole block or for one pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.specs import Spec
from lamina.tokens import Tokens

Span = tuple[int, int]
Reach = Literal["all", "causal"] | None


@dataclass(frozen=True)
class Retained:
    """Which keys later queries can still see: the `recent` last ones (None: all of them) and the `first` ones."""

    recent: int | None
    first: int = 0
    memory: bool = False  # not the text's own keys, but those of what is read beside it: filled once, kept whole


class Pattern(Spec):
    """A predicate `pattern(query, key) -> bool` over Tokens of any broadcastable shape."""

    def __call__(self, query: Tokens, key: Tokens) -> Tensor:
        raise NotImplementedError

    def reach(self, query: Span, key: Span) -> Reach:
        """What plain spans of positions allow: "all" keys, a square "causal" triangle, or None: ask the mask."""
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
class Everything(Pattern):
    """Bidirectional: every token sees every token of its document (BERT, encoders)."""

    def __call__(self, query: Tokens, key: Tokens) -> Tensor:
        return torch.ones((), dtype=torch.bool, device=key.position.device)

    def looks_ahead(self) -> bool:
        return True

    def reach(self, query: Span, key: Span) -> Reach:
        return "all"


@dataclass(frozen=True, kw_only=True)
class Causal(Pattern):
    """A token sees the earlier ones and itself: key <= query (GPT; arXiv:1706.03762, section 3.2.3)."""

    def __call__(self, query: Tokens, key: Tokens) -> Tensor:
        return key.position <= query.position

    def reach(self, query: Span, key: Span) -> Reach:
        if key[1] - 1 <= query[0]:
            return "all"
        return "causal" if query == key else None


@dataclass(frozen=True, kw_only=True)
class Window(Pattern):
    """A sliding window. `back` counts the query itself: Mistral's W is back=W; Longformer's |i - j| <= w is
    back=w + 1, ahead=w (arXiv:2310.06825, section 2; arXiv:2004.05150, section 3.1)."""

    back: int  # keys at query - back + 1 and later
    ahead: int | None = None  # keys up to query + ahead; None: no limit that way

    def check(self) -> None:
        if self.back < 1 or (self.ahead is not None and self.ahead < 0):
            raise LaminaError(f"Window(back={self.back}, ahead={self.ahead}): back must be 1 or more, ahead 0 or more")

    def __call__(self, query: Tokens, key: Tokens) -> Tensor:
        near = query.position - key.position < self.back
        return near if self.ahead is None else near & (key.position - query.position <= self.ahead)

    def reach(self, query: Span, key: Span) -> Reach:
        behind = query[1] - 1 - key[0] < self.back
        return "all" if behind and (self.ahead is None or key[1] - 1 - query[0] <= self.ahead) else None

    def looks_ahead(self) -> bool:
        return self.ahead != 0

    def retained(self) -> Retained:
        return Retained(self.back)


@dataclass(frozen=True, kw_only=True)
class Prefix(Pattern):
    """Keys of the prefix are seen by all: the first `length` positions, or the marked tokens where it is None
    (prefix-LM = Prefix() | Causal(); arXiv:1910.10683, section 3.2.1)."""

    length: int | None = None

    def check(self) -> None:
        if self.length is not None and self.length < 1:
            raise LaminaError(f"Prefix.length is {self.length}; it must be at least 1, or None for the marked tokens")

    def __call__(self, query: Tokens, key: Tokens) -> Tensor:
        if self.length is not None:
            return key.position < self.length
        if key.marked is None:
            return torch.zeros((), dtype=torch.bool, device=key.position.device)
        return key.marked

    def reach(self, query: Span, key: Span) -> Reach:
        return "all" if self.length is not None and key[1] <= self.length else None

    def retained(self) -> Retained:
        return Retained(None) if self.length is None else Retained(0, self.length)


@dataclass(frozen=True, kw_only=True)
class Sinks(Pattern):
    """The first `count` tokens of the document are always seen (StreamingLLM; arXiv:2309.17453, section 3.2)."""

    count: int = 4

    def check(self) -> None:
        if self.count < 1:
            raise LaminaError(f"Sinks.count is {self.count}; it must be at least 1")

    def __call__(self, query: Tokens, key: Tokens) -> Tensor:
        return key.position < self.count

    def reach(self, query: Span, key: Span) -> Reach:
        return "all" if key[1] <= self.count else None

    def retained(self) -> Retained:
        return Retained(0, self.count)


@dataclass(frozen=True, kw_only=True)
class Both(Pattern):
    """Where both patterns allow it: `first & second`."""

    first: Pattern
    second: Pattern

    def __call__(self, query: Tokens, key: Tokens) -> Tensor:
        return self.first(query, key) & self.second(query, key)

    def reach(self, query: Span, key: Span) -> Reach:
        a, b = self.first.reach(query, key), self.second.reach(query, key)
        if a is None or b is None:
            return None
        return "causal" if "causal" in (a, b) else "all"

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

    def reach(self, query: Span, key: Span) -> Reach:
        return "all" if "all" in (self.first.reach(query, key), self.second.reach(query, key)) else None

    def looks_ahead(self) -> bool:
        return self.first.looks_ahead() or self.second.looks_ahead()

    def retained(self) -> Retained:
        a, b = self.first.retained(), self.second.retained()
        recent = None if a.recent is None or b.recent is None else max(a.recent, b.recent)
        return Retained(recent, max(a.first, b.first))


def allowed(pattern: Pattern, query: Tokens, key: Tokens) -> Tensor:
    """The mask: the pattern, within one document, and never a hole. Shapes broadcast; True where attention may look."""
    return pattern(query, key) & (query.document == key.document) & (key.position >= 0)
