"""index.json: what a generation of a database holds, with the size and SHA-256 of each of its files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lamina.durable import write_file
from lamina.errors import CheckpointError, LaminaError
from lamina.retrieve.embedding import EmbedderSpec
from lamina.specs import Spec
from lamina.weights.files import read_json

NAME = "index.json"
FORMAT = 1
"""Number of the layout of a database. One with a larger number was written by a newer lamina."""
LONG = 1 << 28  # bytes of a manifest; one of a million source files has 200 million


@dataclass(frozen=True, kw_only=True)
class Origin(Spec):
    """A file that documents came from."""

    name: str
    sha256: str
    documents: int  # of it, in the prepared text


@dataclass(frozen=True, kw_only=True)
class StoredFile(Spec):
    """A file of the generation."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class TableSpec(Spec):
    """Where the engine lance keeps the rows, and how its index is searched."""

    uri: str  # "": in the generation's own directory; else a directory, s3://..., or what else lancedb connects to
    name: str
    lists: int  # of the inverted file; 0: no index, every row is compared
    probes: int  # lists that a query looks into
    recall: float  # of the 10 nearest, as measured at the build


@dataclass(frozen=True, kw_only=True)
class IndexSpec(Spec):
    """A database, as it says itself."""

    chunk: int  # tokens of a row; 1: rows are single tokens after a state, for kNN-LM
    rows: int
    width: int  # of a vector
    documents: int
    vocabulary: int  # ids are below it
    tokenizer: str  # SHA-256 of the tokenizer, as Tokenizer.hash gives it
    embedder: EmbedderSpec
    engine: Literal["exact", "lance"]
    origins: tuple[Origin, ...] = ()
    files: tuple[StoredFile, ...] = ()
    table: TableSpec | None = None  # of the engine lance
    notes: tuple[str, ...] = ()  # what was cut, left out or met twice, in words

    def check(self) -> None:
        if min(self.chunk, self.rows, self.width, self.documents, self.vocabulary) < 1:
            raise LaminaError(
                f"chunk={self.chunk}, rows={self.rows}, width={self.width}, documents={self.documents},"
                f" vocabulary={self.vocabulary}; each must be 1 or more"
            )
        if (self.engine == "lance") is not (self.table is not None):
            raise LaminaError(f"engine is {self.engine}, and table is {self.table}; lance alone has a table")
        for file in self.files:
            if not file.name or "\0" in file.name or any(p in ("", ".", "..") for p in file.name.split("/")):
                raise LaminaError(f"files: {file.name!r}; only files below the generation's directory may be listed")


def hash_of(spec: IndexSpec) -> str:
    """SHA-256 of a generation's manifest: rows are numbers in it alone."""
    return hashlib.sha256(spec.to_json().encode()).hexdigest()


def write(folder: Path, spec: IndexSpec) -> None:
    """The last file of a generation."""
    said = {"format": FORMAT, **spec.to_dict()}
    text = json.dumps(said, indent=1, ensure_ascii=False)
    write_file(folder / NAME, (text + "\n").encode())


def load(folder: Path) -> IndexSpec:
    """Read it strictly. Raises CheckpointError naming the file and the field, or a file whose size differs."""
    path = folder / NAME
    data: dict[str, Any] = read_json(path, LONG)
    number = data.pop("format", None)
    if type(number) is not int or not 1 <= number <= FORMAT:
        raise CheckpointError(f"{path}: format {number!r}; this lamina reads formats 1 to {FORMAT}")
    try:
        spec = IndexSpec.from_dict(data, where=str(path))
    except LaminaError as error:
        raise CheckpointError(str(error)) from None
    for file in spec.files:
        found = (folder / file.name).stat().st_size if (folder / file.name).is_file() else None
        if found != file.bytes:
            what = "is missing" if found is None else f"has {found:,} bytes"
            raise CheckpointError(f"{folder / file.name}: {what}, and {NAME} says {file.bytes:,}; build it anew")
    return spec


def stored(folder: Path, names: list[str]) -> tuple[StoredFile, ...]:
    """Sizes and hashes of files that are whole."""
    return tuple(
        StoredFile(name=name, bytes=(folder / name).stat().st_size, sha256=sha256(folder / name)) for name in names
    )


def verify(folder: Path, spec: IndexSpec) -> None:
    """Raises CheckpointError for a file whose hash differs."""
    for file in spec.files:
        if (found := sha256(folder / file.name)) != file.sha256:
            raise CheckpointError(
                f"{folder / file.name}: SHA-256 {found[:12]}...; {NAME} says {file.sha256[:12]}...: damaged"
            )


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
