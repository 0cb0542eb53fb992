"""`lamina index`: databases of text, and the neighbours of a text in them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lamina.cli.errors import Failed
from lamina.cli.output import Output, duration, size, table
from lamina.cli.program import NAMES, command
from lamina.cli.prompts import shown, standard_input, warn_of_lost
from lamina.errors import LaminaError

if TYPE_CHECKING:
    from lamina.data import Prepared
    from lamina.data.prepare import Progress as Reading
    from lamina.retrieve import Database, IndexSpec, Progress
    from lamina.retrieve.manifest import TableSpec

BUILD = """
lamina index build docs/ -o docs-index --embedder minilm-l6 --tokenizer smollm2-135m
lamina index build prepared/train -o index --embedder minilm-l6 --engine lance
"""
QUERY = """
lamina index query docs-index "how is a lock released?"
lamina index query docs-index --file question.txt --count 5 --json
"""
INFO = """
lamina index info docs-index
lamina index info docs-index --verify
"""
NEIGHBOURS = """
lamina index neighbours docs-index prepared/train -o prepared/neighbours
lamina index neighbours docs-index prepared/train -o prepared/neighbours --count 10 --json
"""
COPY = """
lamina index copy docs-index -o docs-lance --engine lance
"""
EVERY = 10.0  # seconds between two lines of progress where nobody watches


@command(BUILD)
@click.argument("corpus", nargs=-1, required=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory of the database.")
@click.option("--embedder", required=True, help="SOURCE that makes the vectors, as for lamina embed: minilm-l6.")
@click.option("--tokenizer", help="SOURCE of the model that will read the chunks; not for a prepared directory.")
@click.option("--chunk", type=click.IntRange(1), default=64, show_default=True, help="Tokens of a chunk.")
@click.option(
    "--engine",
    type=click.Choice(["exact", "lance"]),
    default="exact",
    show_default=True,
    help="exact compares every row; lance has an index, for more than 500,000 rows (extra lamina[retrieval]).",
)
@click.option("--uri", default="", help="Where lance keeps its rows: another directory, or s3://...")
@click.option(
    "--batch", type=click.IntRange(1), default=1024, show_default=True, help="Chunks put on the disk at once."
)
@click.option("--dtype", help="That the embedder computes in: float32, bfloat16, float16. [default: as stored]")
@click.option("--device", default="cpu", show_default=True, help="Where the embedder lies: cpu, cuda, cuda:1.")
@click.option("--glob", help="Files taken out of directories. [default: text, JSONL and Parquet by suffix]")
@click.option("--lines", is_flag=True, help="Each line of a text file is a document.")
@click.option("--field", default="text", show_default=True, help="Field of a row that holds the text.")
@click.option(
    "--characters",
    type=click.Choice(["error", "replace", "skip"]),
    default="error",
    show_default=True,
    help="What is no text (not UTF-8, NUL): refused, replaced, or its document left out.",
)
@click.option("--states", is_flag=True, help="For kNN-LM: the state of EMBEDDER, a causal model, at every token.")
@click.option("--window", type=int, help="With --states: tokens read at once. [default: the context, at most 2048]")
@click.option("--force", is_flag=True, help="Replace a database; it stays readable until the new one is whole.")
def build(
    out: Output,
    corpus: tuple[str, ...],
    output: Path,
    embedder: str,
    tokenizer: str | None,
    chunk: int,
    engine: str,
    uri: str,
    batch: int,
    dtype: str | None,
    device: str,
    states: bool,
    window: int | None,
    force: bool,
    **given: Any,
) -> None:
    """Make a database of CORPUS: texts as for lamina data prepare, or one directory that it prepared.

    Each chunk of a document is stored with its vector and what continues it; with --states each token with the state
    before it. What was killed goes on after the last whole batch when it is run again.
    """
    import lamina
    from lamina.retrieve import Embedder, Engine
    from lamina.retrieve.build import build as make
    from lamina.retrieve.build import build_states, check_free
    from lamina.retrieve.states import keyed

    check_free(output, force)
    if window is not None and not states:
        raise LaminaError("--window is for --states; an embedder reads a chunk at a time")
    chosen = Engine(engine, uri)  # pyright: ignore[reportArgumentType]
    tokenizer = embedder if states and tokenizer is None else tokenizer
    model = lamina.load(embedder, dtype, device) if states else Embedder(embedder, dtype, device)
    if not isinstance(model, Embedder):
        keyed(model)  # before the text is read
    started = time.monotonic()
    line = Line(out)
    try:
        prepared = _prepared(corpus, output, tokenizer, given, line)
        line.begin()
        more: dict[str, Any] = {"engine": chosen, "batch": batch, "force": force, "report": line.show}
        if isinstance(model, Embedder):
            spec = make(prepared, output, model, chunk=chunk, **more)
        else:
            spec = build_states(prepared, output, model, source=embedder, window=window, **more)
    finally:
        line.clear()
    seconds = time.monotonic() - started
    rate = line.made / max(line.seconds, 1e-9)
    document = {"directory": str(output), **_about(spec), "seconds": round(seconds, 3), "made": line.made}
    done = f"{line.made:,} {'states' if states else 'chunks'} made in {duration(line.seconds)}, {rate:,.1f} a second"
    out.result(document, [*_lines(output, spec), done])


SEARCHING = (
    click.option("--embedder", help="SOURCE of the embedder, where it has moved. [default: as at the build]"),
    click.option("--device", default="cpu", show_default=True, help="Where vectors are compared: cpu, cuda, cuda:1."),
    click.option("--faiss", is_flag=True, help="Find rows by an index of faiss, made once (extra lamina[faiss])."),
    click.option(
        "--trust-index", type=click.Path(path_type=Path), help="With --faiss: an index from elsewhere, trusted."
    ),
)
"""What every command that looks for neighbours may be told."""


def searching(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of commands that look for neighbours."""
    for option in reversed(SEARCHING):
        function = option(function)
    return function


@command(QUERY)
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("text", required=False)
@click.option("--file", type=click.Path(path_type=Path), help="The text is in a file; - for standard input.")
@click.option("--count", type=click.IntRange(1, 1000), default=3, show_default=True, help="Neighbours to show.")
@searching
def query(
    out: Output,
    directory: Path,
    text: str | None,
    file: Path | None,
    count: int,
    embedder: str | None,
    device: str,
    faiss: bool,
    trust_index: Path | None,
) -> None:
    """The chunks of DIRECTORY that are nearest to TEXT, with what continues them."""
    from lamina.retrieve import open_database

    if (text is None) is (file is None):
        raise LaminaError("give TEXT, or --file FILE; one of them")
    text = _from(file) if text is None else text
    if not text.strip():
        raise LaminaError("the text is empty; there is nothing to look for")
    database = open_database(directory, device=device, embedder=embedder)
    _accelerate(out, database, faiss, trust_index)
    warn_of_lost(out, database.embedder.tokenizer, text)
    vectors = database.embedder([text])
    if database.embedder.cut:
        out.note(f"lamina: warning: only the first {database.embedder.room} tokens of the text are looked for")
    found = database.search(vectors, count)
    rows, lines = [], []
    for row, distance in zip(found.rows[0].tolist(), found.distances[0].tolist()):
        if row < 0:
            break
        value = database.values(found.rows.new_tensor([row]))[0]
        here, after = (_text(database.tokenizer, part) for part in value.chunk(2))
        document = int(database.document_of(found.rows.new_tensor(row)))
        name = database.name_of(document)
        rows.append(
            {
                "row": row,
                "distance": distance,
                "document": document,
                "source": name,
                "text": here,
                "continuation": after,
            }
        )
        lines += [f"{distance:.4f}  {name}, row {row:,}", f"  {shown(here)!r}", f"  {shown(after)!r}", ""]
    out.result({"directory": str(directory), "query": text, "neighbours": rows}, lines[:-1])


@command(INFO)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Read everything: hashes, vectors, ids, and the embedder if it is there.")
def info(out: Output, directory: Path, verify: bool) -> None:
    """What a database holds, and whether it is whole."""
    from lamina.retrieve import open_database

    database = open_database(directory)
    document: dict[str, Any] = {"directory": str(directory), **_about(database.spec), "verified": verify}
    lines = _lines(directory, database.spec)
    if verify:
        database.verify()
        assert database.embedder
        lines.append("all files, vectors and ids are as they were written, and the embedder is the same")
    out.result(document, lines)


@command(NEIGHBOURS)
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("prepared", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory to write.")
@click.option("--count", type=click.IntRange(1), default=2, show_default=True, help="Neighbours of each chunk.")
@click.option(
    "--batch", type=click.IntRange(1), default=1024, show_default=True, help="Chunks put on the disk at once."
)
@searching
def neighbours(
    out: Output,
    directory: Path,
    prepared: Path,
    output: Path,
    count: int,
    batch: int,
    embedder: str | None,
    device: str,
    faiss: bool,
    trust_index: Path | None,
) -> None:
    """The neighbours in DIRECTORY of every chunk of PREPARED text, for training, and how much of it they hold.

    Chunks of the same document are left out. What was killed goes on after the last whole batch when it is run again.
    """
    from lamina.data import open_prepared
    from lamina.retrieve import find_neighbours, open_database
    from lamina.retrieve.overlap import SHARES, overlaps

    database, text = open_database(directory, device=device, embedder=embedder), open_prepared(prepared)
    _accelerate(out, database, faiss, trust_index)
    line = Line(out)
    try:
        found = find_neighbours(database, text, output, count=count, batch=batch, report=line.show)
    finally:
        line.clear()
    longest = overlaps(found, text)
    asked = longest >= 0
    within = [int((asked & (longest <= share * found.spec.chunk)).sum()) for share in SHARES]
    shares = [{"share": share, "chunks": count} for share, count in zip(SHARES, within, strict=True)]
    document = {
        "directory": str(output),
        "chunks": found.spec.chunks,
        "searched": int(asked.sum()),
        "count": count,
        "missing": int((found.rows[asked] < 0).sum()),
        "overlap": shares,
    }
    rows = [(f"at most {100 * each['share']:g} % of its tokens in a row", f"{each['chunks']:,}") for each in shares]
    lines = [f"{output}: {count} neighbours of {int(asked.sum()):,} whole chunks, of {found.spec.chunks:,}"]
    out.result(document, [*lines, *table(("a neighbour holds", "chunks"), rows)])


@command(COPY)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory of the copy.")
@click.option("--engine", type=click.Choice(["exact", "lance"]), required=True, help="Of the copy.")
@click.option("--uri", default="", help="Where lance keeps its rows: another directory, or s3://...")
@click.option("--force", is_flag=True, help="Replace a database; it stays readable until the new one is whole.")
def copy(out: Output, directory: Path, output: Path, engine: str, uri: str, force: bool) -> None:
    """The rows of DIRECTORY in another engine; nothing is embedded again."""
    from lamina.retrieve import Engine, open_database
    from lamina.retrieve import copy as make

    line = Line(out)
    try:
        chosen = Engine(engine, uri)  # pyright: ignore[reportArgumentType]
        spec = make(open_database(directory), output, chosen, force=force, report=line.show)
    finally:
        line.clear()
    out.result({"directory": str(output), **_about(spec)}, _lines(output, spec))


command = click.Group(
    "index",
    commands={"build": build, "query": query, "info": info, "neighbours": neighbours, "copy": copy},
    help="Databases of text: build, query, info, neighbours, copy.",
    context_settings=NAMES,
)


def _prepared(
    corpus: tuple[str, ...], output: Path, tokenizer: str | None, given: dict[str, Any], line: Line
) -> Prepared:
    """The prepared directory that CORPUS is, or CORPUS prepared beside the database."""
    import lamina
    from lamina.data.manifest import NAME
    from lamina.data.prepare import NothingLeft, PrepareSpec
    from lamina.data.sources import find
    from lamina.retrieve.build import corpus_of

    if len(corpus) == 1 and (Path(corpus[0]) / NAME).is_file():
        from lamina.data import open_prepared

        prepared = open_prepared(corpus[0])
        if tokenizer is not None:
            prepared.check_tokenizer(lamina.tokenizer(tokenizer))
        return prepared
    if tokenizer is None:
        raise LaminaError("--tokenizer: name the SOURCE of the model that will read the chunks; they are ids of it")
    spec = PrepareSpec(
        fields=(given["field"],), split_on="\n" if given["lines"] else None, characters=given["characters"]
    )
    try:
        return corpus_of(find(corpus, given["glob"]), output, lamina.tokenizer(tokenizer), spec, line.reading)
    except NothingLeft as error:
        raise Failed(str(error)) from None


def _accelerate(out: Output, database: Database, faiss: bool, trusted: Path | None) -> None:
    if trusted is not None and not faiss:
        raise LaminaError("--trust-index is for --faiss")
    if faiss:
        database.accelerate(trusted)
        found = database.store
        out.note(f"faiss: recall of the 10 nearest {found.recall:.3f}, {found.probes} lists looked into")  # pyright: ignore[reportAttributeAccessIssue]


def _from(file: Path | None) -> str:
    assert file is not None
    try:
        return standard_input() if str(file) == "-" else file.read_text(encoding="utf-8")
    except OSError as error:
        raise LaminaError(f"{file}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise LaminaError(f"{file}: not UTF-8 at byte {error.start:,}") from None


def _text(tokenizer: Any, ids: Any) -> str:
    return tokenizer.decode(ids[ids >= 0].tolist())


def _about(spec: IndexSpec) -> dict[str, Any]:
    embedder = {key: value for key, value in spec.embedder.to_dict().items() if key != "type"}
    found = {name: getattr(spec, name) for name in ("rows", "chunk", "documents", "width", "engine", "tokenizer")}
    found |= {"embedder": embedder, "sources": len(spec.origins), "notes": list(spec.notes)}
    return found | {"bytes": sum(file.bytes for file in spec.files), "table": _table(spec.table)}


def _table(found: TableSpec | None) -> dict[str, Any] | None:
    return None if found is None else {key: value for key, value in found.to_dict().items() if key != "type"}


def _lines(directory: Path, spec: IndexSpec) -> list[str]:
    embedder, rows = spec.embedder, [(f"{spec.rows:,}", f"{spec.documents:,}", str(spec.chunk), str(spec.width))]
    lines = [str(directory), *table(("rows", "documents", "chunk", "width"), rows)]
    lines.append(f"embedder {embedder.source} ({embedder.dtype}, {embedder.pooling}, SHA-256 {embedder.hash[:12]}...)")
    lines.append(f"tokenizer SHA-256 {spec.tokenizer[:12]}...; {size(sum(file.bytes for file in spec.files))} of files")
    if spec.table is None:
        lines.append("engine exact: every row is compared")
        if spec.rows > 500_000:
            lines.append("that is slow for so many rows: --engine lance has an index")
    elif spec.table.lists:
        at = f"{spec.table.probes} of {spec.table.lists} lists are looked into"
        lines.append(f"engine lance: {at}; recall of the 10 nearest {spec.table.recall:.3f}, measured at the build")
    else:
        lines.append("engine lance: too few rows for an index, so every row is compared")
    return [*lines, *spec.notes]


class Line:
    """Progress: one line that is written over on a terminal, else a line now and then."""

    def __init__(self, out: Output) -> None:
        self.out, self.last = out, -EVERY
        self.made, self.seconds = 0, 0.0
        self.begin()

    def begin(self) -> None:
        """What is timed begins now."""
        self.started = time.monotonic()

    def reading(self, progress: Reading) -> None:
        part = 100 * progress.bytes / max(progress.total, 1)
        self._say(f"reading: {part:.0f} %, {progress.tokens:,} tokens, {Path(progress.source).name}")

    def show(self, progress: Progress) -> None:
        if progress.what in ("embedding", "searching"):
            self.made, self.seconds = progress.rows - progress.begun, time.monotonic() - self.started
        line = f"{progress.what}: {progress.rows:,} of {progress.total:,}"
        if self.made and progress.rows < progress.total:
            rate = self.made / self.seconds
            line += f", {rate:,.1f} a second, {duration((progress.total - progress.rows) / rate)} left"
        self._say(line)

    def _say(self, line: str) -> None:
        now, watched = time.monotonic(), self.out.progress
        if self.out.quiet or now - self.last < (0.2 if watched else EVERY):
            return
        self.last = now
        if watched:
            sys.stderr.write(f"\r\x1b[K{line}")
            sys.stderr.flush()
        else:
            self.out.note(line)

    def clear(self) -> None:
        if self.out.progress:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
