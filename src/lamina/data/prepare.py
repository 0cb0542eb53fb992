"""From sources to a prepared directory: read, tokenised, divided, written, and gone on with after a kill.

Work is done in `.NAME.preparing` beside the directory, which appears whole or not at all. After each source everything
is put on the disk and the journal says where it stands; a later run with the same sources and wishes goes on there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lamina.data import manifest as layout
from lamina.data.division import in_validation
from lamina.data.learning import learnt_tokenizer
from lamina.data.lost import Lacks
from lamina.data.manifest import KINDS, Manifest, SourceFile
from lamina.data.sources import Part, Source, Tally, rows, texts
from lamina.data.wishes import TYPES, PrepareSpec
from lamina.data.workplace import JOURNAL, PARTS, check_target, install, journal_of, owned
from lamina.data.writer import Writer
from lamina.durable import sync, write_file
from lamina.errors import LaminaError
from lamina.specs import unknown
from lamina.text import Tokenizer, cut_place

PIECE = 1 << 18  # characters of a long text encoded together; pieces of a batch go to all cores
BATCH = 1 << 21  # characters of a batch
NAMED = 20  # characters without a token that data.json names
IGNORE = -100  # the label of a token of which nothing is asked: all of a word but the first


class NothingLeft(LaminaError):
    """The sources are as they should be, and hold nothing to train on."""


@dataclass
class Progress:
    """How far a run is."""

    bytes: int = 0
    total: int = 0
    tokens: int = 0
    source: str = ""


@dataclass
class Counted:
    """What became of one source."""

    rows: int = 0
    documents: list[int] = field(default_factory=lambda: [0, 0])
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    damaged: int = 0
    empty: int = 0
    skipped: int = 0
    mended: int = 0
    lost: int = 0
    examples: list[str] = field(default_factory=list)


def prepare(
    sources: Sequence[Source],
    directory: str | os.PathLike[str],
    tokenizer: Tokenizer | str,
    spec: PrepareSpec,
    *,
    special: str = "none",
    train_bytes: int = 100_000_000,
    force: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Manifest]:
    """Prepare `directory`, or its train and validation; the manifests by part ("" where it is not divided).

    tokenizer: one, or what is to be trained on the first `train_bytes` of the sources: "bpe:8192", "characters", ...
    Raises LaminaError for wrong sources and NothingLeft where they hold nothing.
    """
    target = Path(os.path.abspath(directory))
    check_target(target, force)
    if not sources:
        raise LaminaError("no source; name files, directories or hf:owner/name")
    for source in sources:
        if source.kind == "text" and spec.kind != "text":
            raise LaminaError(f"{source.name}: a text file, and {spec.kind} needs rows with {', '.join(spec.fields)}")
        if source.kind != "text" and spec.split == "end":
            raise LaminaError(f"{source.name}: has rows; --split end divides text files, --split documents others")
    work = target.with_name(f".{target.name}.preparing")
    with owned(work):
        wish = tokenizer if isinstance(tokenizer, str) else tokenizer.hash
        told = [spec.to_json(), wish, special, train_bytes, [asdict(source) for source in sources]]
        key = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        journal = journal_of(work, key)
        if isinstance(tokenizer, str):
            tokenizer = learnt_tokenizer(work, journal, key, tokenizer, sources, spec, special, train_bytes)
        made = _Run(work, journal, tokenizer, sources, spec, report).run(key)
        tokenizer.save(work)
        for part in PARTS if spec.validation else ():
            tokenizer.save(work / part)
        shutil.rmtree(work / "tokenizer", ignore_errors=True)
        (work / JOURNAL).unlink()
        for path in [work, *(work / part for part in PARTS if spec.validation)]:
            sync(path)
        install(work, target)
    return made


class _Run:
    """The sources one after the other, into one writer or two."""

    def __init__(
        self,
        work: Path,
        journal: dict[str, Any],
        tokenizer: Tokenizer,
        sources: Sequence[Source],
        spec: PrepareSpec,
        report: Callable[[Progress], None],
    ) -> None:
        self.work, self.tokenizer, self.sources, self.spec, self.report = work, tokenizer, sources, spec, report
        self.journaled: list[dict[str, Any]] = journal.get("counted", [])
        self.counted = [Counted(**each) for each in self.journaled]
        self.document = journal.get("document", 0)
        self.labels: dict[str, int] = {name: i for i, name in enumerate(journal.get("labels", spec.labels))}
        self.forced = journal.get("forced", 0)  # cuts at which ids may differ from those of the whole
        self.where: int | None = None  # of the document that goes on
        self.lacks = Lacks(tokenizer)
        self.lost: list[str] = journal.get("lost", [])  # characters without a token, each once
        end = tokenizer.eos if spec.end else None
        states = journal.get("states", [None, None])
        self.writers: list[Writer] = []
        for part, state in zip(PARTS if spec.validation else ("",), states):
            (work / part / layout.NAME).unlink(missing_ok=True)  # of a run killed between the manifest and the end
            self.writers.append(
                Writer(
                    work / part,
                    kind=spec.kind,
                    vocabulary=tokenizer.vocabulary,
                    tokenizer=tokenizer.hash,
                    end=end,
                    values=spec.values,
                    shard_tokens=spec.shard_tokens,
                    state=state,
                )
            )
        self.progress = Progress(total=sum(source.bytes for source in sources))

    def run(self, key: str) -> dict[str, Manifest]:
        try:
            for source in self.sources[: len(self.counted)]:
                self.progress.bytes += source.bytes
            for source in self.sources[len(self.counted) :]:
                self._read(source)
                self.journaled.append(asdict(self.counted[-1]))
                states = [writer.state() for writer in self.writers]
                write_file(
                    self.work / JOURNAL,
                    json.dumps(
                        {
                            "key": key,
                            "tokenizer": True,
                            "counted": self.journaled,
                            "document": self.document,
                            "labels": list(self.labels),
                            "forced": self.forced,
                            "lost": self.lost,
                            "states": states,
                        }
                    ).encode(),
                )
            return self._closed()
        finally:
            for writer in self.writers:
                writer.stop()

    def _closed(self) -> dict[str, Manifest]:
        spec, counts = self.spec, [writer.documents for writer in self.writers]
        if not sum(counts):
            lost = {name: sum(getattr(each, name) for each in self.counted) for name in ("damaged", "empty", "skipped")}
            said = ", ".join(f"{count:,} {name}" for name, count in lost.items())
            raise NothingLeft(f"{len(self.sources):,} sources hold no document with a token: {said}")
        if not all(counts):
            which = PARTS[counts.index(0)]
            raise LaminaError(
                f"{sum(counts):,} documents and --validation {spec.validation:g} leave none for {which};"
                " --split end keeps the end of each text file, or change the part"
            )
        notes = [f"pieces of a long text that were cut where the tokenizer joins: {self.forced}"] if self.forced else []
        if self.lost:
            more = f" and {len(self.lost) - NAMED} others" if len(self.lost) > NAMED else ""
            notes.append(f"characters without a token: {', '.join(map(repr, self.lost[:NAMED]))}{more}")
        made = {}
        for i, writer in enumerate(self.writers):
            files = [
                SourceFile(
                    name=source.name,
                    bytes=source.bytes,
                    sha256=source.sha256,
                    documents=each.documents[i],
                    tokens=each.tokens[i],
                    damaged=each.damaged,
                    empty=each.empty,
                    skipped=each.skipped,
                    mended=each.mended,
                    lost=each.lost,
                )
                for source, each in zip(self.sources, self.counted)
            ]
            part = PARTS[i] if spec.validation else ""
            made[part] = writer.close(labels=self.labels, sources=files, notes=notes)
        return made

    def _read(self, source: Source) -> None:
        spec, tally, counted = self.spec, Tally(source.name, self.spec.damaged), Counted()
        before = [(writer.documents, sum(writer.tokens)) for writer in self.writers]
        base = self.progress.bytes
        self.progress.source = source.name
        if source.kind == "text":
            end = spec.validation if spec.split == "end" else 0.0
            parts = texts(source, tally, split_on=spec.split_on, characters=spec.characters, end=end)
        else:
            found = rows(source, tally, spec.fields, TYPES[spec.kind], spec.characters)
            parts = self._parts(found)
        for batch in _batches(self._cut(parts)):
            self._write(batch, tally)
            self.progress.bytes = base + min(tally.bytes, source.bytes or tally.bytes)
            self.progress.tokens = sum(sum(writer.tokens) for writer in self.writers)
            self.report(self.progress)
        tally.check()
        if source.kind != "hub":
            self._unchanged(source)
        self.progress.bytes = base + source.bytes
        for name in ("rows", "damaged", "empty", "skipped", "mended", "lost", "examples"):
            setattr(counted, name, getattr(tally, name))
        self.lost = list(dict.fromkeys([*self.lost, *tally.letters]))
        for i, writer in enumerate(self.writers):
            counted.documents[i] = writer.documents - before[i][0]
            counted.tokens[i] = sum(writer.tokens) - before[i][1]
        self.counted.append(counted)

    def _unchanged(self, source: Source) -> None:
        if Path(source.name).stat().st_size != source.bytes:
            raise LaminaError(f"{source.name}: changed while it was read; prepare it anew when nobody writes to it")

    def _parts(self, found: Iterable[tuple]) -> Iterator[Part]:
        columns = len(KINDS[self.spec.kind])
        for row in found:
            if self.spec.kind == "classification":
                yield Part((row[0],), value=row[1])
            else:
                yield Part(row[:columns], value=float(row[2]) if len(row) > columns else None)

    def _cut(self, parts: Iterable[Part]) -> Iterator[Part]:
        """Texts in pieces that are encoded by themselves with the ids of the whole, as far as there is such a place."""
        rest, where = "", None
        for part in parts:
            if len(part.texts) != 1 or not isinstance(part.texts[0], str):
                yield part
                continue
            if where is not None and part.where != where and rest:
                yield Part((rest,), ends=False, where=where)
                rest = ""
            where = part.where
            rest += part.texts[0]
            while len(rest) > PIECE:
                at = cut_place(rest[: PIECE + 1024], PIECE, self.tokenizer)
                if at is None and len(rest) <= 4 * PIECE and not part.ends:
                    break
                if at is None:
                    at = PIECE
                    self.forced += 1
                yield Part((rest[:at],), ends=False, where=where)
                rest = rest[at:]
            if part.ends:
                yield Part((rest,), value=part.value, drop=part.drop, where=where)
                rest, where = "", None

    def _write(self, batch: list[Part], tally: Tally) -> None:
        if self.spec.kind == "token-classification":
            for part, (ids, firsts) in zip(batch, _words(self.tokenizer, [part.texts[0] for part in batch])):
                self.lacks.count("".join(part.texts[0]), ids.tolist(), tally)
                self._label_words(self._writer(part), ids, firsts, part, tally)
            return
        flat = [text for part in batch for text in part.texts]
        encoded = iter(self.tokenizer.encode_batch(flat, special=False, control=self.spec.control))
        for part in batch:
            writer = self._writer(part)
            for name, text in zip(KINDS[self.spec.kind], part.texts, strict=True):
                ids = next(encoded)
                self.lacks.count(text, ids, tally)
                writer.extend(ids, name)
            if part.ends:
                empty = any(column.pending == 0 for column in writer.columns)
                tally.empty += empty and not part.drop
                if part.drop or empty:
                    writer.cancel()
                else:
                    writer.finish(self._label(part.value) if self.spec.kind == "classification" else part.value)

    def _writer(self, part: Part) -> Writer:
        """The writer of the document that this part belongs to."""
        if part.where is not None:
            return self.writers[part.where]
        if self.where is None:
            self.where = int(in_validation(self.document, self.spec.validation))
            self.document += 1
        where = self.where
        if part.ends:
            self.where = None
        return self.writers[where]

    def _label_words(self, writer: Writer, ids: np.ndarray, firsts: np.ndarray, part: Part, tally: Tally) -> None:
        words, names = part.texts
        if len(words) != len(names):
            tally.hurt(f"document {self.document:,}: {len(words)} tokens and {len(names)} labels")
        elif not len(ids):
            tally.empty += 1
        else:
            labels = np.full(len(ids), IGNORE)
            numbers = np.array([self._label(name) for name in names])
            labels[firsts[firsts >= 0]] = numbers[firsts >= 0]
            writer.add({"tokens": ids, "labels": labels})

    def _label(self, name: str | int) -> int:
        """The number of a label: itself where it is one; names are numbered as they are met, or as `labels` says."""
        if isinstance(name, int):
            if not 0 <= name < 1 << 20:
                raise LaminaError(f"label {name}; numbers of labels count from 0")
            for i in range(len(self.labels), name + 1):
                self.labels[str(i)] = i
            return name
        if name not in self.labels:
            if self.spec.labels:
                raise LaminaError(unknown("label", name, self.labels))
            self.labels[name] = len(self.labels)
        return self.labels[name]


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    batch: list[Part] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += sum(map(len, part.texts))
        if size >= BATCH or len(batch) == 1 << 14:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _words(tokenizer: Tokenizer, documents: list[list[str]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, for each word the place of its first token, or -1 where it has none) of texts given as words."""
    joined = [" ".join(words) for words in documents]
    for words, (ids, spans) in zip(documents, tokenizer.encode_spans(joined)):
        sizes = np.array([len(word) for word in words], np.int64)
        begins = np.cumsum(sizes + 1) - sizes - 1
        word = np.searchsorted(begins, spans[:, 1] - 1, side="right") - 1  # the word in which a token ends
        firsts = np.searchsorted(word, np.arange(len(words)))
        inside = firsts < len(word)
        inside[inside] &= word[firsts[inside]] == np.flatnonzero(inside)
        yield ids, np.where(inside, firsts, -1)
