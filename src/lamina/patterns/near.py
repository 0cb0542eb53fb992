"""Patterns by distance and by mark: everything, causal, windows, prefixes, sinks, global tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.patterns.pattern import FOREVER, Band, Extent, Pattern, Reach, Retained, Span
from lamina.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Everything(Pattern):
    """Bidirectional: every token sees every token of its document (BERT, encoders)."""

    def __call__(self, query: Tokens, key: Tokens) -> Tensor:
        return torch.ones((), dtype=torch.bool, device=key.position.device)

    def band(self) -> Band:
        return None, None

    def over(self, query: Extent, key: Extent) -> tuple[Any, Any]:
        return True, True

    def looks_ahead(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class Causal(Pattern):
    """A token sees the earlier ones and itself: key <= query (GPT; arXiv:1706.03762, section 3.2.3)."""

    def __call__(self, query: Tokens, key: Tokens) -> Tensor:
        return key.position <= query.position

    def band(self) -> Band:
        return None, 0

    def over(self, query: Extent, key: Extent) -> tuple[Any, Any]:
        return key.first <= query.last, key.last <= query.first

    def reach(self, query: Span, key: Span) -> Reach:
        if key[1] - 1 <= query[0]:
            return "all"
        return "causal" if query == key else None


@dataclass(frozen=True, kw_only=True)
class Window(Pattern):
    """A sliding window. `back` counts the query itself: Mistral's W is back=W; Longformer's |i - j| <= w is
    back=w + 1, ahead=w (arXiv:2310.06825, section 2; arXiv:2004.05150, section 3.1). With a `dilation` of n it has as
    many keys, each n after the last: query, query - n, query - 2n, ..."""

    back: int  # keys at query - back + 1 and later
    ahead: int | None = None  # keys up to query + ahead; None: no limit that way
    dilation: int = 1  # Longformer's paper, LongNet

    def check(self) -> None:
        if self.back < 1 or (self.ahead is not None and self.ahead < 0):
            raise LaminaError(f"Window(back={self.back}, ahead={self.ahead}): back must be 1 or more, ahead 0 or more")
        if self.dilation < 1:
            raise LaminaError(f"Window.dilation is {self.dilation}; it must be 1 or more")

    def __call__(self, query: Tokens, key: Tokens) -> Tensor:
        distance = query.position - key.position
        near = distance < self.back * self.dilation
        if self.ahead is not None:
            near = near & (distance >= -self.ahead * self.dilation)
        return near if self.dilation == 1 else near & (distance % self.dilation == 0)

    def band(self) -> Band | None:
        return (self.back - 1, self.ahead) if self.dilation == 1 else None

    def over(self, query: Extent, key: Extent) -> tuple[Any, Any]:
        nearest, farthest = query.first - key.last, query.last - key.first
        behind = self.back * self.dilation
        some, every = nearest < behind, farthest < behind
        if self.ahead is not None:
            before = -self.ahead * self.dilation
            some, every = some & (farthest >= before), every & (nearest >= before)
        if self.dilation == 1:
            return some, every
        meet, same = residues(query, key, self.dilation)
        return some & meet, every & same

    def groups(self, tokens: Tokens, alone: bool = True) -> Tensor | None:
        return tokens.position % self.dilation if alone and self.dilation > 1 else None

    def lasts(self, key: Tokens) -> Tensor | None:
        return key.position + (self.back - 1) * self.dilation

    def looks_ahead(self) -> bool:
        return self.ahead != 0

    def retained(self) -> Retained:
        return Retained((self.back - 1) * self.dilation + 1)


def residues(query: Extent, key: Extent, modulus: int) -> tuple[Any, Any]:
    """Whether two blocks may have positions that are equal modulo `modulus`, and whether all of them are."""
    (a, b), (c, d) = query.residues(modulus), key.residues(modulus)
    return (a <= d) & (c <= b), (a == b) & (c == d) & (a == c)


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
        return _marked(key)

    def over(self, query: Extent, key: Extent) -> tuple[Any, Any]:
        if self.length is not None:
            return key.first < self.length, key.last < self.length
        return key.some_marked, key.all_marked

    def groups(self, tokens: Tokens, alone: bool = True) -> Tensor | None:
        return None if self.length is not None else _unmarked(tokens)

    def lasts(self, key: Tokens) -> Tensor | None:
        return _forever(_marked(key) if self.length is None else key.position < self.length, key)

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

    def over(self, query: Extent, key: Extent) -> tuple[Any, Any]:
        return key.first < self.count, key.last < self.count

    def lasts(self, key: Tokens) -> Tensor | None:
        return _forever(key.position < self.count, key)

    def retained(self) -> Retained:
        return Retained(0, self.count)


@dataclass(frozen=True, kw_only=True)
class Global(Pattern):
    """Global tokens see all and are seen by all: those at `positions`, or the marked ones where there are none given
    (arXiv:2004.05150, section 3.1). Beside a window it is Longformer's: Window(back=w + 1, ahead=w) | Global()."""

    positions: tuple[int, ...] = ()

    def check(self) -> None:
        if any(position < 0 for position in self.positions):
            raise LaminaError(f"Global.positions are {self.positions}; each must be at least 0")

    def __call__(self, query: Tokens, key: Tokens) -> Tensor:
        return self._is(query) | self._is(key)

    def _is(self, tokens: Tokens) -> Tensor:
        if not self.positions:
            return _marked(tokens)
        found = tokens.position == self.positions[0]
        for position in self.positions[1:]:
            found = found | (tokens.position == position)
        return found

    def over(self, query: Extent, key: Extent) -> tuple[Any, Any]:
        if not self.positions:
            return query.some_marked | key.some_marked, query.all_marked | key.all_marked
        some, every = False, False
        for position in self.positions:
            for one in (query, key):
                some = some | one.has(position)
                every = every | ((one.first == position) & (one.last == position))
        return some, every

    def groups(self, tokens: Tokens, alone: bool = True) -> Tensor | None:
        return (~self._is(tokens)).to(torch.int64) if self.positions else _unmarked(tokens)

    def lasts(self, key: Tokens) -> Tensor | None:
        if not self.positions:
            return None  # a later token may be marked, and would see everything
        forever = torch.full_like(key.position, FOREVER)
        return torch.where(self._is(key), forever, max(self.positions))

    def looks_ahead(self) -> bool:
        return True


def _marked(tokens: Tokens) -> Tensor:
    if tokens.marked is None:
        return torch.zeros((), dtype=torch.bool, device=tokens.position.device)
    return tokens.marked


def _unmarked(tokens: Tokens) -> Tensor | None:
    """Groups: the marked tokens first, then the others."""
    return None if tokens.marked is None else (~tokens.marked).to(torch.int64)


def _forever(which: Tensor, key: Tokens) -> Tensor:
    """Forever for those, never for the others."""
    never = torch.full_like(key.position, -1)
    return torch.where(which, torch.full_like(never, FOREVER), never)
