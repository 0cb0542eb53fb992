"""Patterns by segments of a document: what a memory of earlier segments may be read for.

Segments are counted by position within the document, so neither padding nor how a text is cut into forwards moves them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.patterns.pattern import Extent, Pattern, Predicate, Retained
from lamina.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class SegmentWindow(Pattern):
    """Keys by their place before the query's segment, which begins at start = query - query mod length:
    start - back <= key, and key < start - gap where a gap is given.

    Transformer-XL is Causal() & SegmentWindow(length=L, back=M) (arXiv:1901.02860, section 3.2). With gap=0 the query's
    own segment is left out. A back or gap below 0 counts positions after the segment's start.
    """

    length: int
    back: int  # positions before the segment
    gap: int | None = None  # positions before the segment that are left out, and the segment itself; None: neither

    def check(self) -> None:
        if self.length < 1 or (self.gap is None and self.back < 0):
            raise LaminaError(
                f"SegmentWindow(length={self.length}, back={self.back}): length must be 1 or more, back 0 or more"
            )
        if self.gap is not None and self.gap >= self.back:
            raise LaminaError(f"SegmentWindow.gap is {self.gap}; it must be below back={self.back}, or None")

    def _start(self, position: Any) -> Any:
        return position // self.length * self.length

    def __call__(self, query: Tokens, key: Tokens) -> Tensor:
        start = self._start(query.position)
        seen = key.position >= start - self.back
        return seen if self.gap is None else seen & (key.position < start - self.gap)

    def over(self, query: Extent, key: Extent) -> tuple[Any, Any]:
        first, last = self._start(query.first), self._start(query.last)
        some, every = key.last >= first - self.back, key.first >= last - self.back
        if self.gap is not None:
            some, every = some & (key.first < last - self.gap), every & (key.last < first - self.gap)
        return some, every

    def lasts(self, key: Tokens) -> Tensor | None:
        last = (key.position + self.back) // self.length  # segment
        end = (last + 1) * self.length - 1
        if self.gap is None:
            return end
        return torch.where(last > (key.position + self.gap) // self.length, end, -1)

    def looks_ahead(self) -> bool:
        return self.gap is None or self.gap < 0  # within the query's own segment: decoders combine it with Causal

    def retained(self) -> Retained:
        return Retained(self.back + self.length)


@dataclass(frozen=True, kw_only=True)
class Without(Pattern):
    """Where the first pattern allows it and the second does not."""

    first: Pattern
    second: Pattern

    def __call__(self, query: Tokens, key: Tokens) -> Tensor:
        return self.first(query, key) & ~self.second(query, key)

    def drawn(self, positions: int, device: torch.device) -> Predicate:
        first, second = (one.drawn(positions, device) for one in (self.first, self.second))
        return lambda query, key: first(query, key) & ~second(query, key)

    def over(self, query: Extent, key: Extent) -> tuple[Any, Any]:
        a, b = self.first.over(query, key), self.second.over(query, key)
        return a[0] & (b[1] ^ True), a[1] & (b[0] ^ True)

    def lasts(self, key: Tokens) -> Tensor | None:
        return self.first.lasts(key)

    def looks_ahead(self) -> bool:
        return self.first.looks_ahead()

    def retained(self) -> Retained:
        return self.first.retained()
