"""Patterns by blocks of positions: windows of blocks, tables of blocks, and BigBird's random blocks."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.patterns.near import Causal, Sinks
from lamina.patterns.pattern import Extent, Pattern, Predicate, Retained
from lamina.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class BlockWindow(Pattern):
    """A window of whole blocks of `size` positions: the query's own, the `back` - 1 before it, the `ahead` after it.

    BigBird's is back=2, ahead=1 (arXiv:2007.14062, section 2); back=1 alone is what a token and its block share.
    """

    size: int
    back: int
    ahead: int = 0

    def check(self) -> None:
        if self.size < 1 or self.back < 1 or self.ahead < 0:
            raise LaminaError(
                f"BlockWindow(size={self.size}, back={self.back}, ahead={self.ahead}): size and back must be 1 or more,"
                " ahead 0 or more"
            )

    def __call__(self, query: Tokens, key: Tokens) -> Tensor:
        distance = query.position // self.size - key.position // self.size
        return (distance < self.back) & (distance >= -self.ahead)

    def over(self, query: Extent, key: Extent) -> tuple[Any, Any]:
        nearest = query.first // self.size - key.last // self.size
        farthest = query.last // self.size - key.first // self.size
        some = (nearest < self.back) & (farthest >= -self.ahead)
        return some, (farthest < self.back) & (nearest >= -self.ahead)

    def lasts(self, key: Tokens) -> Tensor | None:
        return (key.position // self.size + self.back) * self.size - 1

    def looks_ahead(self) -> bool:
        return True  # within a block, even where `ahead` is 0: decoders combine it with Causal

    def retained(self) -> Retained:
        return Retained(self.back * self.size)


class _Table(Pattern):
    """Blocks of `size` positions, and which of them see which: `rows` gives the key blocks of each query block."""

    size: int

    def rows(self, count: int) -> tuple[tuple[int, ...], ...]:
        """The key blocks of the first `count` query blocks, or of as many as there are."""
        raise NotImplementedError

    def most(self) -> int | None:
        """Blocks beyond which nothing sees or is seen; None: there are always more."""
        raise NotImplementedError

    def __call__(self, query: Tokens, key: Tokens) -> Tensor:
        i, j = query.position // self.size, key.position // self.size
        return self._drawn(self._count(i, j), i.device)(query, key)

    def drawn(self, positions: int, device: torch.device) -> Predicate:
        last = torch.tensor((positions - 1) // self.size)
        return self._drawn(self._count(last, last), device)

    def _drawn(self, count: int, device: torch.device) -> Predicate:
        seen, size = _table(self, count).to(device), self.size

        def predicate(query: Tokens, key: Tokens) -> Tensor:
            i, j = query.position // size, key.position // size
            inside = (i >= 0) & (j >= 0) & (i < len(seen)) & (j < len(seen))
            return seen[i.clamp(0, len(seen) - 1), j.clamp(0, len(seen) - 1)] & inside

        return predicate

    def over(self, query: Extent, key: Extent) -> tuple[Any, Any]:
        i, j = ((one.first // self.size, one.last // self.size) for one in (query, key))
        count = self._count(*(torch.as_tensor(end) for end in (i[1], j[1])))
        total, size = _totals(self, count), _table(self, count).shape[0]

        def corner(row: Any, column: Any) -> Tensor:
            row, column = (torch.as_tensor(end).clamp(0, size) for end in (row, column))
            return total[row, column]

        found = corner(i[1] + 1, j[1] + 1) - corner(i[0], j[1] + 1) - corner(i[1] + 1, j[0]) + corner(i[0], j[0])
        return found > 0, found == (i[1] - i[0] + 1) * (j[1] - j[0] + 1)

    def _count(self, i: Tensor, j: Tensor) -> int:
        """Blocks that a table needs; a power of two, so that few are made while a text grows."""
        largest = max(int(i.amax()), int(j.amax()), 0) if i.numel() and j.numel() else 0
        return 1 << largest.bit_length()

    def lasts(self, key: Tokens) -> Tensor | None:
        most = self.most()
        if most is None:
            return None
        seen = _table(self, most)
        rows = torch.arange(1, len(seen) + 1)[:, None] * seen
        last = (rows.amax(dim=0) * self.size - 1).to(key.position.device)  # of each key block
        block = key.position // self.size
        inside = (block >= 0) & (block < len(last))
        return torch.where(inside, last[block.clamp(0, len(last) - 1)], -1)

    def looks_ahead(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class BlockTable(_Table):
    """A table of blocks of `size` positions: queries of block i see the key blocks table[i] (arXiv:1904.10509, section
    5.1). Positions beyond the table see nothing."""

    size: int
    table: tuple[tuple[int, ...], ...]

    def check(self) -> None:
        if self.size < 1 or not self.table or any(block < 0 for row in self.table for block in row):
            raise LaminaError("BlockTable needs size >= 1 and a table of rows of block numbers from 0 on")

    def rows(self, count: int) -> tuple[tuple[int, ...], ...]:
        return self.table

    def most(self) -> int:
        return max(len(self.table), 1 + max((block for row in self.table for block in row), default=0))

    def _count(self, i: Tensor, j: Tensor) -> int:
        return self.most()


@dataclass(frozen=True, kw_only=True)
class RandomBlocks(_Table):
    """`count` key blocks for each block of queries, drawn once and for all from `seed`: layers differ by their seed
    (BigBird; arXiv:2007.14062, section 2).

    They are drawn from `blocks` blocks, or, where that is None, from those before the query's own: so a text that is
    being written never changes what was drawn. With `limit` only the first so many blocks draw, and a cache knows which
    keys nobody will draw any more.
    """

    size: int
    count: int
    seed: int = 0
    blocks: int | None = None
    limit: int | None = None

    def check(self) -> None:
        for value in (self.size, self.count, self.blocks, self.limit):
            if value is not None and value < 1:
                raise LaminaError(
                    f"RandomBlocks(size={self.size}, count={self.count}, blocks={self.blocks}, limit={self.limit}):"
                    " each must be 1 or more"
                )

    def most(self) -> int | None:
        ends = [end for end in (self.blocks, self.limit) if end is not None]
        return max(ends, default=None)

    def rows(self, count: int) -> tuple[tuple[int, ...], ...]:
        ends = [end for end in (self.blocks, self.limit) if end is not None]
        return tuple(self._row(i) for i in range(min(ends, default=count)))

    def _row(self, block: int) -> tuple[int, ...]:
        among = block if self.blocks is None else self.blocks
        return tuple(random.Random(f"{self.seed}/{block}").sample(range(among), min(self.count, among)))

    def looks_ahead(self) -> bool:
        return self.blocks is not None


@lru_cache(maxsize=64)
def _table(pattern: _Table, count: int) -> Tensor:
    """(n, n) bool: which key blocks each query block sees, for n >= count blocks where there are as many."""
    rows = pattern.rows(count)
    size = max(count, len(rows), 1 + max((block for row in rows for block in row), default=0))
    seen = torch.zeros(size, size, dtype=torch.bool)
    for i, row in enumerate(rows):
        seen[i, list(row)] = True
    return seen


@lru_cache(maxsize=64)
def _totals(pattern: _Table, count: int) -> Tensor:
    """(n + 1, n + 1): pairs of blocks that are allowed before a row and a column; a rectangle is four of them."""
    counted = _table(pattern, count).to(torch.int64).cumsum(0).cumsum(1)
    return torch.nn.functional.pad(counted, (1, 0, 1, 0))


def bigbird(size: int = 64, random_blocks: int = 3, seed: int = 0, limit: int | None = None) -> Pattern:
    """BigBird for decoders: causal, with a window of two blocks, the first block seen by all, and random earlier ones.

    A block that has passed may still be drawn by a later one, so a cache keeps it; but not where no more than `limit`
    blocks draw and none of those to come does: with 3 random blocks a cache then holds about half of `limit`.
    """
    near = BlockWindow(size=size, back=2) | Sinks(count=size)
    drawn = RandomBlocks(size=size, count=random_blocks, seed=seed, limit=limit) if random_blocks else None
    return Causal() & (near if drawn is None else near | drawn)
