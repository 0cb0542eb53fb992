"""Writes a prepared directory: documents are appended as they come, and the manifest last, so that what was killed is
nothing, and can go on from the last `state`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from lamina.data import manifest as layout
from lamina.data.manifest import KINDS, VALUES, ColumnFiles, Manifest, Shard, SourceFile, Values, dtype_of, file_of
from lamina.data.prepared import sha256, value_file
from lamina.durable import flush, write_file
from lamina.errors import LaminaError

SHARD = 1 << 27  # tokens after which a column goes on in another file
BUFFER = 1 << 20  # tokens kept before they are written

Ids = Sequence[int] | np.ndarray


class Writer:
    """`add` a document at a time, or `extend` it piece by piece and `finish` it; then `close`.

    directory: new, or the one that `state` was taken of. values: "labels" or "scores", if there is one a document.
    Raises LaminaError for ids outside the vocabulary, documents without tokens, and columns that were not declared.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        kind: str = "text",
        vocabulary: int,
        tokenizer: str,
        end: int | None = None,
        values: str | None = None,
        shard_tokens: int = SHARD,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory, self.kind, self.vocabulary = Path(directory), kind, vocabulary
        self.tokenizer, self.end, self.values, self.shard_tokens = tokenizer, end, values, shard_tokens
        self.directory.mkdir(parents=True, exist_ok=True)
        if (self.directory / layout.NAME).exists():
            raise LaminaError(f"{directory}: holds prepared data already; name another directory")
        names = KINDS[kind]
        state = state or {"documents": 0, "shards": [[] for _ in names], "tokens": [0] * len(names), "open": 0}
        self.documents, self.open = state["documents"], state["open"]  # of those, in the shard that is being written
        self.columns = [
            _Column(self.directory, name, vocabulary, [Shard(**each) for each in shards], tokens, self.open)
            for name, shards, tokens in zip(names, state["shards"], state["tokens"], strict=True)
        ]
        self.by_name = {column.name: column for column in self.columns}
        self.value_file: BinaryIO | None = None
        if values is not None:
            self.value_file = _at(self.directory / value_file(values), 4 * self.documents)
        _forget(self.directory, self.columns)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Let go of the files. Without `close` before, there is no data.json, and a state is needed to go on."""
        for column in self.columns:
            for file in column.files:
                file.close()
        if self.value_file is not None:
            self.value_file.close()

    def add(self, document: Mapping[str, Ids], value: float | None = None) -> None:
        """Append a document: the ids of each column, without the end token, which is appended here."""
        for name, ids in document.items():
            self.extend(ids, name)
        self.finish(value)

    def extend(self, ids: Ids, column: str = "") -> None:
        """Append ids to the document that is being written; `column` may be left out where there is one."""
        self.by_name[column or self.columns[0].name].extend(ids)

    def finish(self, value: float | None = None) -> None:
        """The document that is being written is whole. `value`: its label or score."""
        if (value is None) is not (self.value_file is None):
            raise LaminaError(f"document {self.documents:,}: value {value!r}, and values are {self.values!r}")
        for column in self.columns:
            if column.pending == 0:
                raise LaminaError(f"document {self.documents:,}: no token in column {column.name!r}")
        for column in self.columns:
            column.finish(self.end)
        if self.value_file is not None and self.values is not None:
            self.value_file.write(np.array(value, np.dtype(VALUES[self.values]).newbyteorder("<")).tobytes())
        self.documents += 1
        self.open += 1
        # All columns go on together, so that shard i holds the same documents in each.
        if any(column.tokens >= self.shard_tokens for column in self.columns):
            self._roll()

    def cancel(self) -> None:
        """Forget the document that is being written."""
        for column in self.columns:
            column.cancel()

    @property
    def tokens(self) -> list[int]:
        """Of finished documents, a number a column."""
        return [sum(shard.tokens for shard in column.shards) + column.tokens for column in self.columns]

    def state(self) -> dict[str, Any]:
        """Put everything on the disk and say where it stands: with it, a new Writer goes on from here."""
        for column in self.columns:
            column.sync()
        if self.value_file is not None:
            flush(self.value_file)
        fields = ("documents", "tokens", "sha256", "ends_sha256")
        shards = [[{f: getattr(shard, f) for f in fields} for shard in column.shards] for column in self.columns]
        tokens = [column.tokens for column in self.columns]
        return {"documents": self.documents, "shards": shards, "tokens": tokens, "open": self.open}

    def close(
        self, *, labels: Iterable[str] = (), sources: Iterable[SourceFile] = (), notes: Iterable[str] = ()
    ) -> Manifest:
        """Write data.json; only now it is a prepared directory. Raises LaminaError where there is no document."""
        if self.documents == 0:
            raise LaminaError(f"{self.directory}: no document to write")
        self.cancel()
        if self.open:
            self._roll()
        for column in self.columns:
            column.end()
        values = ()
        if self.value_file is not None and self.values is not None:
            flush(self.value_file)
            values = (Values(name=self.values, sha256=sha256(self.directory / value_file(self.values))),)  # pyright: ignore[reportArgumentType]
        manifest = Manifest(
            kind=self.kind,  # pyright: ignore[reportArgumentType]
            vocabulary=self.vocabulary,
            tokenizer=self.tokenizer,
            end=self.end,
            documents=self.documents,
            columns=tuple(
                ColumnFiles(name=column.name, dtype=dtype_of(column.name, self.vocabulary), shards=tuple(column.shards))
                for column in self.columns
            ),
            values=values,
            labels=tuple(labels),
            sources=tuple(sources),
            notes=tuple(notes),
        )
        self.stop()
        write_file(self.directory / layout.NAME, layout.dump(manifest).encode())
        return manifest

    def _roll(self) -> None:
        for column in self.columns:
            column.roll(self.open)
        self.open = 0


class _Column:
    """The shard of a column that is being written."""

    def __init__(
        self, directory: Path, name: str, vocabulary: int, shards: list[Shard], tokens: int, documents: int
    ) -> None:
        self.directory, self.name, self.vocabulary, self.shards = directory, name, vocabulary, shards
        self.dtype = np.dtype(dtype_of(name, vocabulary))
        self.tokens, self.pending = tokens, 0  # of finished documents of this shard; of the one that is being written
        self.parts: list[np.ndarray] = []
        self.buffered = 0
        self.ends: list[int] = []
        self._open(tokens, documents)

    def _open(self, tokens: int, documents: int) -> None:
        here = len(self.shards)
        self.files = (
            _at(self.directory / file_of(self.name, here, "tokens"), tokens * self.dtype.itemsize),
            _at(self.directory / file_of(self.name, here, "ends"), 8 * documents),
        )

    def extend(self, ids: Ids) -> None:
        part = np.asarray(ids, np.int64)
        if part.size:
            self.parts.append(part)
            self.pending += part.size
            self.buffered += part.size
            if self.buffered >= BUFFER:
                self.flush()

    def finish(self, end: int | None) -> None:
        if end is not None and self.dtype != np.int32:
            self.extend([end])
        elif end is not None:
            self.extend([-100])  # of the end token nothing is asked
        self.tokens += self.pending
        self.pending = 0
        self.ends.append(self.tokens)

    def cancel(self) -> None:
        if self.pending:
            self.flush()
            self.files[0].truncate(self.tokens * self.dtype.itemsize)
            self.files[0].seek(0, os.SEEK_END)
            self.pending = 0

    def flush(self) -> None:
        if self.parts:
            ids = np.concatenate(self.parts)
            if self.dtype != np.int32 and not 0 <= ids.min() <= ids.max() < self.vocabulary:
                raise LaminaError(
                    f"{self.directory}: ids {ids.min():,} to {ids.max():,} in column {self.name!r};"
                    f" the vocabulary has {self.vocabulary:,}"
                )
            self.files[0].write(ids.astype(self.dtype.newbyteorder("<")).tobytes())
            self.parts, self.buffered = [], 0
        if self.ends:
            self.files[1].write(np.array(self.ends, "<u8").tobytes())
            self.ends = []

    def sync(self) -> None:
        self.flush()
        for file in self.files:
            flush(file)

    def roll(self, documents: int) -> None:
        """Close the shard and open the next one."""
        self.sync()
        paths = [Path(file.name) for file in self.files]
        for file in self.files:
            file.close()
        hashes = [sha256(path) for path in paths]
        self.shards.append(Shard(documents=documents, tokens=self.tokens, sha256=hashes[0], ends_sha256=hashes[1]))
        self.tokens = 0
        self._open(0, 0)

    def end(self) -> None:
        """Remove the shard that was opened and has nothing in it."""
        for file in self.files:
            file.close()
            if self.tokens == 0:
                Path(file.name).unlink(missing_ok=True)


def _at(path: Path, size: int) -> BinaryIO:
    """A file cut back to `size` bytes, to be gone on with. Raises LaminaError where it has fewer."""
    file = open(path, "r+b" if path.exists() else "x+b")  # noqa: SIM115
    if os.fstat(file.fileno()).st_size < size:
        file.close()
        raise LaminaError(f"{path}: shorter than when its writer stopped; remove {path.parent} and prepare it anew")
    file.truncate(size)
    file.seek(size)
    return file


def _forget(directory: Path, columns: list[_Column]) -> None:
    """Remove shards begun after the state from which a writer goes on."""
    known = {Path(file.name).name for column in columns for file in column.files}
    known |= {file_of(c.name, i, what) for c in columns for i in range(len(c.shards)) for what in ("tokens", "ends")}
    for path in [*directory.glob("*-?????.tokens"), *directory.glob("*-?????.ends")]:
        if path.name not in known:
            path.unlink()
