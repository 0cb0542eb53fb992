"""A database in another engine, or elsewhere, without embedding anything again."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lamina.retrieve.build import BATCH, Report, check_free, grow
from lamina.retrieve.database import Database
from lamina.retrieve.editing import Selected
from lamina.retrieve.engines import Engine
from lamina.retrieve.manifest import IndexSpec


def copy(
    database: Database,
    directory: str | os.PathLike[str],
    engine: Engine,
    *,
    force: bool = False,
    report: Report = lambda progress: None,
) -> IndexSpec:
    """Make `directory` a database of the same rows with another engine. It goes on after a kill as `build` does."""
    directory = Path(directory)
    check_free(directory, force)
    content = Selected(database, torch.arange(database.spec.documents))
    return grow(content, directory, engine, batch=BATCH, report=report)
