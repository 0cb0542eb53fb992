"""The factorised patterns of the Sparse Transformer (arXiv:1904.10509, section 4.3): strided and fixed.

Strided: each query sees the last l keys, and those that lie a multiple of l before it. Fixed: it sees its own stretch
of l positions, and the last c positions of every stretch, which sum the stretch up. Either kind is two patterns, which
the paper gives to alternate layers or heads, or merges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.patterns.blocks import BlockWindow
from lamina.patterns.near import Causal, Window, residues
from lamina.patterns.pattern import FOREVER, Extent, Pattern
from lamina.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Strided(Pattern):
    """Keys whose distance is a multiple of `stride`: (query - key) mod l = 0."""

    stride: int

    def check(self) -> None:
        if self.stride < 1:
            raise LaminaError(f"Strided.stride is {self.stride}; it must be at least 1")

    def __call__(self, query: Tokens, key: Tokens) -> Tensor:
        return (query.position - key.position) % self.stride == 0

    def over(self, query: Extent, key: Extent) -> tuple[Any, Any]:
        return residues(query, key, self.stride)

    def groups(self, tokens: Tokens, alone: bool = True) -> Tensor | None:
        return tokens.position % self.stride if alone else None

    def looks_ahead(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class Summary(Pattern):
    """The last `count` positions of every stretch of `stride` are seen by all: key mod l >= l - c."""

    stride: int
    count: int

    def check(self) -> None:
        if not 1 <= self.count <= self.stride:
            raise LaminaError(f"Summary(stride={self.stride}, count={self.count}): count must lie within 1 and stride")

    def __call__(self, query: Tokens, key: Tokens) -> Tensor:
        return self._is(key)

    def _is(self, tokens: Tokens) -> Tensor:
        return tokens.position % self.stride >= self.stride - self.count

    def over(self, query: Extent, key: Extent) -> tuple[Any, Any]:
        low, high = key.residues(self.stride)
        return high >= self.stride - self.count, low >= self.stride - self.count

    def groups(self, tokens: Tokens, alone: bool = True) -> Tensor | None:
        return self._is(tokens).to(torch.int64)

    def lasts(self, key: Tokens) -> Tensor | None:
        never = torch.full_like(key.position, -1)
        return torch.where(self._is(key), torch.full_like(never, FOREVER), never)

    def looks_ahead(self) -> bool:
        return True


def strided(stride: int) -> tuple[Pattern, Pattern]:
    """The two causal patterns of strided attention, for alternate layers; `first | second` merges them."""
    return Causal() & Window(back=stride), Causal() & Strided(stride=stride)


def fixed(stride: int, count: int) -> tuple[Pattern, Pattern]:
    """The two causal patterns of fixed attention, for alternate layers; `first | second` merges them."""
    return Causal() & BlockWindow(size=stride, back=1), Causal() & Summary(stride=stride, count=count)
