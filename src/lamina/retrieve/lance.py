"""The engine for many rows: a LanceDB table with an inverted file over its vectors (extra lamina[retrieval]).

A row holds its number, its document, the vector, the tokens and those that follow, so that a table can be read by
itself. A batch is one version of the table: after a kill it is there whole or not at all. The table lies in the
directory of its generation, or at a uri: another directory, object storage, or what else lancedb connects to.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamina.errors import CheckpointError, LaminaError, UnsupportedError
from lamina.retrieve.manifest import TableSpec
from lamina.retrieve.recall import NEAREST, exactly, fewest, sampled
from lamina.retrieve.store import BLOCK, SPARE, Batch, Found, checked, joined, without

FEWEST = 5000  # rows below which every one is compared
LIST = 200  # rows of a list of the inverted file, about; with more lists its clustering finds less


def _packages() -> tuple[Any, Any]:
    try:
        import lancedb  # pyright: ignore[reportMissingImports]
        import pyarrow  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"engine lance needs the package {error.name}; it is in an extra: pip install 'lamina[retrieval]'"
        ) from None
    return lancedb, pyarrow


@contextmanager
def _guarded(where: str) -> Iterator[None]:
    """What lancedb raises as one line that names the table."""
    _, pyarrow = _packages()
    try:
        yield
    except LaminaError:
        raise
    except (ValueError, RuntimeError, OSError, pyarrow.ArrowException) as error:
        raise CheckpointError(f"{where}: {' '.join(str(error).split())[:200]}") from None


def _schema(width: int, chunk: int) -> Any:
    _, pa = _packages()
    tokens = pa.list_(pa.int32(), chunk)
    fields = {"row": pa.int64(), "document": pa.int64(), "vector": pa.list_(pa.float32(), width)}
    return pa.schema(list((fields | {"tokens": tokens, "next_tokens": tokens}).items()))


class LanceWriter:
    """Rows appended to a table, a version a batch."""

    def __init__(self, uri: str, name: str, width: int, chunk: int, done: int) -> None:
        """done: rows that the journal knows of; the table may have a batch more."""
        lancedb, _ = _packages()
        self.schema, self.where, self.pending = _schema(width, chunk), f"{uri}/{name}", []
        with _guarded(self.where):
            connection = lancedb.connect(uri)
            if name in connection.list_tables().tables:
                self.table = connection.open_table(name)
            else:
                self.table = connection.create_table(name, schema=self.schema)
            self.done = self.table.count_rows()
        if self.done < done or self.table.schema != self.schema:
            raise CheckpointError(f"{self.where}: is not what its writer left; remove it and build anew")

    def add(self, batch: Batch) -> None:
        self.pending.append(batch)

    def commit(self) -> None:
        _, pa = _packages()
        with _guarded(self.where):
            for batch in self.pending:
                size = len(batch.vectors)
                columns = [
                    pa.array(range(batch.start, batch.start + size), pa.int64()),
                    pa.array(batch.documents.numpy()),
                    _lists(batch.vectors.float()),
                    _lists(batch.tokens.int()),
                    _lists(batch.following.int()),
                ]
                self.table.add(pa.table(columns, schema=self.schema))
                self.done += size
        self.pending = []

    def close(self) -> None:
        self.pending = []


def _lists(rows: Tensor) -> Any:
    _, pa = _packages()
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.contiguous().view(-1).numpy()), rows.shape[1])


def indexed(uri: str, at: str, name: str, shape: tuple[int, int, int], report: Callable[[str], None]) -> TableSpec:
    """Pack the table, make its index, and find how many lists have to be looked into.

    uri: what the manifest is to say; at: where the table is now; shape: rows, width, tokens of a row.
    """
    lancedb, _ = _packages()
    rows = shape[0]
    lists = 0 if rows < FEWEST else 1 << round(math.log2(rows / LIST))
    plain = TableSpec(uri=uri, name=name, lists=0, probes=0, recall=1.0)
    with _guarded(f"{at}/{name}"):
        table = lancedb.connect(at).open_table(name)
        report("packing")
        table.optimize(cleanup_older_than=timedelta(milliseconds=1))
        if lists:
            from lancedb.index import IvfFlat  # pyright: ignore[reportMissingImports]

            report("indexing")
            table.create_index("vector", config=IvfFlat(distance_type="l2", num_partitions=lists), replace=True)
    if not lists:
        _durable(at, name)
        return plain
    report("measuring recall")
    exact = Lance(plain, at, shape)
    queries, spans = sampled(exact)
    right = exactly(exact, queries, NEAREST, spans)

    def found(probes: int) -> Found:
        tried = TableSpec(uri=uri, name=name, lists=lists, probes=probes, recall=0.0)
        return Lance(tried, at, shape).search(queries, NEAREST, spans)

    probes, reached = fewest(found, right, lists)
    _durable(at, name)
    return TableSpec(uri=uri, name=name, lists=lists, probes=probes, recall=round(reached, 4))


def _durable(at: str, name: str) -> None:
    """Put the files of a table that lies in a directory on the disk; lancedb leaves that to the system. Where it lies
    in object storage there is no such directory: what was written is there."""
    for folder, _, files in os.walk(Path(at.removeprefix("file://")) / f"{name}.lance"):
        for each in [*(Path(folder) / file for file in files), Path(folder)]:
            handle = os.open(each, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


class Lance:
    """A table that is there, to be searched."""

    def __init__(self, spec: TableSpec, at: str, shape: tuple[int, int, int]) -> None:
        lancedb, _ = _packages()
        self.spec, self.where = spec, f"{at}/{spec.name}"
        self.rows, self.width, self.chunk = shape
        with _guarded(self.where):
            self.table = lancedb.connect(at).open_table(spec.name)
            count = self.table.count_rows()
        if count != self.rows or self.table.schema != _schema(self.width, self.chunk):
            raise CheckpointError(
                f"{self.where}: has {count:,} rows of {', '.join(self.table.schema.names)}; index.json says"
                f" {self.rows:,} of {', '.join(_schema(self.width, self.chunk).names)}, width {self.width}, chunk"
                f" {self.chunk}"
            )

    def search(self, queries: Tensor, count: int, exclude: Tensor | None = None) -> Found:
        parts = (self._search(q, count, spans) for q, spans in checked(queries.cpu(), self.width, count, exclude))
        return joined(parts, count)

    def _search(self, queries: Tensor, count: int, exclude: Tensor | None) -> Found:
        fetch = count if exclude is None else count + SPARE
        rows, distances = self._fetch(queries, fetch)
        if exclude is not None:
            found = without(Found(rows, distances), exclude, count)
            rows, distances = found.rows, found.distances
        for i in (rows < 0).any(1).nonzero()[:, 0].tolist():  # few: most of what was fetched was its own, or missing
            spans = [] if exclude is None else exclude[i].tolist()
            rows[i], distances[i] = self._filtered(queries[i], count, spans)
        return Found(rows, distances)

    def _fetch(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(n, count) rows and distances, -1 and infinite where fewer were found."""
        with _guarded(self.where):
            asked = self.table.search(queries.numpy()).distance_type("l2").limit(count)
            asked = asked.nprobes(self.spec.probes) if self.spec.lists else asked.bypass_vector_index()
            found = asked.select(["row", "_distance"]).to_arrow()
        return self._laid_out(found, len(queries), count)

    def _laid_out(self, found: Any, queries: int, count: int) -> tuple[Tensor, Tensor]:
        numbers = torch.from_numpy(found["row"].to_numpy().copy())
        distances = torch.from_numpy(found["_distance"].to_numpy().copy()).float()
        of = torch.zeros_like(numbers)
        if "query_index" in found.column_names:
            of = torch.from_numpy(found["query_index"].to_numpy().copy()).long()
        order = (of.double() * 1e9 + distances.double().clamp(max=1e8)).argsort(stable=True)
        numbers, distances, of = numbers[order], distances[order], of[order]
        sizes = torch.bincount(of, minlength=queries)
        place = torch.arange(len(of)) - (sizes.cumsum(0) - sizes)[of]
        rows, out = torch.full((queries, count), -1), torch.full((queries, count), torch.inf)
        rows[of, place], out[of, place] = numbers, distances
        return rows, out

    def _filtered(self, query: Tensor, count: int, spans: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Every row that is not left out, compared."""
        kept = " AND ".join(f"(row < {low} OR row >= {high})" for low, high in spans if low < high)
        with _guarded(self.where):
            asked = self.table.search(query.numpy()).distance_type("l2").limit(count).bypass_vector_index()
            asked = asked.where(kept, prefilter=True) if kept else asked
            found = asked.select(["row", "_distance"]).to_arrow()
        rows, distances = self._laid_out(found, 1, count)
        return rows[0], distances[0]

    def tokens(self, rows: Tensor) -> Tensor:
        return self._column("tokens", rows).long()

    def vectors(self, rows: Tensor) -> Tensor:
        return self._column("vector", rows)

    def _column(self, name: str, rows: Tensor) -> Tensor:
        """Of rows by number, in any order, some more than once."""
        width = self.width if name == "vector" else self.chunk
        if not len(rows):
            return torch.empty(0, width, dtype=torch.float32 if name == "vector" else torch.int32)
        each, which = rows.unique(return_inverse=True)
        with _guarded(self.where):
            found = self.table.take_offsets(each.tolist()).select(["row", name]).to_arrow()
            numbers = torch.from_numpy(found["row"].to_numpy().copy())
            values = torch.from_numpy(found[name].combine_chunks().flatten().to_numpy().copy()).reshape(-1, width)
        order = numbers.argsort()
        if not torch.equal(numbers[order], each):
            raise CheckpointError(f"{self.where}: rows are not numbered 0 to {self.rows - 1:,} in order; build it anew")
        return values[order][which]

    def verify(self) -> None:
        for start in range(0, self.rows, BLOCK):
            vectors = self.vectors(torch.arange(start, min(start + BLOCK, self.rows)))
            if not bool(vectors.isfinite().all()):
                row = start + int((~vectors.isfinite()).any(1).nonzero()[0])
                raise CheckpointError(f"{self.where}: the vector of row {row:,} is not finite; build it anew")
