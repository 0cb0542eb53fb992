"""Documents added to a database and taken out of it: its next generation, of the rows that stay and those that come.

A row is a number in its generation, so rows that stay are copied, and nothing of them is embedded again. As with a
build, readers keep the generation that they opened, and what was killed goes on when it is asked for again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.retrieve.build import BATCH, ChunkContent, Content, Report, grow
from lamina.retrieve.database import Database
from lamina.retrieve.embedding import same
from lamina.retrieve.engines import Engine
from lamina.retrieve.manifest import IndexSpec
from lamina.retrieve.states import StateContent
from lamina.source import load
from lamina.specs import unknown

if TYPE_CHECKING:
    from lamina.data import Prepared

ADDED, REMOVED = "documents added since the build", "documents removed since the build"


class Selected:
    """The rows of some documents of a database, as what another one is made of."""

    def __init__(self, database: Database, chosen: Tensor) -> None:
        """chosen: numbers of documents, in order."""
        spec = database.spec
        files, used = database.files[chosen], database.files[chosen].unique()
        used = used[used >= 0]
        self.store, self.tokenizer = database.store, database.tokenizer
        self.hash = hashlib.sha256(database.hash.encode() + chosen.numpy().tobytes()).hexdigest()
        self.origins = tuple(spec.origins[file] for file in used.tolist())
        self.files = torch.where(files < 0, -1, torch.searchsorted(used, files)).numpy()
        self.keys, self.begins = database.keys[chosen].numpy(), database.starts[chosen].numpy()
        sizes = database.starts[chosen + 1].numpy() - self.begins
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.given = int(self.starts[-1])
        self.chunk, self.embedder, self.notes = spec.chunk, spec.embedder, spec.notes
        self.left = self.cut = 0

    def tokens(self, start: int, stop: int) -> Tensor:
        return self.store.tokens(self._rows(start, stop))

    def vectors(self, start: int, stop: int) -> Tensor:
        return self.store.vectors(self._rows(start, stop)).cpu()

    def _rows(self, start: int, stop: int) -> Tensor:
        """Their numbers in the database."""
        numbers = np.arange(start, stop)
        documents = np.searchsorted(self.starts, numbers, side="right") - 1
        return torch.from_numpy(self.begins[documents] + numbers - self.starts[documents])


class Joined:
    """The rows of a database, then new ones."""

    def __init__(self, first: Selected, second: Content) -> None:
        self.first, self.second = first, second
        self.hash, self.tokenizer, self.embedder = f"{first.hash} {second.hash}", first.tokenizer, first.embedder
        self.origins = (*first.origins, *second.origins)
        self.keys = np.concatenate([first.keys, second.keys])
        later = np.where(second.files < 0, -1, second.files + len(first.origins))
        self.files = np.concatenate([first.files, later])
        self.given, self.chunk = first.given, first.chunk
        self.starts = np.concatenate([first.starts, second.starts[1:] + self.given])
        self.notes, self.left, self.cut = first.notes, second.left, 0

    def tokens(self, start: int, stop: int) -> Tensor:
        return torch.cat([part.tokens(low, high) for part, low, high in self._parts(start, stop)])

    def vectors(self, start: int, stop: int) -> Tensor:
        before = self.second.cut
        found = torch.cat([part.vectors(low, high) for part, low, high in self._parts(start, stop)])
        self.cut += self.second.cut - before
        return found

    def _parts(self, start: int, stop: int) -> Iterator[tuple[Content, int, int]]:
        if start < self.given:
            yield self.first, start, min(stop, self.given)
        if stop > self.given:
            yield self.second, max(start - self.given, 0), stop - self.given


def add(
    database: Database,
    prepared: Prepared,
    *,
    replace: bool = False,
    batch: int = BATCH,
    close: bool = False,
    report: Report = lambda progress: None,
) -> IndexSpec:
    """Write a generation that also has the documents of prepared text; those that are there already are left out.

    They are chunked and embedded as the others were. replace: documents from files of the same names are taken out in
    the same step. close: let go of `database` in time, so that nothing of its generation stays. Where nothing changes,
    nothing is written. Raises LaminaError for text of another tokenizer, another embedder than that of the build, and
    a database that another process has replaced meanwhile.
    """
    database.check_tokenizer(prepared.tokenizer())
    gone = torch.zeros(database.spec.documents, dtype=torch.bool)
    if replace:
        names = {source.name for source in prepared.manifest.sources}
        again = [file for file, origin in enumerate(database.spec.origins) if origin.name in names]
        gone = torch.isin(database.files, torch.tensor(again, dtype=torch.int64))
    kept = Selected(database, (~gone).nonzero()[:, 0])
    new = _content(database, prepared, kept.keys)
    if not len(new.keys) and not bool(gone.any()):
        return database.spec
    kept.notes = (*kept.notes, *_counted(ADDED, len(new.keys)), *_counted(REMOVED, int(gone.sum())))
    return _next(database, Joined(kept, new), batch, close, report)


def remove(
    database: Database,
    documents: Sequence[str],
    *,
    batch: int = BATCH,
    close: bool = False,
    report: Report = lambda progress: None,
) -> IndexSpec:
    """Write a generation without some documents, each said as `lamina index query` does, FILE#NUMBER, or all of FILE.

    close: let go of `database` in time, so that nothing of its generation stays. Raises LaminaError for a document
    that is not there, and where none would be left.
    """
    gone = torch.zeros(database.spec.documents, dtype=torch.bool)
    for name in documents:
        gone[named(database, name)] = True
    if bool(gone.all()):
        raise LaminaError(f"{database.directory}: nothing would be left; remove the directory")
    kept = Selected(database, (~gone).nonzero()[:, 0])
    kept.notes = (*kept.notes, *_counted(REMOVED, int(gone.sum())))
    return _next(database, kept, batch, close, report)


def named(database: Database, name: str) -> Tensor:
    """(n,) int64: the document FILE#NUMBER, or those of FILE."""
    origins = database.spec.origins
    files = [file for file, origin in enumerate(origins) if origin.name == name]
    if files:
        return torch.isin(database.files, torch.tensor(files)).nonzero()[:, 0]
    number = name.rpartition("#")[2]
    if number.isdecimal() and int(number) < database.spec.documents and database.name_of(int(number)) == name:
        return torch.tensor([int(number)])
    raise LaminaError(f"{database.directory}: {unknown('document', name, sorted({each.name for each in origins}))}")


def _content(database: Database, prepared: Prepared, known: np.ndarray) -> Content:
    """The documents that are not known, made into rows as those of the database were."""
    spec = database.spec.embedder
    if spec.pooling != "state":
        return ChunkContent(prepared, database.spec.chunk, database.embedder, known)
    model = load(database.embedder_source, spec.dtype, database.device)
    found = StateContent(prepared, model, database.embedder_source, spec.window, spec.stride, known)
    same(spec, found.embedder)
    return found


def _counted(words: str, count: int) -> list[str]:
    return [f"{words}: {count:,}"] if count else []


def _next(database: Database, content: Content, batch: int, close: bool, report: Report) -> IndexSpec:
    spec = database.spec
    engine = Engine(spec.engine, "" if spec.table is None else spec.table.uri)
    more: dict[str, Any] = {"last": database.close} if close else {}
    return grow(content, database.directory, engine, batch=batch, report=report, base=database.folder, **more)
