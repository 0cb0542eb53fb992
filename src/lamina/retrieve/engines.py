"""The engines by name: what writes rows, what finishes them, and what searches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lamina.errors import LaminaError
from lamina.retrieve.exact import Exact, ExactWriter
from lamina.retrieve.manifest import IndexSpec, TableSpec
from lamina.retrieve.store import Store, Writer

ENGINES = ("exact", "lance")


@dataclass(frozen=True)
class Engine:
    """Which engine, and where it keeps its rows if not in the directory of the database."""

    kind: Literal["exact", "lance"] = "exact"
    uri: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ENGINES:
            raise LaminaError(f"engine is {self.kind!r}; it must be exact or lance")
        if self.uri and self.kind == "exact":
            raise LaminaError(f"uri {self.uri!r}: the engine exact keeps its rows in the directory; use engine lance")


def writer(engine: Engine, work: Path, name: str, shape: tuple[int, int, int], done: int) -> Writer:
    """name: of the table of engine lance. shape: rows, width, tokens of a row. done: rows that the journal knows of."""
    rows, width, chunk = shape
    if engine.kind == "exact":
        return ExactWriter(work, rows, width, chunk, done)
    from lamina.retrieve.lance import LanceWriter

    return LanceWriter(engine.uri or str(work), name, width, chunk, done)


def finish(
    engine: Engine, work: Path, name: str, shape: tuple[int, int, int], report: Callable[[str], None]
) -> TableSpec | None:
    """What is done when all rows are there: the index of the engine lance, and its recall."""
    if engine.kind == "exact":
        return None
    from lamina.retrieve.lance import indexed

    return indexed(engine.uri, engine.uri or str(work), name, shape, report)


def opened(folder: Path, spec: IndexSpec, device: torch.device | str) -> Store:
    """The rows of a generation, to be searched."""
    shape = spec.rows, spec.width, spec.chunk
    if spec.table is None:
        return Exact(folder, *shape, device)
    from lamina.retrieve.lance import Lance

    return Lance(spec.table, spec.table.uri or str(folder), shape)
