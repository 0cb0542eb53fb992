"""`lamina data`: prepare texts for training, and look at what was prepared."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lamina.cli.corpus import corpus_options, wanted
from lamina.cli.errors import Failed
from lamina.cli.output import Output, duration, table
from lamina.cli.program import NAMES, command
from lamina.cli.progress import Line
from lamina.figures import short, size

if TYPE_CHECKING:
    from lamina.data import Manifest
    from lamina.data.prepare import Progress

COLUMNS = {
    "text": "text",
    "source,target": "pairs",
    "text,label": "classification",
    "tokens,labels": "token-classification",
    "first,second": "contrastive",
    "first,second,score": "contrastive",
}
PREPARE = """
lamina data prepare book.txt -o book --tokenizer characters --validation 0.1
lamina data prepare docs/ -o docs-8k --tokenizer train:bpe:8192 --special gpt
lamina data prepare pairs.jsonl -o en-de --columns source,target --field source=en --field target=de --tokenizer t5/
"""
SHOW = """
lamina data show book
lamina data show book/train --verify --json
"""


@command(PREPARE)
@click.argument("sources", nargs=-1, required=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory to write.")
@click.option(
    "--tokenizer", required=True, help="SOURCE, train:KIND:SIZE (bpe, unigram, wordpiece), characters or bytes."
)
@click.option("--special", default="none", show_default=True, help="Of a new tokenizer: none, gpt, bert, t5 or bart.")
@click.option("--train-bytes", default=100_000_000, show_default=True, help="Text that a new tokenizer learns from.")
@click.option(
    "--columns",
    type=click.Choice(list(COLUMNS)),
    metavar="NAMES",
    default="text",
    show_default=True,
    help="Of each row: text; source,target; text,label; tokens,labels; first,second or first,second,score.",
)
@click.option("--labels", default="", help="Names of labels by number: a,b,c. [default: in the order met]")
@corpus_options
@click.option("--validation", default=0.0, show_default=True, help="Part kept for validation.")
@click.option(
    "--split",
    type=click.Choice(["documents", "end"]),
    help="Which part. [default: the end of one text, else documents]",
)
@click.option("--no-end", is_flag=True, help="No end token after each document.")
@click.option("--control", is_flag=True, help="Names of control tokens in a text mean the token.")
@click.option("--force", is_flag=True, help="Replace a prepared directory.")
def prepare(
    out: Output,
    sources: tuple[str, ...],
    output: Path,
    tokenizer: str,
    columns: str,
    labels: str,
    glob: str | None,
    split: str | None,
    no_end: bool,
    special: str,
    train_bytes: int,
    force: bool,
    **given: Any,
) -> None:
    """Turn SOURCES into tokens on disk: text files, JSONL (also .gz), Parquet, directories, hf:owner/name.

    A text file is one document unless --lines or --split-on divide it; each row of JSONL, Parquet or a data set is one.
    Files are read piece by piece. What was killed goes on after the last whole file when it is run again.
    """
    from lamina.data.prepare import NothingLeft
    from lamina.data.prepare import prepare as make
    from lamina.data.sources import find
    from lamina.data.wishes import PrepareSpec

    wishes = wanted(given, columns.split(","))
    found = find(sources, glob)
    alone = len(found) == 1 and found[0].kind == "text" and wishes["split_on"] is None
    spec = PrepareSpec(
        kind=COLUMNS[columns],  # pyright: ignore[reportArgumentType]
        split=split or ("end" if alone and given["validation"] else "documents"),  # pyright: ignore[reportArgumentType]
        end=not no_end,
        labels=tuple(labels.split(",")) if labels else (),
        **wishes,
        **given,
    )
    started = time.monotonic()
    line = _Line(out)
    try:
        made = make(
            found,
            output,
            _tokenizer(tokenizer),
            spec,
            special=special,
            train_bytes=train_bytes,
            force=force,
            report=line.show,
        )
    except NothingLeft as error:
        raise Failed(str(error)) from None
    finally:
        line.clear()
    parts = {name or ".": _about(output / name, manifest) for name, manifest in made.items()}
    seconds = time.monotonic() - started
    read = sum(source.bytes for source in found)
    document = {"directory": str(output), "parts": parts, "bytes": read, "seconds": round(seconds, 3)}
    shown = _lines(parts)
    shown.append(f"{size(read)} in {seconds:.1f} s, {read / seconds / 1e6:.2f} MB/s")
    out.result(document, shown)


@command(SHOW)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Read everything: hashes, ids, and the sources if they are still there.")
@click.option("--documents", type=click.IntRange(0, 100), default=1, show_default=True, help="Documents to show.")
def show(out: Output, directory: Path, verify: bool, documents: int) -> None:
    """What a prepared DIRECTORY holds: its columns, sources and first documents."""
    from lamina.data import open_prepared
    from lamina.data.manifest import NAME

    names = [name for name in ("train", "validation") if (directory / name / NAME).is_file()]
    names = [""] if (directory / NAME).is_file() or not names else names
    parts, texts = {}, []
    for name in names:
        prepared = open_prepared(directory / name, verify=verify)
        parts[name or "."] = _about(directory / name, prepared.manifest)
        tokenizer = prepared.tokenizer()
        parts[name or "."]["hash"] = prepared.hash
        parts[name or "."]["changed"] = prepared.changed(contents=verify)
        for line in parts[name or "."]["changed"]:
            out.note(f"lamina: warning: {line}")
        for i in range(min(documents, prepared.documents)):
            for column, stream in prepared.columns.items():
                if stream.stream.dtype == "int32":
                    continue
                text = tokenizer.decode(stream[i][:64], skip_special=False)
                texts.append(f"{name or '.'}, {column} {i}: {text!r}")
    out.result({"directory": str(directory), "parts": parts}, [*_lines(parts), *texts])


command = click.Group(
    "data",
    commands={"prepare": prepare, "show": show},
    help="Prepare texts for training, and look at what was prepared.",
    context_settings=NAMES,
)


def _tokenizer(name: str) -> Any:
    if name in ("characters", "bytes"):
        return name
    if name.startswith("train:"):
        return name.removeprefix("train:")
    import lamina

    return lamina.tokenizer(name)


def _about(directory: Path, manifest: Manifest) -> dict[str, Any]:
    sums = {name: sum(getattr(each, name) for each in manifest.sources) for name in ("damaged", "empty", "skipped")}
    return {
        "path": str(directory),
        "kind": manifest.kind,
        "documents": manifest.documents,
        "columns": {column.name: column.tokens for column in manifest.columns},
        "vocabulary": manifest.vocabulary,
        "tokenizer": manifest.tokenizer,
        "end": manifest.end,
        "labels": list(manifest.labels),
        "sources": [
            {key: value for key, value in each.to_dict().items() if key != "type"} for each in manifest.sources
        ],
        "notes": list(manifest.notes),
        **sums,
    }


def _lines(parts: dict[str, dict[str, Any]]) -> list[str]:
    rows, more = [], []
    for name, part in parts.items():
        for column, tokens in part["columns"].items():
            rows.append((f"{name} {column}", f"{part['documents']:,}", f"{tokens:,}", f"{part['vocabulary']:,}"))
    for source in next(iter(parts.values()))["sources"]:
        counts = [f"{source[key]:,} {key}" for key in ("damaged", "empty", "skipped", "mended", "lost") if source[key]]
        if counts:
            more.append(f"{source['name']}: {', '.join(counts)}")
    labels = next(iter(parts.values()))["labels"]
    if labels:
        more.append(f"labels: {', '.join(labels[:20])}{', ...' if len(labels) > 20 else ''}")
    more += next(iter(parts.values()))["notes"]
    return [*table(("part", "documents", "tokens", "vocabulary"), rows), *more]


class _Line(Line):
    """How far the sources are read."""

    def __init__(self, out: Output) -> None:
        self.started = time.monotonic()
        super().__init__(out, last=self.started)

    def show(self, progress: Progress) -> None:
        rate = progress.bytes / max(time.monotonic() - self.started, 1e-9)
        line = f"{Path(progress.source).name}: {short(progress.tokens, 'tokens')}, {rate / 1e6:.2f} MB/s"
        if progress.total > progress.bytes and rate:
            part, left = 100 * progress.bytes / progress.total, (progress.total - progress.bytes) / rate
            line += f", {part:.0f} %, {duration(left)} left"
        self.say(line)
