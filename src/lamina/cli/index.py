"""`lamina index`: databases of text, and the neighbours of a text in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lamina.cli.index_shown import about, lines_of
from lamina.cli.index_writing import add, build, copy, remove
from lamina.cli.output import Output, table
from lamina.cli.program import NAMES, command
from lamina.cli.progress import Rows
from lamina.cli.prompts import shown, standard_input, warn_of_lost
from lamina.errors import LaminaError

if TYPE_CHECKING:
    from lamina.retrieve import Database

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
    document: dict[str, Any] = {"directory": str(directory), **about(database.spec), "verified": verify}
    lines = lines_of(directory, database.spec)
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
    line = Rows(out)
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


command = click.Group(
    "index",
    commands={each.name or "": each for each in (build, query, info, neighbours, add, remove, copy)},
    help="Databases of text: build, query, info, neighbours, add, remove, copy.",
    context_settings=NAMES,
)


def _accelerate(out: Output, database: Database, faiss: bool, trusted: Path | None) -> None:
    if trusted is not None and not faiss:
        raise LaminaError("--trust-index is for --faiss")
    if faiss:
        database.accelerate(trusted)
        found = database.store
        if found.stale:  # pyright: ignore[reportAttributeAccessIssue]
            out.note("faiss: the index of an older generation was stale; it was made anew")
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
