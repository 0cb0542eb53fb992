"""What is read: text files, JSONL and Parquet, plain or gzipped, directories of them, and data sets of the hub."""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from lamina.data.prepared import sha256
from lamina.errors import LaminaError, UnsupportedError

CHUNK = 1 << 20  # bytes read at once
ENOUGH = 1 << 20  # characters of a source after which one that loses too many is not read to its end
LONGEST = 1 << 26  # bytes of a row of JSONL: it has to be held whole
ROWS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
TEXTS = (".txt", ".md", ".rst", ".tex", ".html", ".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go", ".java", ".js",
         ".ts", ".sh", ".sql", ".r", ".jl", ".rb", ".css", ".yaml", ".toml")  # fmt: skip
"""What is taken out of a directory as text; any file that is named is."""
NONE = re.compile("[\ud800-\udfff\0]")  # what no text has: NUL, and half a character, as bytes that are no UTF-8 become
EXTRA = "it is in an extra: pip install 'lamina[data]'"


@dataclass(frozen=True)
class Source:
    """A file, or a data set of the hub; `kind` is text, jsonl, parquet or hub."""

    name: str
    kind: str
    bytes: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class Part:
    """A piece of a document: the text of each column; whole, or more follows until `ends`."""

    texts: tuple[Any, ...]
    value: Any = None
    ends: bool = True
    drop: bool = False  # the document that ends here is not to be kept
    where: int | None = None  # 0 training, 1 validation; None: by its number


@dataclass
class Tally:
    """What became of a source, while it is read. `allowed`: the part of its rows and characters that may be damaged."""

    name: str = ""
    allowed: float = 1.0
    rows: int = 0
    damaged: int = 0
    empty: int = 0
    skipped: int = 0
    mended: int = 0
    characters: int = 0
    lost: int = 0  # of the characters, those without a token
    bytes: int = 0  # read so far, as they lie in the file
    examples: list[str] = field(default_factory=list)  # the first few that were damaged, with their place
    letters: dict[str, int] = field(default_factory=dict)  # how often each of the lost ones stands there

    def hurt(self, place: str) -> None:
        self.damaged += 1
        if len(self.examples) < 3:
            self.examples.append(place)
        if self.rows >= 1000:  # a long file that is damaged throughout is not read to its end
            self.check()

    def lose(self, count: int, letter: str | None = None) -> None:
        self.lost += count
        if letter is not None:
            self.letters[letter] = self.letters.get(letter, 0) + count
        if self.characters >= ENOUGH:
            self.check()

    def check(self) -> None:
        """Raise LaminaError where too many rows were damaged, or too many characters lost."""
        if self.lost > self.allowed * self.characters:
            often = sorted(self.letters, key=lambda letter: -self.letters[letter])
            which = f", as {', '.join(map(repr, often[:5]))}" if often else ""
            raise LaminaError(
                f"{self.name}: the tokenizer has no token for {self.lost:,} of {self.characters:,} characters{which};"
                f" that is more than {self.allowed:.3g} of them (--damaged): take a tokenizer that has them"
            )
        if self.damaged > self.allowed * self.rows:
            raise LaminaError(
                f"{self.name}: {self.damaged:,} of {self.rows:,} rows are damaged, more than {self.allowed:.3g} of them"
                f" (--damaged): {'; '.join(self.examples)}"
            )


def find(names: Iterable[str], glob: str | None = None) -> list[Source]:
    """The sources in the order given, directories sorted by path. Raises LaminaError for what is not there."""
    found: list[Source] = []
    for name in names:
        path = Path(name)
        if name.startswith("hf:"):
            found.append(Source(name, "hub"))
        elif path.is_dir():
            below = [each for each in sorted(path.rglob(glob or "*")) if each.is_file() and not _hidden(each, path)]
            taken = [each for each in below if glob or _kind(each) != "text" or _suffix(each) in TEXTS]
            if not taken:
                what = f"no file like {glob}" if glob else "no text, JSONL or Parquet file"
                raise LaminaError(f"{name}: {what} among {len(below):,} files; --glob '*.SUFFIX' chooses others")
            found += [_source(each) for each in taken]
        elif path.is_file():
            found.append(_source(path))
        else:
            raise LaminaError(f"{name}: no such file or directory; a source is one, or hf:owner/name")
    return found


def _source(path: Path) -> Source:
    try:
        return Source(str(path), _kind(path), path.stat().st_size, sha256(path))
    except OSError as error:
        raise LaminaError(f"{path}: {error.strerror or error}") from None


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _suffix(path: Path) -> str:
    return (Path(path.stem) if path.suffix == ".gz" else path).suffix.lower()


def _kind(path: Path) -> str:
    return ROWS.get(_suffix(path), "text")


def texts(source: Source, tally: Tally, *, split_on: str | None, characters: str, end: float) -> Iterator[Part]:
    """The documents of a text file, piece by piece: the file itself, or what `split_on` separates.

    end: the part of each file, counted in characters, that is for validation: its last. Never holds more than a piece.
    """
    cut = None
    if end:
        size = sum(len(text) for text in _decoded(source, Tally()))
        cut = int(size * (1 - end))
    bad, at, byte = False, 0, 0
    for text, ends in _divided(_decoded(source, tally), split_on):
        found = NONE.search(text)
        if found and characters == "error":
            _refuse(source.name, byte + _bytes(text[: found.start()]), found[0])
        byte += _bytes(text) + (_bytes(split_on) if ends and split_on else 0)
        if found:
            bad = bad or characters == "skip"
            text, count = NONE.subn("\ufffd", text)
            tally.mended += count if characters == "replace" else 0
        tally.skipped += ends and bad
        at += len(text)
        if cut is not None and at - len(text) <= cut < at:
            here = len(text) - (at - cut)
            yield Part((text[:here],), ends=True, drop=bad, where=0)
            yield Part((text[here:],), ends=ends, drop=bad, where=1)
        else:
            yield Part((text,), ends=ends, drop=ends and bad, where=None if cut is None else int(at > cut))
        bad = bad and not ends


def _decoded(source: Source, tally: Tally) -> Iterator[str]:
    """UTF-8 text in pieces; a byte that is none becomes half a surrogate pair, which no text has."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    first = True
    for block in _blocks(source, tally):
        text = decoder.decode(block, final=not block)
        if first and text:
            first = False
            if text.startswith("\ufeff"):
                text = text[1:]
                tally.mended += 1
        yield text


def _blocks(source: Source, tally: Tally) -> Iterator[bytes]:
    """The bytes of a file, unpacked, and last an empty block."""
    with _opened(source) as (raw, file):
        while True:
            block = _guarded(source, lambda: file.read(CHUNK))
            tally.bytes = raw.tell()
            yield block
            if not block:
                return


class _opened:
    """A file and, over it, its unpacked content."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __enter__(self) -> tuple[BinaryIO, Any]:
        try:
            self.raw = open(self.source.name, "rb")
        except OSError as error:
            raise LaminaError(f"{self.source.name}: {error.strerror or error}") from None
        return self.raw, gzip.GzipFile(fileobj=self.raw) if self.source.name.endswith(".gz") else self.raw

    def __exit__(self, *raised: object) -> None:
        self.raw.close()


def _guarded(source: Source, read: Any) -> Any:
    try:
        return read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise LaminaError(f"{source.name}: damaged gzip: {error}; get the file again") from None
    except OSError as error:
        raise LaminaError(f"{source.name}: {error.strerror or error}") from None


def _divided(pieces: Iterable[str], separator: str | None) -> Iterator[tuple[str, bool]]:
    """(text, whether a document ends here). A separator may lie across two pieces."""
    rest = ""
    for piece in pieces:
        if separator is None:
            if piece:
                yield piece, False
            continue
        *whole, rest = (rest + piece).split(separator)
        for text in whole:
            yield text, True
        if len(rest) > CHUNK:
            keep = len(separator) - 1
            yield rest[: len(rest) - keep], False
            rest = rest[len(rest) - keep :]
    yield rest, True


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))


def _refuse(name: str, byte: int, found: str) -> None:
    what = "a NUL" if found == "\0" else "not UTF-8" if "\udc80" <= found <= "\udcff" else "half a character"
    raise LaminaError(f"{name}: {what} at byte {byte:,}; --characters replace or skip goes on without it")


def rows(source: Source, tally: Tally, fields: Sequence[str], types: Sequence[Any], characters: str) -> Iterator[tuple]:
    """The rows of a JSONL file, a Parquet file or a data set: the value of each field. What is damaged is counted."""
    reader = {"jsonl": _jsonl, "parquet": _parquet, "hub": _hub}[source.kind]
    for place, row in reader(source, tally, fields):
        tally.rows += 1
        if isinstance(row, str):
            tally.hurt(f"{place}: {row}")
            continue
        wrong = next(
            (f"{name} is {_said(row, name)}" for name, t in zip(fields, types) if not _is(row.get(name), t)), None
        )
        if wrong:
            tally.hurt(f"{place}: {wrong}")
            continue
        values = tuple(row[name] for name in fields)
        found = [NONE.search(text) for text in _strings(values)]
        if any(found) and characters == "error":
            raise LaminaError(
                f"{source.name}: {place}: a NUL, or half a character; --characters replace or skip goes on without it"
            )
        if any(found) and characters == "skip":
            tally.skipped += 1
            continue
        if any(found):
            tally.mended += sum(len(NONE.findall(text)) for text in _strings(values))
            values = tuple(_mended(value) for value in values)
        yield values


def _strings(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from (each for each in value if isinstance(each, str))


def _mended(value: Any) -> Any:
    if isinstance(value, list):
        return [_mended(each) for each in value]
    return NONE.sub("\ufffd", value) if isinstance(value, str) else value


def _is(value: Any, kind: Any) -> bool:
    if kind == "words":
        return isinstance(value, list) and all(isinstance(each, str) for each in value)
    if kind == "labels":
        return isinstance(value, list) and all(_is(each, (str, int)) for each in value)
    return isinstance(value, kind) and not isinstance(value, bool)


def _said(row: dict[str, Any], name: str) -> str:
    return (
        f"a {type(row[name]).__name__}" if name in row else f"missing; there are {', '.join(map(str, list(row)[:8]))}"
    )


def _jsonl(source: Source, tally: Tally, fields: Sequence[str]) -> Iterator[tuple[str, Any]]:
    with _opened(source) as (raw, file):
        number = 0
        while line := _guarded(source, lambda: file.readline(LONGEST)):
            number += 1
            place = f"line {number:,}"
            if len(line) == LONGEST and not line.endswith(b"\n"):
                while (more := _guarded(source, lambda: file.readline(LONGEST))) and not more.endswith(b"\n"):
                    pass
                yield place, f"more than {LONGEST:,} bytes"
                continue
            tally.bytes = raw.tell()
            text = line.decode("utf-8", "surrogateescape")
            if number == 1 and text.startswith("\ufeff"):
                text = text[1:]
                tally.mended += 1
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                yield place, f"not JSON: {error.msg} at column {error.pos + 1:,}"
                continue
            except (ValueError, RecursionError) as error:
                yield place, f"not JSON: {error}"
                continue
            yield place, row if isinstance(row, dict) else f"a JSON {type(row).__name__}, not an object"


def _parquet(source: Source, tally: Tally, fields: Sequence[str]) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise UnsupportedError(f"{source.name}: Parquet needs the package pyarrow; {EXTRA}") from None
    try:
        with pyarrow.parquet.ParquetFile(source.name) as file:
            names = file.schema_arrow.names
            if missing := [name for name in fields if name not in names]:
                raise LaminaError(f"{source.name}: no column {missing[0]!r}; there are {', '.join(names)}")
            number = 0
            for batch in file.iter_batches(batch_size=512, columns=list(fields)):
                tally.bytes = source.bytes * number // max(file.metadata.num_rows, 1)
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number:,}", row
    except pyarrow.ArrowException as error:
        raise LaminaError(f"{source.name}: {' '.join(str(error).split())[:200]}") from None


def _hub(source: Source, tally: Tally, fields: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """hf:owner/name[@revision][#configuration][:split], streamed."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise UnsupportedError(f"{source.name}: data sets of the hub need the package datasets; {EXTRA}") from None
    found = re.fullmatch(r"hf:([^@#:]+)(?:@([^#:]+))?(?:#([^:]+))?(?::(.+))?", source.name)
    if found is None:
        raise LaminaError(f"{source.name}: a data set is hf:owner/name[@revision][#configuration][:split]")
    name, revision, configuration, split = found.groups()
    try:
        rows = datasets.load_dataset(name, configuration, split=split or "train", revision=revision, streaming=True)
        for number, row in enumerate(rows, 1):
            tally.bytes += sum(map(len, _strings(row.values())))
            yield f"row {number:,}", row
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())[:200]
        remedy = (
            "; without a network, give a local file (JSONL or Parquet) instead" if isinstance(error, OSError) else ""
        )
        raise LaminaError(f"{source.name}: {line}{remedy}") from None
