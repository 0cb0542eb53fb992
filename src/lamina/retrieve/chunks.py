"""Documents in chunks of m tokens (RETRO, arXiv:2112.04426, section 2.1), and what tells documents apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.objectives.stream import Bodies
from lamina.retrieve.manifest import Origin

if TYPE_CHECKING:
    from lamina.data import Prepared


PIECE = 1 << 16  # tokens of a document that are read together


class Documents:
    """The documents of prepared text, without the tokens that end them, and what tells them apart.

    `keys` (documents,) int64: a hash of the tokens, the same for the same text wherever it lies. `files` (documents,)
    int64: the number of the file in `origins` that each came from, -1 where that is not known.
    """

    def __init__(self, prepared: Prepared) -> None:
        if prepared.kind != "text":
            raise LaminaError(f"{prepared.directory}: holds {prepared.kind}; chunks are cut from text")
        self.bodies = Bodies(prepared.column("text"), prepared.end)
        self.sizes = np.diff(self.bodies.begins)
        self.keys = np.array([key_of(self._pieces(i)) for i in range(len(self.sizes))], np.int64)
        sources = prepared.manifest.sources
        self.origins = tuple(Origin(name=s.name, sha256=s.sha256, documents=s.documents) for s in sources)
        counts = [source.documents for source in sources]
        known = np.repeat(np.arange(len(counts)), counts)
        self.files = known if len(known) == len(self.sizes) else np.full(len(self.sizes), -1)

    def __len__(self) -> int:
        return len(self.sizes)

    def _pieces(self, document: int) -> Iterator[np.ndarray]:
        """Its tokens; a document may be larger than memory."""
        begin = int(self.bodies.begins[document])
        end = begin + int(self.sizes[document])
        for at in range(begin, end, PIECE):
            yield self.bodies.slice(at, min(at + PIECE, end))


class Chunks:
    """The chunks of some documents by number: those of the first, then those of the second, ...; the last of a
    document may be shorter. Documents of 5 and 2 tokens make, with m = 2, the chunks AB CD E- FG."""

    def __init__(self, documents: Documents, chosen: np.ndarray, chunk: int) -> None:
        """chosen: numbers of documents, in order."""
        if type(chunk) is not int or chunk < 1:
            raise LaminaError(f"chunk is {chunk!r}; it must be a whole number of tokens, 1 or more")
        self.bodies, self.chunk = documents.bodies, chunk
        self.begins, self.sizes = documents.bodies.begins[:-1][chosen], documents.sizes[chosen]
        self.starts = np.concatenate([[0], np.cumsum(-(-self.sizes // chunk))]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def tokens(self, start: int, stop: int) -> Tensor:
        """(stop - start, chunk) int64, -1 where a chunk is shorter."""
        out = np.full(((stop - start) * self.chunk,), -1, np.int64)
        document = int(np.searchsorted(self.starts, start, side="right")) - 1
        row = start
        while row < stop:
            last = min(int(self.starts[document + 1]), stop)
            first = (row - int(self.starts[document])) * self.chunk
            size = min((last - row) * self.chunk, int(self.sizes[document]) - first)
            begin, at = int(self.begins[document]) + first, (row - start) * self.chunk
            out[at : at + size] = self.bodies.slice(begin, begin + size)
            row, document = max(last, row), document + 1
        return torch.from_numpy(out.reshape(-1, self.chunk))


def once(keys: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
    """int64: the documents that are not the same as one before them, or as one whose key is known, in order."""
    found = np.sort(np.unique(keys, return_index=True)[1])
    return found if known is None else found[~np.isin(keys[found], known)]


def key_of(parts: Iterable[Sequence[int] | np.ndarray]) -> int:
    """A hash of a document's tokens, given in pieces and without the one that ends it."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(np.asarray(part, "<i4").tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)
