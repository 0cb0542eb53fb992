"""A database from prepared text: rows in batches, each on the disk before the next, gone on with after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lamina.data import open_prepared
from lamina.data.prepare import PrepareSpec, prepare
from lamina.data.prepare import Progress as Reading
from lamina.data.sources import Source
from lamina.durable import remove, sync, write_file
from lamina.errors import LaminaError
from lamina.machine import give_back
from lamina.model import Model
from lamina.retrieve import generations
from lamina.retrieve.chunks import Chunks, Documents, once
from lamina.retrieve.embedding import Embedder, EmbedderSpec
from lamina.retrieve.engines import Engine, finish, writer
from lamina.retrieve.exact import FILES
from lamina.retrieve.manifest import IndexSpec, Origin, stored, write
from lamina.retrieve.states import StateContent
from lamina.retrieve.store import Batch
from lamina.text import Tokenizer
from lamina.weights.files import Entry, read_json, write_safetensors

if TYPE_CHECKING:
    from lamina.data import Prepared

CHUNK = 64  # tokens, as in RETRO
BATCH = 1024  # rows that are embedded together and put on the disk
COPIED = 8192  # rows, where they were embedded before
WISH = "wish.json"  # what a corpus was prepared from, and how
JOURNAL, DOCUMENTS, TOKENIZER = "journal.json", "documents.safetensors", "tokenizer"


@dataclass
class Progress:
    """How far a build is. `begun`: rows that were there when it began."""

    what: str
    rows: int
    total: int
    begun: int = 0


Report = Callable[[Progress], None]


class Content(Protocol):
    """What a database is made of: rows by number."""

    hash: str  # of the text
    tokenizer: Tokenizer
    origins: tuple[Origin, ...]
    keys: np.ndarray  # (documents,): of each that is in it, a hash of its tokens,
    files: np.ndarray  # and the number of its file
    starts: np.ndarray  # (documents + 1,): the first row of each, and the number of rows
    given: int  # rows, the first ones, that were embedded before and are copied
    left: int  # documents left out, which are the same as others
    chunk: int
    embedder: EmbedderSpec
    cut: int  # texts that were cut so far
    notes: tuple[str, ...]  # what is known of its rows from before, each words and a number

    def tokens(self, start: int, stop: int) -> Tensor:
        """(stop - start, chunk) int64, -1 where a chunk is shorter."""
        ...

    def vectors(self, start: int, stop: int) -> Tensor:
        """(stop - start, width) float32."""
        ...


class ChunkContent:
    """The chunks of prepared text, and the vectors of their texts. Documents that are the same as others are left
    out."""

    notes, given = (), 0

    def __init__(self, prepared: Prepared, chunk: int, embedder: Embedder, known: np.ndarray | None = None) -> None:
        """known: keys of documents that are left out, as they are there already."""
        self.chunk, self.embed, self.embedder = chunk, embedder, embedder.spec
        documents = Documents(prepared)
        chosen = once(documents.keys, known)
        self.chunks = Chunks(documents, chosen, chunk)
        self.hash, self.tokenizer, self.origins = prepared.hash, prepared.tokenizer(), documents.origins
        self.keys, self.files, self.starts = documents.keys[chosen], documents.files[chosen], self.chunks.starts
        self.left, self.cut = len(documents) - len(chosen), 0

    def tokens(self, start: int, stop: int) -> Tensor:
        return self.chunks.tokens(start, stop)

    def vectors(self, start: int, stop: int) -> Tensor:
        before = self.embed.cut
        found = self.embed(said(self.tokenizer, self.tokens(start, stop)))
        self.cut += self.embed.cut - before
        return found


def said(tokenizer: Tokenizer, chunks: Tensor) -> list[str]:
    """The texts of chunks (n, m). A character of which a chunk has only a part is left out of it."""
    return [tokenizer.decode(row[row >= 0].tolist()).strip("\ufffd") for row in chunks]


def build(
    prepared: Prepared,
    directory: str | os.PathLike[str],
    embedder: Embedder,
    *,
    chunk: int = CHUNK,
    engine: Engine = Engine(),  # noqa: B008
    batch: int = BATCH,
    force: bool = False,
    report: Report = lambda progress: None,
) -> IndexSpec:
    """Make `directory` a database of the chunks of prepared text: the vector of each, and what continues it.

    After a kill the same call goes on after the last whole batch. A database that is there is replaced with `force`
    only, and stays readable until the new one is whole. Raises LaminaError for text without a document.
    """
    directory = Path(directory)
    check_free(directory, force)
    return grow(ChunkContent(prepared, chunk, embedder), directory, engine, batch=batch, report=report)


def build_states(
    prepared: Prepared,
    directory: str | os.PathLike[str],
    model: Model,
    *,
    source: str,
    window: int | None = None,
    stride: int | None = None,
    engine: Engine = Engine(),  # noqa: B008
    batch: int = BATCH,
    force: bool = False,
    report: Report = lambda progress: None,
) -> IndexSpec:
    """Make `directory` a database for kNN-LM: the state of a causal model at every token of prepared text, and the
    token after it. `source` is what the model was loaded from; the text must have its ids."""
    directory = Path(directory)
    check_free(directory, force)
    content = StateContent(prepared, model, source, window, stride)
    return grow(content, directory, engine, batch=batch, report=report)


def corpus_of(
    sources: Sequence[Source],
    path: Path,
    tokenizer: Tokenizer,
    spec: PrepareSpec,
    report: Callable[[Reading], None] = lambda progress: None,
) -> Prepared:
    """The sources as prepared text at `path`, or what an earlier run made of the same ones."""
    wish = json.dumps([spec.to_json(), tokenizer.hash, [asdict(source) for source in sources]]).encode()
    if not (path / WISH).is_file() or (path / WISH).read_bytes() != wish:
        prepare(sources, path, tokenizer, spec, force=path.exists(), report=report)
        write_file(path / WISH, wish)
    return open_prepared(path)


def check_free(directory: Path, force: bool) -> None:
    """Raise LaminaError for a directory that may not be built in."""
    generations.check_local(directory)
    if directory.exists() and not directory.is_dir():
        raise LaminaError(f"{directory}: is a file; a directory is built in")
    if (directory / generations.CURRENT).exists():
        if not force:
            raise LaminaError(f"{directory}: holds a database already; name another one, or replace it with --force")
    elif directory.is_dir():
        others = {path.name for path in directory.iterdir()} - generations.NAMES
        strange = sorted(name for name in others if not generations.FOLDER.fullmatch(name))
        if strange:
            raise LaminaError(f"{directory}: holds {strange[0]!r}, so it is no database; name another directory")


def grow(
    content: Content,
    directory: Path,
    engine: Engine,
    *,
    batch: int,
    report: Report,
    base: Path | None = None,
    last: Callable[[], None] = lambda: None,
) -> IndexSpec:
    """Write the content as the newest generation of `directory`. base: the generation that it was made from, which has
    to be the newest one until then: what another process wrote meanwhile would be lost. last: called before it is
    replaced, when nothing more is read of it."""
    total, tokenizer = int(content.starts[-1]), content.tokenizer
    if total == 0:
        raise LaminaError("the text has no document with a token to store, so there is nothing to find")
    shape = total, content.embedder.width, content.chunk
    wish = [content.hash, content.chunk, content.embedder.to_json(), engine.kind, engine.uri]
    key = hashlib.sha256(json.dumps(wish).encode()).hexdigest()
    with generations.alone(directory) as work:
        if base is not None and generations.current(directory) != base:
            raise LaminaError(f"{directory}: another process has replaced {base.name} meanwhile; do it again")
        journal = _journal(work, key)
        content.cut, name = journal["cut"], journal["table"]
        out = writer(engine, work, name, shape, journal["done"])
        try:
            begun = out.done
            while (start := out.done) < total:
                copied = start < content.given
                stop = min(start + max(batch, COPIED), content.given) if copied else min(start + batch, total)
                report(Progress("copying" if copied else "embedding", start, total, max(begun, content.given)))
                out.add(_batch(content, start, stop))
                out.commit()
                journal |= {"done": out.done, "cut": content.cut}
                write_file(work / JOURNAL, json.dumps(journal).encode())
                give_back()
            begun = max(begun, content.given)
            report(Progress("embedding", total, total, begun))
        finally:
            out.close()
        table = finish(engine, work, name, shape, lambda what: report(Progress(what, total, total, begun)))
        _write_documents(work, content)
        tokenizer.save(work / TOKENIZER)
        (work / JOURNAL).unlink()
        names = [f"{each}.safetensors" for each in FILES] if table is None else []
        names += [DOCUMENTS, *(f"{TOKENIZER}/{path.name}" for path in sorted((work / TOKENIZER).iterdir()))]
        spec = IndexSpec(
            chunk=content.chunk,
            rows=total,
            width=content.embedder.width,
            documents=len(content.keys),
            vocabulary=tokenizer.vocabulary,
            tokenizer=tokenizer.hash,
            embedder=content.embedder,
            engine=engine.kind,
            origins=content.origins,
            files=stored(work, names),
            table=table,
            notes=summed([*content.notes, *_notes(content)]),
        )
        for each in names:
            with open(work / each, "rb") as file:
                os.fsync(file.fileno())
        sync(work / TOKENIZER)
        write(work, spec)
        last()
        generations.install(directory)
    return spec


def _batch(content: Content, start: int, stop: int) -> Batch:
    """Rows, and of each the row after it where that is of the same document."""
    tokens = content.tokens(start, min(stop + 1, int(content.starts[-1])))
    numbers = np.arange(start, stop)
    documents = np.searchsorted(content.starts, numbers, side="right") - 1
    last = torch.from_numpy(content.starts[documents + 1] == numbers + 1)
    vectors = content.vectors(start, stop)
    if not bool(vectors.isfinite().all()):
        row = start + int((~vectors.isfinite()).any(1).nonzero()[0])
        raise LaminaError(
            f"{content.embedder.source} in {content.embedder.dtype}: the vector of row {row:,} is not finite, so it"
            " could never be found; another dtype may do: float32"
        )
    following = torch.full((stop - start, content.chunk), -1)
    following[: len(tokens) - 1] = tokens[1:]
    return Batch(
        start=start,
        vectors=vectors,
        tokens=tokens[: stop - start],
        following=following.masked_fill(last[:, None], -1),
        documents=torch.from_numpy(documents),
    )


def _journal(work: Path, key: str) -> dict[str, Any]:
    """Where an earlier run with the same wishes stands; what another one left is cleared away."""
    path = work / JOURNAL
    found = read_json(path) if path.is_file() else {}
    if found.get("key") != key:
        for each in work.iterdir():
            remove(each)
        # At a uri the table lies beside those of other databases, and of generations that are read meanwhile.
        found = {"key": key, "done": 0, "cut": 0, "table": f"lamina-{secrets.token_hex(8)}"}
        write_file(path, json.dumps(found).encode())
    return found


def _write_documents(work: Path, content: Content) -> None:
    tensors = {
        "starts": torch.from_numpy(content.starts),
        "keys": torch.from_numpy(content.keys),
        "files": torch.from_numpy(content.files),
    }
    plan = {name: Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_safetensors(work / DOCUMENTS, plan, tensors.__getitem__)


def _notes(content: Content) -> list[str]:
    notes = [f"documents left out, which are the same as others: {content.left:,}"] if content.left else []
    return [*notes, *([f"chunks cut for the embedder, which reads less: {content.cut:,}"] if content.cut else [])]


def summed(notes: Iterable[str]) -> tuple[str, ...]:
    """Notes of the same words as one, with the sum of their numbers."""
    sums: Counter[str] = Counter()
    for words, _, number in (note.rpartition(": ") for note in notes):
        sums[words] += int(number.replace(",", ""))
    return tuple(f"{words}: {number:,}" for words, number in sums.items())
