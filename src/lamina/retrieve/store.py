"""Where vectors lie and how the nearest are found: the protocol of an engine, and the exact search that all are
measured by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lamina.errors import LaminaError

QUERIES = 512  # queries compared at once
SPARE = 50  # rows that an index gives beyond those asked for, where some are left out
BLOCK = 1 << 15  # rows compared at once: with 512 queries 64 MiB of distances


@dataclass(frozen=True)
class Found:
    """The nearest rows of some queries, nearest first: `rows` (n, count) int64, -1 where there are no more, and
    `distances` (n, count) float32, squared, infinite there."""

    rows: Tensor
    distances: Tensor


@dataclass(frozen=True)
class Batch:
    """Rows to be stored."""

    start: int  # the number of the first
    vectors: Tensor  # (n, width) float32
    tokens: Tensor  # (n, m) int64, -1 where a chunk is shorter
    following: Tensor  # (n, m) int64: the tokens of the next row, all -1 where the document ends
    documents: Tensor  # (n,) int64: which document each is of


class Store(Protocol):
    """Rows of a vector and some tokens, by number."""

    rows: int
    width: int

    def search(self, queries: Tensor, count: int, exclude: Tensor | None = None) -> Found:
        """The nearest of each query (n, width). exclude: (n, spans, 2) int64, rows from the first to before the
        second."""
        ...

    def tokens(self, rows: Tensor) -> Tensor:
        """(n,) int64 -> (n, m) int64, -1 where a chunk is shorter."""
        ...

    def vectors(self, rows: Tensor) -> Tensor:
        """(n,) int64 -> (n, width) float32: all of them in one request, wherever they lie."""
        ...

    def verify(self) -> None:
        """Read everything. Raises CheckpointError naming what is damaged."""
        ...


class Writer(Protocol):
    """A store that is being written: `done` rows are on the disk, and stay there whatever happens."""

    done: int

    def add(self, batch: Batch) -> None:
        """Rows after those that are there."""
        ...

    def commit(self) -> None:
        """Put what was added on the disk: all of it, or, after a kill, nothing."""
        ...

    def close(self) -> None: ...


def nearest(
    blocks: Iterable[tuple[int, Tensor, Tensor]], queries: Tensor, count: int, exclude: Tensor | None = None
) -> Found:
    """Exact search by squared Euclidean distance, |q|^2 - 2 q x + |x|^2.

    blocks: (number of the first row, vectors (r, width), their |x|^2 (r,)). queries: (n, width) float32. Memory: n
    times a block.
    """
    device = queries.device
    best = torch.full((len(queries), count), torch.inf, device=device)
    rows = torch.full((len(queries), count), -1, device=device)
    for start, vectors, squares in blocks:
        distance = torch.addmm(squares[None], queries, vectors.T, alpha=-2)  # without |q|^2, which changes no order
        numbers = torch.arange(start, start + len(vectors), device=device)
        for span in () if exclude is None else exclude.unbind(1):  # one or two
            distance.masked_fill_((numbers >= span[:, :1]) & (numbers < span[:, 1:]), torch.inf)
        found, at = distance.topk(min(count, len(vectors)), dim=1, largest=False)
        best, order = torch.cat([best, found], dim=1).topk(count, dim=1, largest=False)
        rows = torch.cat([rows, at + start], dim=1).gather(1, order)
    rows = rows.masked_fill(best.isinf(), -1)
    return Found(rows, (best + queries.square().sum(1, keepdim=True)).clamp(min=0))


def checked(queries: Tensor, width: int, count: int, exclude: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Queries and what each excludes, `QUERIES` at a time. Raises LaminaError for what cannot be searched for."""
    if queries.dim() != 2 or queries.shape[1] != width:
        raise LaminaError(
            f"queries have shape {tuple(queries.shape)}; the database has vectors of {width}: (n, {width})"
        )
    if type(count) is not int or count < 1:
        raise LaminaError(f"count is {count!r}; it must be a whole number, 1 or more")
    if not bool(queries.isfinite().all()):
        row = int((~queries.isfinite()).any(1).nonzero()[0])
        raise LaminaError(f"query {row} is not finite, so nothing is nearest to it")
    if exclude is not None and (exclude.dim() != 3 or exclude.shape[::2] != (len(queries), 2)):
        raise LaminaError(f"exclude has shape {tuple(exclude.shape)}; expected ({len(queries)}, spans, 2): from, to")
    for start in range(0, len(queries), QUERIES):
        here = slice(start, start + QUERIES)
        yield queries[here].float(), None if exclude is None else exclude[here]


def without(found: Found, exclude: Tensor, count: int) -> Found:
    """The `count` nearest of what was found that are not left out: (n, spans, 2) rows, from to before."""
    rows = found.rows[..., None]
    own = ((rows >= exclude[:, None, :, 0]) & (rows < exclude[:, None, :, 1])).any(2)
    distances, order = found.distances.masked_fill(own, torch.inf).sort(dim=1, stable=True)
    kept, distances = found.rows.gather(1, order)[:, :count], distances[:, :count]
    return Found(kept.masked_fill(distances.isinf(), -1), distances)


def joined(found: Iterable[Found], count: int) -> Found:
    """The same of several batches of queries."""
    parts = list(found)
    if not parts:
        return Found(torch.empty(0, count, dtype=torch.int64), torch.empty(0, count))
    return Found(torch.cat([each.rows for each in parts]), torch.cat([each.distances for each in parts]))
