"""A column of a prepared directory: documents of tokens as one stream across shards, mapped from the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lamina.data.manifest import ColumnFiles, file_of
from lamina.errors import LaminaError


class Column:
    """`column[i]` is document i; `slice` and `starts` read the stream of all documents, one after the other.

    Files are mapped when they are first read, so a Column costs nothing to make, to copy, or to send to a worker.
    """

    def __init__(self, directory: Path, stream: ColumnFiles, vocabulary: int) -> None:
        self.directory, self.stream, self.vocabulary = directory, stream, vocabulary
        self.documents = sum(shard.documents for shard in stream.shards)
        self.tokens = stream.tokens
        # Shard i holds the documents firsts[i] to firsts[i + 1] and the tokens begins[i] to begins[i + 1].
        self.firsts = np.cumsum([0, *(shard.documents for shard in stream.shards)])
        self.begins = np.cumsum([0, *(shard.tokens for shard in stream.shards)])
        self._maps: dict[tuple[int, str], np.ndarray] = {}

    def __repr__(self) -> str:
        return f"Column({self.stream.name!r}, documents={self.documents:,}, tokens={self.tokens:,})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}  # else a copy would hold every token that was mapped

    def __len__(self) -> int:
        return self.documents

    def __getitem__(self, document: int) -> np.ndarray:
        """int64 (tokens,): the tokens of a document. Raises IndexError beyond the last."""
        if not 0 <= document < self.documents:
            raise IndexError(f"document {document}; there are {self.documents:,}")
        shard = int(np.searchsorted(self.firsts, document, side="right")) - 1
        inside = document - int(self.firsts[shard])
        ends = self._map(shard, "ends")
        start = int(ends[inside - 1]) if inside else 0
        return self._read(shard, start, int(ends[inside]))

    def slice(self, start: int, stop: int) -> np.ndarray:
        """int64 (stop - start,): tokens of the stream. Raises IndexError beyond its ends."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop}; there are {self.tokens:,}")
        parts = []
        for shard in self._shards(start, stop):
            base = int(self.begins[shard])
            size = int(self.begins[shard + 1]) - base
            parts.append(self._read(shard, max(start - base, 0), min(stop - base, size)))
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.int64), *parts])

    def starts(self, start: int, stop: int) -> np.ndarray:
        """int64: where documents begin in `slice(start, stop)`, counted from `start`, in order.

        Documents of 3, 2 and 4 tokens: starts(1, 7) is [2, 4], for the slice reads B C | D E | F G.
        """
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop}; there are {self.tokens:,}")
        parts = []
        for shard in self._shards(start, stop):
            base, ends = int(self.begins[shard]), self._map(shard, "ends")
            if start <= base < stop:
                parts.append(np.array([base - start], np.int64))
            # A document begins where the one before it ends; the last end of a shard is the first place of the next.
            low, high = np.searchsorted(ends, np.array([max(start - base, 1), stop - base], np.uint64))
            found = ends[low : min(int(high), len(ends) - 1)].astype(np.int64)
            parts.append(found + (base - start))
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def lengths(self) -> np.ndarray:
        """int64 (documents,): how many tokens each document has."""
        parts = [np.diff(self._map(i, "ends").astype(np.int64), prepend=0) for i in range(len(self.stream.shards))]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _shards(self, start: int, stop: int) -> range:
        if start == stop:
            return range(0)
        first = int(np.searchsorted(self.begins, start, side="right")) - 1
        return range(first, int(np.searchsorted(self.begins, stop, side="left")))

    def _read(self, shard: int, start: int, stop: int) -> np.ndarray:
        found = self._map(shard, "tokens")[start:stop].astype(np.int64)
        # The embedding of an id that is none would be memory that is none, or an error without a name.
        if self.stream.dtype != "int32" and found.size and int(found.max()) >= self.vocabulary:
            at = start + int(found.argmax())
            raise LaminaError(
                f"{self.directory / file_of(self.stream.name, shard, 'tokens')}: token {at:,} is {int(found.max()):,};"
                f" the vocabulary has {self.vocabulary:,}; prepare the data anew"
            )
        return found

    def _map(self, shard: int, what: str) -> np.ndarray:
        if (shard, what) not in self._maps:
            kind = "<u8" if what == "ends" else np.dtype(self.stream.dtype).newbyteorder("<")
            path = self.directory / file_of(self.stream.name, shard, what)
            self._maps[shard, what] = np.memmap(path, kind, mode="r").view(np.ndarray)
        return self._maps[shard, what]
