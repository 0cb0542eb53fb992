"""A database that is there: the neighbours of chunks of a text, of which document each is, and what is left out."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lamina.errors import CheckpointError, LaminaError, UnsupportedError
from lamina.model import ModelSpec
from lamina.retrieve import manifest as layout
from lamina.retrieve.build import DOCUMENTS, TOKENIZER, said
from lamina.retrieve.embedding import Embedder, same
from lamina.retrieve.engines import opened
from lamina.retrieve.generations import Hold
from lamina.retrieve.store import Found
from lamina.text import Tokenizer, from_directory
from lamina.weights.files import SafetensorsFile


class Database:
    """What `open_database` gives; it may be read by any number of processes.

    `starts` (documents + 1,): the first row of each document. `keys`, `files` (documents,): a hash of the tokens of
    each, and the number of the file it came from, as in `spec.origins`.
    """

    def __init__(self, directory: Path, hold: Hold, device: torch.device | str, embedder: str | None) -> None:
        self.directory, self.folder, self._hold = directory, hold.path, hold
        self.spec = layout.load(self.folder)
        self.device, self.embedder_source = device, embedder or self.spec.embedder.source
        self.starts, self.keys, self.files = self._documents()
        self.store = opened(self.folder, self.spec, device)

    def __repr__(self) -> str:
        spec = self.spec
        return f"Database({str(self.directory)!r}, {spec.engine}, rows={spec.rows:,}, documents={spec.documents:,})"

    def accelerate(self, trusted: str | os.PathLike[str] | None = None) -> None:
        """Find rows by an index of faiss from now on, made once and kept in the cache directory (extra lamina[faiss]).

        trusted: one that was made elsewhere. A file that was made to harm can run code when faiss reads it.
        """
        from lamina.retrieve.accelerator import accelerated

        self.store = accelerated(self.store, self.hash, self.location, trusted)

    @property
    def location(self) -> str:
        """Where the database lies, however it was named."""
        return str(self.directory.resolve())

    def close(self) -> None:
        """Let go of the generation, so that a later build may remove it."""
        self._hold.close()

    def __len__(self) -> int:
        return self.spec.rows

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the manifest of the generation: rows are numbers in it alone."""
        return layout.hash_of(self.spec)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the chunks."""
        found = from_directory(self.folder / TOKENIZER)
        self.check_tokenizer(found)
        return found

    @cached_property
    def embedder(self) -> Embedder:
        """What made the vectors. Raises LaminaError where the source is another model now, or rows are states."""
        if self.spec.embedder.pooling == "state":
            raise LaminaError(
                f"{self.directory}: holds states of {self.spec.embedder.source}, for kNN-LM, and no chunks; build one"
                " without --states"
            )
        found = Embedder(self.embedder_source, self.spec.embedder.dtype, self.device)
        same(self.spec.embedder, found.spec)
        return found

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise LaminaError unless the chunks are ids of this tokenizer: to another they are other words."""
        if tokenizer.hash != self.spec.tokenizer:
            raise LaminaError(
                f"{self.directory}: its chunks are ids of another tokenizer (SHA-256 {self.spec.tokenizer[:12]}...)"
                f" than {tokenizer.name} ({tokenizer.hash[:12]}...); build it anew with --tokenizer of this model"
            )

    def check_reader(self, model: ModelSpec, tokenizer: Tokenizer) -> None:
        """Raise LaminaError for a model that does not read these chunks: it does not retrieve, it cuts its text into
        chunks of another size, or its ids are others."""
        if model.retrieval is None:
            raise UnsupportedError(
                "this model has no layer that reads neighbours (ChunkedCrossAttentionSpec); train one that has"
                " (lamina show retro/172m), or give it some (lamina.surgery.retrofit)"
            )
        if model.retrieval.chunk != self.spec.chunk:
            raise LaminaError(
                f"{self.directory}: has chunks of {self.spec.chunk} tokens, and this model reads the neighbours of"
                f" {model.retrieval.chunk}: build it anew with --chunk {model.retrieval.chunk}"
            )
        self.check_tokenizer(tokenizer)

    def neighbours(self, chunks: Tensor, *, count: int, exclude: Tensor | None = None) -> Tensor:
        """What lies nearest to chunks (n, m) int64 of the model's ids: (n, count, 2 m) int64, each neighbour followed
        by what continues it; -1 where there is none, or nothing follows.

        exclude: (n, spans, 2) int64, the documents that are not to be found for each chunk, from the first to before
        the second; `own` tells them. Raises LaminaError where m is not that of the database.
        """
        self._check_chunks(chunks)
        found = self.search(self.embedder(said(self.tokenizer, chunks)), count, exclude)
        return self.values(found.rows)

    def search(self, vectors: Tensor, count: int, exclude: Tensor | None = None) -> Found:
        """The rows nearest to vectors (n, width). exclude: (n, spans, 2) documents, as in `neighbours`."""
        return self.store.search(vectors, count, None if exclude is None else self.starts[exclude])

    def values(self, rows: Tensor) -> Tensor:
        """(...) int64 -> (..., 2 m) int64: the chunk of each row and, in the same document, the next; -1 for none."""
        flat = rows.reshape(-1)
        inside = flat.clamp(min=0)
        after = inside + 1
        ends = (after == self.starts[self.document_of(inside) + 1]) | (flat < 0)
        pair = torch.stack([inside, after.masked_fill(ends, 0)], dim=1)
        found = self._tokens(pair.reshape(-1)).reshape(len(flat), 2, self.spec.chunk)
        found = found.masked_fill(torch.stack([flat < 0, ends], dim=1)[:, :, None], -1)
        return found.reshape(*rows.shape, 2 * self.spec.chunk)

    def _tokens(self, rows: Tensor) -> Tensor:
        found = self.store.tokens(rows)
        if found.numel() and not -1 <= int(found.min()) <= int(found.max()) < self.spec.vocabulary:
            wrong = ((found < -1) | (found >= self.spec.vocabulary)).nonzero()[0]
            raise CheckpointError(
                f"{self.folder}: row {int(rows[wrong[0]]):,} holds id {int(found[tuple(wrong)]):,}; the vocabulary has"
                f" {self.spec.vocabulary:,}: damaged, build it anew"
            )
        return found

    def document_of(self, rows: Tensor) -> Tensor:
        """(...) int64: which document rows are of."""
        return torch.searchsorted(self.starts, rows, right=True) - 1

    def name_of(self, document: int) -> str:
        """The file that a document came from, and its number in the database."""
        file = int(self.files[document])
        name = self.spec.origins[file].name if file >= 0 else ""
        return f"{name}#{document}"

    def own(self, keys: Tensor, hashes: list[str], whole: Tensor) -> Tensor:
        """(n, spans, 2) int64: for documents (n,) of another text, those here that are the same: from, to before; empty
        where there is none. A document is the same where its tokens are, and where it comes from the same file and
        either of the two is the whole of its file: the end of a file was cut off, or it was cut into lines.

        keys: (n,) of their tokens. hashes: SHA-256 of the file of each, "" where not known. whole: (n,) bool.
        """
        order = self.keys.argsort()
        at = torch.searchsorted(self.keys[order], keys).clamp(max=len(order) - 1)
        same = order[at]
        spans = torch.stack([same, same + 1], dim=1).masked_fill((self.keys[same] != keys)[:, None], 0)
        numbers: dict[str, list[int]] = {}  # a file that was read in two ways, or added again, has several
        for file, origin in enumerate(self.spec.origins):
            numbers.setdefault(origin.sha256, []).append(file)
        of = [numbers.get(digest, []) if digest else [] for digest in hashes]
        out = torch.zeros(len(keys), 1 + max(map(len, of), default=0), 2, dtype=torch.int64)
        out[:, 0] = spans
        for i, files in enumerate(of):
            for place, file in enumerate(files, 1):
                if bool(whole[i]) or self.spec.origins[file].documents == 1:
                    out[i, place] = self.documents_from(file)
        return out

    def documents_from(self, file: int) -> Tensor:
        """(2,) int64: the documents of a file, which lie beside each other: from, to before."""
        ends = torch.tensor([file, file + 1])
        low, high = torch.searchsorted(self._by_file[0], ends).tolist()
        return self._by_file[1][[low, high - 1]] + torch.tensor([0, 1]) if low < high else torch.zeros_like(ends)

    @cached_property
    def _by_file(self) -> tuple[Tensor, Tensor]:
        """The files of documents in order, and the documents. Those whose file is not known may lie anywhere."""
        return self.files.sort(stable=True)

    def verify(self) -> None:
        """Read everything: hashes, vectors, ids. Raises CheckpointError naming what is damaged."""
        layout.verify(self.folder, self.spec)
        self.store.verify()
        for start in range(0, self.spec.rows, BLOCK):
            self._tokens(torch.arange(start, min(start + BLOCK, self.spec.rows)))
        assert self.tokenizer

    def _check_chunks(self, chunks: Tensor) -> None:
        if chunks.dim() != 2 or chunks.shape[1] != self.spec.chunk:
            raise LaminaError(
                f"{self.directory}: has chunks of {self.spec.chunk} tokens, and is asked for those of"
                f" {tuple(chunks.shape)}: (n, {self.spec.chunk}) is needed, or a database built with --chunk"
            )

    def _documents(self) -> tuple[Tensor, Tensor, Tensor]:
        path = self.folder / DOCUMENTS
        file = SafetensorsFile(path)
        shapes = {"starts": self.spec.documents + 1, "keys": self.spec.documents, "files": self.spec.documents}
        for name, size in shapes.items():
            entry = file.entries.get(name)
            if entry is None or entry.dtype != torch.int64 or entry.shape != (size,):
                raise CheckpointError(f"{path}: {name} is not int64 [{size}]; build it anew")
        starts, keys, files = (file.read(name) for name in shapes)
        if int(starts[0]) != 0 or int(starts[-1]) != self.spec.rows or bool((starts.diff() < 0).any()):
            raise CheckpointError(f"{path}: starts do not grow from 0 to {self.spec.rows:,}; build it anew")
        if int(files.min()) < -1 or int(files.max()) >= len(self.spec.origins):
            raise CheckpointError(f"{path}: files are {int(files.min())} to {int(files.max())}; there are"
                                  f" {len(self.spec.origins)} origins")  # fmt: skip
        return starts, keys, files


BLOCK = 1 << 16  # rows whose ids are looked at together


def open_database(
    directory: str | os.PathLike[str], *, device: torch.device | str = "cpu", embedder: str | None = None
) -> Database:
    """Open a database that `lamina index build` made: its newest generation, which stays as it is while it is open.

    device: where vectors are compared and the embedder lies. embedder: the SOURCE of it, where it has moved.
    Raises LaminaError where there is none, CheckpointError for a damaged file, by name.
    """
    hold = Hold(Path(directory))
    try:
        return Database(Path(directory), hold, device, embedder)
    except BaseException:
        hold.close()
        raise
