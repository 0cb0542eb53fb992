"""`lamina index build|add|remove|copy`: what writes a generation of a database."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lamina.cli.corpus import corpus_options, wanted
from lamina.cli.errors import Failed
from lamina.cli.index_shown import about, lines_of
from lamina.cli.output import Output, duration
from lamina.cli.program import command
from lamina.cli.progress import Rows
from lamina.errors import LaminaError

if TYPE_CHECKING:
    from lamina.data import Prepared
    from lamina.retrieve import Database, IndexSpec

BUILD = """
lamina index build docs/ -o docs-index --embedder minilm-l6 --tokenizer smollm2-135m
lamina index build prepared/train -o index --embedder minilm-l6 --engine lance
"""
ADD = """
lamina index add docs-index new-docs/
lamina index add docs-index docs/ --replace
"""
REMOVE = """
lamina index remove docs-index docs/old.md
lamina index remove docs-index "docs/notes.jsonl#17"
"""
COPY = """
lamina index copy docs-index -o docs-lance --engine lance
"""


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
@corpus_options
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
    from lamina.retrieve.generations import CORPUS
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
    line = Rows(out)
    try:
        named = None if tokenizer is None else lamina.tokenizer(tokenizer)
        prepared = _prepared(corpus, output / CORPUS, named, given, line)
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
    document = {"directory": str(output), **about(spec), "seconds": round(seconds, 3), "made": line.made}
    done = f"{line.made:,} {'states' if states else 'chunks'} made in {duration(line.seconds)}, {rate:,.1f} a second"
    out.result(document, [*lines_of(output, spec), done])


@command(ADD)
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("corpus", nargs=-1, required=True)
@click.option("--replace", is_flag=True, help="Remove documents from files of the same names in the same step.")
@click.option("--embedder", help="SOURCE of the embedder, where it has moved. [default: as at the build]")
@click.option("--device", default="cpu", show_default=True, help="Where the embedder lies: cpu, cuda, cuda:1.")
@click.option(
    "--batch", type=click.IntRange(1), default=1024, show_default=True, help="Chunks put on the disk at once."
)
@corpus_options
def add(
    out: Output,
    directory: Path,
    corpus: tuple[str, ...],
    replace: bool,
    embedder: str | None,
    device: str,
    batch: int,
    **given: Any,
) -> None:
    """Add the documents of CORPUS, texts or one prepared directory, to the database DIRECTORY.

    They are chunked and embedded as the others; those that it holds already are left out. Who reads it keeps the
    generation that was opened. What was killed goes on when it is run again.
    """
    from lamina.durable import remove as removed
    from lamina.retrieve import add as make
    from lamina.retrieve import open_database
    from lamina.retrieve.generations import ADDED

    database, line = open_database(directory, device=device, embedder=embedder), Rows(out)
    if database.spec.embedder.pooling != "state":
        assert database.embedder  # the right one, before the text is read
    try:
        prepared = _prepared(corpus, directory / ADDED, database.tokenizer, given, line)
        line.begin()
        spec = make(database, prepared, replace=replace, batch=batch, close=True, report=line.show)
    finally:
        line.clear()
    removed(directory / ADDED)
    _changed(out, database, spec)


@command(REMOVE)
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("document", nargs=-1, required=True)
def remove(out: Output, directory: Path, document: tuple[str, ...]) -> None:
    """Take each DOCUMENT, FILE#NUMBER as in the answers of query, or all of a FILE, out of the database DIRECTORY.

    The documents after it have other numbers then. Who reads it keeps the generation that was opened.
    """
    from lamina.retrieve import open_database
    from lamina.retrieve import remove as make

    database, line = open_database(directory), Rows(out)
    try:
        spec = make(database, document, close=True, report=line.show)
    finally:
        line.clear()
    _changed(out, database, spec)


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

    line = Rows(out)
    try:
        chosen = Engine(engine, uri)  # pyright: ignore[reportArgumentType]
        spec = make(open_database(directory), output, chosen, force=force, report=line.show)
    finally:
        line.clear()
    out.result({"directory": str(output), **about(spec)}, lines_of(output, spec))


def _changed(out: Output, before: Database, spec: IndexSpec) -> None:
    """What became of a database."""
    before.close()
    from lamina.retrieve.accelerator import stale
    from lamina.retrieve.manifest import hash_of

    document = {"directory": str(before.directory), **about(spec), "before": about(before.spec)}
    lines = lines_of(before.directory, spec)
    lines.append(f"before: {before.spec.rows:,} rows of {before.spec.documents:,} documents")
    if stale(before.location, hash_of(spec)):
        lines.append("its index of faiss is stale: it is made anew when --faiss is next asked for")
    out.result(document, lines)


def _prepared(corpus: tuple[str, ...], path: Path, tokenizer: Any, given: dict[str, Any], line: Rows) -> Prepared:
    """The prepared directory that CORPUS is, or CORPUS prepared at `path`. tokenizer: None where none was named."""
    from lamina.data import open_prepared
    from lamina.data.manifest import NAME
    from lamina.data.prepare import NothingLeft, PrepareSpec
    from lamina.data.sources import find
    from lamina.retrieve.build import corpus_of

    glob, wishes = given.pop("glob"), wanted(given)
    if len(corpus) == 1 and (Path(corpus[0]) / NAME).is_file():
        prepared = open_prepared(corpus[0])
        if tokenizer is not None:
            prepared.check_tokenizer(tokenizer)
        return prepared
    if tokenizer is None:
        raise LaminaError("--tokenizer: name the SOURCE of the model that will read the chunks; they are ids of it")
    try:
        return corpus_of(find(corpus, glob), path, tokenizer, PrepareSpec(**wishes), line.reading)
    except NothingLeft as error:
        raise Failed(str(error)) from None
