"""The neighbours of every chunk of a training text, found once before it (RETRO, arXiv:2112.04426, section 2.5)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lamina.durable import write_file
from lamina.errors import CheckpointError, LaminaError
from lamina.machine import give_back
from lamina.retrieve.build import Progress, said
from lamina.retrieve.chunks import Chunks, Documents
from lamina.retrieve.database import Database
from lamina.retrieve.flat import Growing, mapped
from lamina.specs import Spec
from lamina.weights.files import read_json

if TYPE_CHECKING:
    from lamina.data import Prepared

NAME, JOURNAL = "neighbours.json", "journal.json"
BATCH = 1024  # chunks that are looked for together and put on the disk


@dataclass(frozen=True, kw_only=True)
class NeighboursSpec(Spec):
    """Which neighbours of which text."""

    chunks: int
    count: int  # of each chunk
    chunk: int  # tokens
    text: str  # hash of the prepared text
    database: str  # hash of its manifest: rows are numbers in this generation alone


class Neighbours:
    """`rows` (chunks, count) int64: row numbers in a database, nearest first, -1 for none, for each chunk of prepared
    text: those of document 0, then those of document 1, ...; document i has the chunks `starts[i]` to `starts[i + 1]`.

    Chunk u of a document is its tokens [u m, (u + 1) m). One that the document ends in is not looked for: no token
    comes after it that could read what was found.
    """

    def __init__(self, directory: Path, spec: NeighboursSpec, starts: np.ndarray, database: Database) -> None:
        self.directory, self.spec, self.database = directory, spec, database
        self.starts = torch.from_numpy(starts)
        self.rows = mapped(directory, "rows", torch.int64, (spec.chunks, spec.count))

    def values(self, chunks: Tensor) -> Tensor:
        """Chunks (...) int64 by number, -1 for none -> (..., count, 2 m) int64: neighbours and what continues them."""
        rows = self.rows[chunks.clamp(min=0)].masked_fill((chunks < 0)[..., None], -1)
        if rows.numel() and not -1 <= int(rows.min()) <= int(rows.max()) < len(self.database):
            raise CheckpointError(
                f"{self.directory}: rows {int(rows.min()):,} to {int(rows.max()):,}; the database has"
                f" {len(self.database):,}: damaged, find the neighbours anew"
            )
        return self.database.values(rows)


def find_neighbours(
    database: Database,
    prepared: Prepared,
    directory: str | os.PathLike[str],
    *,
    count: int = 2,
    batch: int = BATCH,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Neighbours:
    """Find `count` neighbours of every whole chunk of prepared text and write them to `directory`.

    What is of the same document is left out: what continues it would be read in front of itself (`Database.own`).
    After a kill the same call goes on after the last whole batch. Raises LaminaError where the text has another
    tokenizer than the database, and where the directory holds neighbours already.
    """
    directory, spec, documents = Path(directory), database.spec, Documents(prepared)
    database.check_tokenizer(prepared.tokenizer())
    chunks = Chunks(documents, np.arange(len(documents)), spec.chunk)
    if (directory / NAME).exists():
        raise LaminaError(f"{directory}: holds neighbours already; name another directory")
    directory.mkdir(parents=True, exist_ok=True)
    said_of = NeighboursSpec(
        chunks=len(chunks), count=count, chunk=spec.chunk, text=prepared.hash, database=database.hash
    )
    own = own_of(database, prepared, documents)
    key = said_of.to_json()
    journal = read_json(directory / JOURNAL) if (directory / JOURNAL).is_file() else {}
    done = journal["done"] if journal.get("key") == key else 0
    file = Growing(directory, "rows", torch.int64, (len(chunks), count), done)
    try:
        for start in range(begun := done, len(chunks), batch):
            report(Progress("searching", start, len(chunks), begun))
            stop = min(start + batch, len(chunks))
            file.append(_found(database, chunks, own, start, stop, count))
            file.sync()
            write_file(directory / JOURNAL, json.dumps({"key": key, "done": stop}).encode())
            give_back()
    finally:
        file.close()
    write_file(directory / NAME, key.encode())
    (directory / JOURNAL).unlink(missing_ok=True)
    return Neighbours(directory, said_of, chunks.starts, database)


def open_neighbours(directory: str | os.PathLike[str], database: Database, prepared: Prepared) -> Neighbours:
    """What `find_neighbours` wrote. Raises LaminaError where it is of another database or another text."""
    directory = Path(directory)
    if not (directory / NAME).is_file():
        raise LaminaError(
            f"{directory}: no {NAME}, so there are no neighbours here; find them with: lamina index neighbours"
        )
    spec = _read(directory)
    for name, known, given in (
        ("database", spec.database, database.hash),
        ("text", spec.text, prepared.hash),
    ):
        if known != given:
            raise LaminaError(
                f"{directory}: neighbours of another {name} (SHA-256 {known[:12]}...) than this one ({given[:12]}...);"
                " find them anew"
            )
    documents = Documents(prepared)
    starts = Chunks(documents, np.arange(len(documents)), spec.chunk).starts
    if int(starts[-1]) != spec.chunks:
        raise CheckpointError(f"{directory / NAME}: chunks is {spec.chunks:,}; the text has {int(starts[-1]):,}")
    return Neighbours(directory, spec, starts, database)


def of_text(directories: Sequence[str | os.PathLike[str]], database: Database, prepared: Prepared) -> Neighbours:
    """The neighbours of this text, in one of several directories. Raises LaminaError where none of them is of it."""
    for directory in map(Path, directories):
        if (directory / NAME).is_file() and _read(directory).text != prepared.hash:
            continue
        return open_neighbours(directory, database, prepared)
    raise LaminaError(
        f"{prepared.directory}: its neighbours are not in {', '.join(map(str, directories))}; find them with:"
        f" lamina index neighbours {database.directory} {prepared.directory} -o DIRECTORY"
    )


def _read(directory: Path) -> NeighboursSpec:
    return NeighboursSpec.from_json((directory / NAME).read_text(encoding="utf-8"))


def own_of(database: Database, prepared: Prepared, documents: Documents) -> Tensor:
    """(documents, 2, 2): the documents of the database that are the same as each of the text, as `Database.own`."""
    sources = prepared.manifest.sources
    hashes = [sources[file].sha256 if file >= 0 else "" for file in documents.files]
    whole = torch.tensor([file >= 0 and sources[file].documents == 1 for file in documents.files])
    return database.own(torch.from_numpy(documents.keys), hashes, whole)


def _found(database: Database, chunks: Chunks, own: Tensor, start: int, stop: int, count: int) -> Tensor:
    """(stop - start, count) rows."""
    tokens = chunks.tokens(start, stop)
    whole = (tokens >= 0).all(1)
    rows = torch.full((stop - start, count), -1)
    if bool(whole.any()):
        numbers, starts = torch.arange(start, stop)[whole], torch.from_numpy(chunks.starts)
        of = torch.searchsorted(starts, numbers, right=True) - 1
        same, after = own[of, 0].unbind(1)
        known = same < after  # the same document, token by token, is in the database, and the vectors of its chunks
        vectors = torch.empty(len(numbers), database.store.width)
        if bool(known.any()):
            vectors[known] = database.store.vectors((database.starts[same] + numbers - starts[of])[known]).cpu()
        if not bool(known.all()):
            vectors[~known] = database.embedder(said(database.tokenizer, tokens[whole][~known])).cpu()
        rows[whole] = database.search(vectors, count, own[of]).rows
    return rows
