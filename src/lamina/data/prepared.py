"""A prepared directory, opened: its columns, labels and scores, checked against what data.json says of them."""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lamina.data import manifest as layout
from lamina.data.column import Column
from lamina.data.manifest import VALUES, Manifest, file_of
from lamina.errors import LaminaError

if TYPE_CHECKING:
    from lamina.text import Tokenizer

BLOCK = 1 << 22  # numbers looked at together


class Prepared:
    """What `open_prepared` gives. `columns` by name; `labels` and `scores` (documents,), or None."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        self.kind, self.vocabulary, self.end = manifest.kind, manifest.vocabulary, manifest.end
        self.tokenizer_hash, self.label_names = manifest.tokenizer, manifest.labels
        self.documents = manifest.documents
        self.columns = {each.name: Column(directory, each, manifest.vocabulary) for each in manifest.columns}

    def __repr__(self) -> str:
        return f"Prepared({str(self.directory)!r}, {self.kind}, documents={self.documents:,}, tokens={self.tokens:,})"

    @property
    def tokens(self) -> int:
        """Of all columns that hold tokens."""
        return sum(column.tokens for column in self.columns.values() if column.stream.dtype != "int32")

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the content: equal for equal data, wherever it lies."""
        return layout.hash_of(self.manifest)

    @cached_property
    def labels(self) -> np.ndarray | None:
        """int32 (documents,): numbers of `label_names`."""
        return self._values("labels")

    @cached_property
    def scores(self) -> np.ndarray | None:
        """float32 (documents,): how alike the two texts of a pair are."""
        return self._values("scores")

    def column(self, name: str) -> Column:
        """A column by name. Raises LaminaError naming those that there are."""
        if name not in self.columns:
            raise LaminaError(f"{self.directory}: no column {name!r}; {self.kind} has {', '.join(self.columns)}")
        return self.columns[name]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that lies beside the data. Raises LaminaError if it is not the one that made the ids."""
        from lamina.text import from_directory

        found = from_directory(self.directory)
        self.check_tokenizer(found)
        return found

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise LaminaError unless the ids are this tokenizer's: to another they are other words."""
        if tokenizer.hash != self.tokenizer_hash:
            raise LaminaError(
                f"{self.directory}: prepared with another tokenizer (SHA-256 {self.tokenizer_hash[:12]}...) than"
                f" {tokenizer.name} ({tokenizer.hash[:12]}...); prepare the data anew with --tokenizer, or use"
                f" {self.directory}"
            )

    def changed(self, contents: bool = True) -> list[str]:
        """A line for each source file that is still there and is not as it was. `contents`: read them all for that."""
        lines = []
        for source in self.manifest.sources:
            path = Path(source.name)
            if not path.is_file():
                continue
            size = path.stat().st_size
            if size != source.bytes:
                lines.append(f"{path}: {size:,} bytes now, {source.bytes:,} when {self.directory} was prepared")
            elif contents and sha256(path) != source.sha256:
                lines.append(f"{path}: another content now than when {self.directory} was prepared")
        return lines

    def _values(self, name: str) -> np.ndarray | None:
        if name not in (each.name for each in self.manifest.values):
            return None
        return np.fromfile(self.directory / value_file(name), np.dtype(VALUES[name]).newbyteorder("<"))


def open_prepared(directory: str | os.PathLike[str], verify: bool = False) -> Prepared:
    """Open a prepared directory: `lamina data prepare` makes them.

    Sizes are always checked. verify: also the SHA-256 of every file, that ids are in the vocabulary, that documents end
    one after the other, and the tokenizer beside. Raises LaminaError naming the file, what was found and what is right.
    """
    path = Path(directory)
    prepared = Prepared(path, layout.load(path))
    for name, size, _ in _files(prepared.manifest):
        _check_size(path / name, size)
    for name, column in prepared.columns.items():
        for i, shard in enumerate(column.stream.shards):
            last = int(column._map(i, "ends")[-1])
            if last != shard.tokens:
                raise LaminaError(
                    f"{path / file_of(name, i, 'ends')}: ends at {last:,}; there are {shard.tokens:,} tokens"
                )
    if verify:
        _verify(prepared)
    return prepared


def value_file(name: str) -> str:
    return f"{name}.{VALUES[name]}"


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(manifest: Manifest) -> list[tuple[str, int, str]]:
    """(name, bytes, SHA-256) of every file that data.json states."""
    files = []
    for column in manifest.columns:
        for i, shard in enumerate(column.shards):
            size = shard.tokens * np.dtype(column.dtype).itemsize
            files.append((file_of(column.name, i, "tokens"), size, shard.sha256))
            files.append((file_of(column.name, i, "ends"), 8 * shard.documents, shard.ends_sha256))
    return [*files, *((value_file(each.name), 4 * manifest.documents, each.sha256) for each in manifest.values)]


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise LaminaError(f"{path}: {error.strerror}; {layout.NAME} says that it has {expected:,} bytes") from None
    if size != expected:
        what = "truncated" if size < expected else "too long"
        raise LaminaError(f"{path}: {size:,} bytes, {layout.NAME} says {expected:,}: {what}; prepare the data anew")


def _verify(prepared: Prepared) -> None:
    for name, _, expected in _files(prepared.manifest):
        found = sha256(prepared.directory / name)
        if found != expected:
            raise LaminaError(f"{prepared.directory / name}: SHA-256 {found}; {layout.NAME} says {expected}: damaged")
    for name, column in prepared.columns.items():
        for start in range(0, column.tokens, BLOCK):
            column.slice(start, min(start + BLOCK, column.tokens))
        for i in range(len(column.stream.shards)):
            ends = column._map(i, "ends")
            if int(ends[0]) == 0 or (ends[1:] <= ends[:-1]).any():
                raise LaminaError(f"{prepared.directory / file_of(name, i, 'ends')}: a document ends where it begins")
    labels = prepared.labels
    if labels is not None and labels.size and not 0 <= labels.min() <= labels.max() < len(prepared.label_names):
        raise LaminaError(
            f"{prepared.directory / value_file('labels')}: labels {labels.min()} to {labels.max()};"
            f" there are {len(prepared.label_names)} names"
        )
    prepared.tokenizer()
