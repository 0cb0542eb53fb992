"""Retrieving while writing: whenever a row ends a chunk, its neighbours are looked up before the token that ended it is
read, for that token is the first to read them (RETRO, arXiv:2112.04426, section 2.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.errors import LaminaError, UnsupportedError
from lamina.model import Model


class Retriever(Protocol):
    """What finds neighbours: a database, or anything else."""

    def neighbours(self, chunks: Tensor, *, count: int) -> Tensor:
        """Chunks (n, m) of the model's ids -> ids (n, count, r), the nearest first; -1 where there is no token."""
        ...


@dataclass(frozen=True)
class Retrieval:
    """Who is asked, and for how many neighbours of each chunk."""

    retriever: Retriever
    count: int = 2

    def __post_init__(self) -> None:
        if type(self.count) is not int or self.count < 1:
            raise LaminaError(f"neighbours is {self.count!r}; it must be a whole number of at least 1")

    def begin(self, model: Model) -> Retrieved:
        """For one text a row. Raises UnsupportedError for a model that does not retrieve."""
        said = model.spec.retrieval
        if said is None:
            raise UnsupportedError("retriever is for models that retrieve; this one has no ChunkedCrossAttentionSpec")
        return Retrieved(self, said.chunk)


class Retrieved:
    """What the rows have read so far, and what was found for their chunks."""

    def __init__(self, retrieval: Retrieval, chunk: int) -> None:
        self.retrieval, self.chunk = retrieval, chunk
        self.ids: Tensor | None = None  # (B, L), padding on the left alone
        self.count: Tensor | None = None  # (B,) tokens of each row
        self.all: Tensor | None = None  # (B, chunks, k, r)

    def read(self, ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """Take note of new tokens (B, T), padded on the left where the text begins. Returns the neighbours of the
        chunks that end in them, (B, N, k, r); None where none does. All rows are asked about at once."""
        new = ids.new_full(ids.shape[:1], ids.shape[1]) if mask is None else mask.to(torch.int64).sum(dim=1)
        before = torch.zeros_like(new) if self.count is None else self.count
        self.ids = ids if self.ids is None else torch.cat([self.ids, ids], dim=1)
        self.count = before + new
        m = self.chunk
        first, last = before // m, self.count // m
        most = int((last - first).max())
        if most == 0:
            return None
        serial = torch.arange(most, device=ids.device).expand(len(new), -1)
        row, which = (serial < (last - first)[:, None]).nonzero().unbind(dim=1)
        number = first[row] + which
        begin = self.ids.shape[1] - self.count[row] + number * m
        found = self._ask(self.ids[row[:, None], begin[:, None] + torch.arange(m, device=ids.device)])
        out = found.new_full((len(new), most, *found.shape[1:]), -1)
        out[row, which] = found
        self._keep(row, number, found)
        return out

    def reorder(self, index: Tensor) -> None:
        """Go on with the rows `index`."""
        if self.ids is not None and self.count is not None:
            self.ids, self.count = self.ids[index], self.count[index]
        self.all = None if self.all is None else self.all[index]

    def _ask(self, chunks: Tensor) -> Tensor:
        """(n, m) -> (n, k, r)."""
        found = self.retrieval.retriever.neighbours(chunks, count=self.retrieval.count)
        expected = (len(chunks), self.retrieval.count)
        if found.dim() != 3 or tuple(found.shape[:2]) != expected or found.is_floating_point():
            raise LaminaError(
                f"the retriever gave {found.dtype} {tuple(found.shape)}; expected ids (chunks={expected[0]},"
                f" neighbours={expected[1]}, tokens)"
            )
        if self.all is not None and self.all.shape[3] != found.shape[2]:
            raise LaminaError(
                f"the retriever gave neighbours of {found.shape[2]} tokens, and of {self.all.shape[3]} before"
            )
        return found.to(device=chunks.device, dtype=torch.int64)

    def _keep(self, row: Tensor, number: Tensor, found: Tensor) -> None:
        """For readers without a cache, which read everything anew."""
        assert self.count is not None
        if self.all is None:
            self.all = found.new_full((len(self.count), 0, *found.shape[1:]), -1)
        more = int(number.max()) + 1 - self.all.shape[1]
        self.all = F.pad(self.all, (0, 0, 0, 0, 0, max(more, 0)), value=-1)
        self.all[row, number] = found
