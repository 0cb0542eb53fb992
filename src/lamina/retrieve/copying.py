"""A database in another engine, or elsewhere, without embedding anything again."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from lamina.retrieve.build import Report, check_free, grow
from lamina.retrieve.database import Database
from lamina.retrieve.engines import Engine
from lamina.retrieve.manifest import IndexSpec

BATCH = 8192  # rows that are put on the disk together


class Copied:
    """The rows of a database as what another is made of."""

    def __init__(self, database: Database) -> None:
        spec = database.spec
        self.database, self.store = database, database.store
        self.hash, self.tokenizer, self.origins = f"copy of {database.hash}", database.tokenizer, spec.origins
        self.keys, self.files, self.starts = (each.numpy() for each in (database.keys, database.files, database.starts))
        self.chunk, self.embedder, self.left, self.cut = spec.chunk, spec.embedder, 0, 0

    def tokens(self, start: int, stop: int) -> Tensor:
        return self.store.tokens(torch.arange(start, stop))

    def vectors(self, start: int, stop: int) -> Tensor:
        return self.store.vectors(start, stop).cpu()


def copy(
    database: Database,
    directory: str | os.PathLike[str],
    engine: Engine,
    *,
    batch: int = BATCH,
    force: bool = False,
    report: Report = lambda progress: None,
) -> IndexSpec:
    """Make `directory` a database of the same rows with another engine. It goes on after a kill as `build` does."""
    directory = Path(directory)
    check_free(directory, force)
    return grow(Copied(database), directory, engine, batch=batch, report=report)
