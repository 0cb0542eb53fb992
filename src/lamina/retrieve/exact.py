"""The engine of the core: vectors in a mapped file, and every one of them compared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lamina.errors import CheckpointError
from lamina.retrieve.flat import Growing, mapped
from lamina.retrieve.store import BLOCK, Batch, Found, checked, joined, nearest

FILES = ("vectors", "squares", "tokens")
TOO_MANY = 500_000
"""Rows beyond which the engine lance is advised: exact search reads all of them for each batch of queries."""


class ExactWriter:
    """Rows appended to three files. `done`: rows to go on after."""

    def __init__(self, directory: Path, rows: int, width: int, chunk: int, done: int = 0) -> None:
        self.done, self.added = done, done
        self.files = (
            Growing(directory, "vectors", torch.float32, (rows, width), done),
            Growing(directory, "squares", torch.float32, (rows,), done),
            Growing(directory, "tokens", torch.int32, (rows, chunk), done),
        )

    def add(self, batch: Batch) -> None:
        parts = batch.vectors, batch.vectors.square().sum(1), batch.tokens
        for file, part in zip(self.files, parts, strict=True):
            file.append(part)
        self.added += len(batch.vectors)

    def commit(self) -> None:
        for file in self.files:
            file.sync()
        self.done = self.added

    def close(self) -> None:
        for file in self.files:
            file.close()


class Exact:
    """The whole store, mapped; on another device than the CPU it is copied there."""

    def __init__(
        self,
        directory: Path,
        rows: int,
        width: int,
        chunk: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.directory, self.rows, self.width = directory, rows, width
        self.stored = mapped(directory, "vectors", torch.float32, (rows, width)).to(device)
        squares = mapped(directory, "squares", torch.float32, (rows,))
        self._tokens = mapped(directory, "tokens", torch.int32, (rows, chunk))
        if not bool(squares.isfinite().all()):
            self._refuse(int((~squares.isfinite()).nonzero()[0]))
        self.squares = squares.to(device)
        self._sound: set[int] = set()  # blocks whose vectors were looked at

    def search(self, queries: Tensor, count: int, exclude: Tensor | None = None) -> Found:
        device, home = self.stored.device, queries.device
        moved = queries.to(device), None if exclude is None else exclude.to(device)
        parts = (nearest(self._blocks(), q, count, e) for q, e in checked(moved[0], self.width, count, moved[1]))
        found = joined(parts, count)
        return Found(found.rows.to(home), found.distances.to(home))

    def tokens(self, rows: Tensor) -> Tensor:
        return self._tokens[rows].to(torch.int64)

    def vectors(self, rows: Tensor) -> Tensor:
        return self.stored[rows.to(self.stored.device)]

    def verify(self) -> None:
        for start, vectors, squares in self._blocks():
            wrong = (vectors.square().sum(1) - squares).abs() > 1e-3 * squares.abs() + 1e-6
            if bool(wrong.any()):
                row = start + int(wrong.nonzero()[0])
                raise CheckpointError(
                    f"{self.directory / 'squares.safetensors'}: row {row:,} is not the length of its vector: damaged"
                )

    def _blocks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        for start in range(0, self.rows, BLOCK):
            vectors = self.stored[start : start + BLOCK]
            if start not in self._sound:  # NaN is never nearest, so it would be missed in silence
                if not bool(vectors.isfinite().all()):
                    self._refuse(start + int((~vectors.isfinite()).any(1).nonzero()[0]))
                self._sound.add(start)
            yield start, vectors, self.squares[start : start + BLOCK]

    def _refuse(self, row: int) -> None:
        raise CheckpointError(
            f"{self.directory / 'vectors.safetensors'}: the vector of row {row:,} is not finite; build it anew"
        )
