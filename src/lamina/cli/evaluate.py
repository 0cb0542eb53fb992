"""`lamina evaluate`: how well a model predicts the texts in files, or does the tasks of lm-evaluation-harness."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lamina.cli.output import Output, table
from lamina.cli.program import command
from lamina.cli.progress import Rows
from lamina.cli.prompts import load, loading, named
from lamina.errors import LaminaError

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.data import Prepared
    from lamina.generation import Score
    from lamina.generation.files import TextFile
    from lamina.retrieve import KnnLM
    from lamina.text import Tokenizer

EXAMPLES = """
lamina evaluate smollm2-135m book.txt
lamina evaluate smollm2-135m a.txt b.txt --window 1024 --stride 512 --json
lamina evaluate smollm2-135m book.txt --knn states --weight 0.25 --temperature 100
lamina evaluate runs/retro/model book.txt --index docs-index --json
lamina evaluate runs/retro/model prepared/validation --index docs-index --neighbours prepared/near-validation
lamina evaluate smollm2-135m --tasks arc_easy --tasks piqa --limit 100 --batch-size 8
"""
TASKS_ONLY = ("limit", "shots", "chat", "include_path", "batch_size")


@command(EXAMPLES)
@click.argument("source")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option("--window", type=int, help="Tokens read at once. [default: the context, at most 2048]")
@click.option("--stride", type=int, help="Tokens scored in each window after the first. [default: half of it]")
@click.option("--knn", type=click.Path(path_type=Path), help="kNN-LM: a database that index build --states made.")
@click.option("--weight", type=float, help="With --knn: how much of the probability is its. [default: 0.25]")
@click.option("--index", type=click.Path(path_type=Path), help="Of a model that retrieves: the database that it reads.")
@click.option(
    "--neighbours",
    type=click.Path(path_type=Path),
    help="With --index: what index neighbours found for prepared FILES.",
)
@click.option(
    "--count",
    type=click.IntRange(1),
    help="Neighbours: with --knn of each token, with --index of each chunk. [default: 1024, 2]",
)
@click.option("--temperature", type=float, help="With --knn: what distances are divided by. [default: 1]")
@click.option("--tasks", multiple=True, metavar="NAME", help="A task of lm-evaluation-harness; a,b or repeated.")
@click.option("--limit", type=click.IntRange(1), help="Only the first questions of each task.")
@click.option("--shots", type=click.IntRange(0), help="Examples before each question. [default: as the task says]")
@click.option("--chat", is_flag=True, help="Ask by the model's chat template.")
@click.option("--include-path", type=click.Path(), help="A directory with tasks of your own.")
@click.option("--batch-size", type=click.IntRange(1), help="Rows read at once for tasks. [default: 1]")
@loading
def evaluate(
    out: Output,
    source: str,
    files: tuple[Path, ...],
    window: int | None,
    stride: int | None,
    knn: Path | None,
    index: Path | None,
    neighbours: Path | None,
    tasks: tuple[str, ...],
    **given: Any,
) -> None:
    """Perplexity and bits per byte of FILES (UTF-8 text), each by itself and together; or what --tasks come to.

    Every token is scored once, with at least WINDOW - STRIDE tokens before it where the text has them. Files are read
    piece by piece. Bits per byte compare models with different tokenizers; perplexities do not.

    With --index both are measured with the neighbours that the database has and without, and split by how long a run of
    tokens a chunk shares with them: what is copied and what is understood. FILES may be one prepared directory then.

    Tasks need the extra lamina[eval] and the data that they name. All options of the harness are those of
    `python -m lamina.harness --model lamina --model_args source=SOURCE --tasks NAME`.
    """
    mixing = {name: value for name in ("weight", "count", "temperature") if (value := given.pop(name)) is not None}
    if index is not None and knn is not None:
        raise LaminaError("--index and --knn: choose one")
    if mixing and knn is None and not (index is not None and set(mixing) == {"count"}):
        raise LaminaError(f"--{next(iter(mixing))} is for --knn")
    if neighbours is not None and index is None:
        raise LaminaError("--neighbours is for --index: the database that they are rows of")
    if tasks:
        if files or knn is not None or index is not None or window is not None or stride is not None:
            raise LaminaError(
                "--tasks brings its own texts: FILES, --knn, --index, --window and --stride are not for it"
            )
        return _tasks(out, source, tasks, given)
    for name in TASKS_ONLY:
        if given.pop(name) not in (None, False):
            raise LaminaError(f"--{name.replace('_', '-')} is for --tasks")
    if not files:
        raise LaminaError("no FILES and no --tasks: name a text, or a task of lm-evaluation-harness")
    if index is not None:
        reading = {"window": window, "stride": stride, "count": mixing.get("count"), "neighbours": neighbours}
        return _by_overlap(out, source, files, index, given, reading)
    import lamina
    from lamina.generation import Score, measure
    from lamina.generation.files import Ids, TextFile
    from lamina.generation.perplexity import window_of

    for path in files:
        if not path.is_file():
            raise LaminaError(f"{path}: no such file")
    tokenizer = lamina.tokenizer(source)
    model = load(source, given)
    window, stride = window_of(model, window, stride)
    mixed = None
    if knn is not None:
        from lamina.retrieve import KnnLM, open_database

        mixed = KnnLM(model, open_database(knn), **mixing)
    scores: list[Score] = []
    for path in files:
        text, found = TextFile(path, tokenizer), Score()
        ids = Ids(text, tokenizer)
        block = None if mixed is None else mixed.block(_same(mixed, tokenizer, path))
        for found in measure(model, ids, begin=ids.begin, window=window, stride=stride, block=block):
            _progress(out, path, text, found)
        if found.tokens == 0:
            raise LaminaError(f"{path}: {text.bytes} bytes give no token to predict; a text is needed")
        found.bytes = ids.predicted(text.bytes)
        scores.append(found)
        _progress(out, path, text, None)
        if text.lost:
            lost = named(text.lost)
            out.note(f"lamina: warning: {path}: this tokenizer has nothing for {lost}: the model does not see them")
    total = sum(scores, start=Score())
    document = {
        "source": source,
        "window": window,
        "stride": stride,
        "knn": None if knn is None else str(knn),
        "files": [{"file": str(path), **_figures(each)} for path, each in zip(files, scores, strict=True)],
        **_figures(total),
    }
    rows = [_row(str(path), each) for path, each in zip(files, scores, strict=True)]
    rows += [_row("together", total)] if len(files) > 1 else []
    header = ("file", "perplexity", "bits per byte", "tokens", "tokens/s")
    out.result(document, [*table(header, rows), f"windows of {window} tokens, {stride} new ones in each"])


def _by_overlap(
    out: Output,
    source: str,
    files: tuple[Path, ...],
    index: Path,
    given: dict[str, Any],
    reading: dict[str, Any],
) -> None:
    """With the neighbours that a database has, and without, by how much of each chunk they hold."""
    import lamina
    from lamina.data import open_prepared
    from lamina.data.manifest import NAME as MANIFEST
    from lamina.generation import Score
    from lamina.retrieve import find_neighbours, open_database, open_neighbours
    from lamina.retrieve.overlap import by_overlap, losses, overlaps, windows_of

    near, count = reading["neighbours"], reading["count"]
    ready = len(files) == 1 and (files[0] / MANIFEST).is_file()
    if near is not None and (not ready or count is not None):
        raise LaminaError("--neighbours are those of one prepared directory, as many as were looked for: no --count")
    tokenizer, model = lamina.tokenizer(source), load(source, given)
    database = open_database(index, device=given["device"])
    database.check_reader(model.spec, tokenizer)
    chunk = database.spec.chunk
    window, stride = windows_of(model, chunk, reading["window"], reading["stride"])
    line = Rows(out)
    with tempfile.TemporaryDirectory() as folder:
        text = open_prepared(files[0]) if ready else _prepared(files, Path(folder) / "text", tokenizer)
        text.check_tokenizer(tokenizer)
        try:
            if near is None:
                found = find_neighbours(database, text, Path(folder) / "neighbours", count=count or 2, report=line.show)
            else:
                found = open_neighbours(near, database, text)
        finally:
            line.clear()
        longest = overlaps(found, text)
        each = [losses(model, text, chunk, window, stride, read) for read in (None, found)]
        shares = [by_overlap(longest, one, chunk) for one in each]
    whole = [Score(int(one.tokens.sum()), int(one.bytes.sum()), float(one.nats.sum())) for one in each]
    rows = [(f"at most {100 * a.share:g} %", a.chunks, a.score, b.score) for a, b in zip(*shares, strict=True)]
    rows.append(("everything", len(longest), whole[0], whole[1]))
    document = {
        "source": source,
        "index": str(index),
        "count": found.spec.count,
        "chunk": chunk,
        "window": window,
        "stride": stride,
        "files": [str(path) for path in files],
        "overlap": [{"share": share.share, **_compared(*row[1:])} for share, row in zip(shares[0], rows, strict=False)],
        **_compared(*rows[-1][1:]),
    }
    header = ("a neighbour holds", "chunks", "tokens", "perplexity", "with neighbours", "bits per byte", "with")
    lines = [
        (name, f"{chunks:,}", f"{without.tokens:,}", *_beside(without, beside, "perplexity", 3),
         *_beside(without, beside, "bits_per_byte", 4))
        for name, chunks, without, beside in rows
    ]  # fmt: skip
    said = f"windows of {window} tokens, {stride} new ones in each; {found.spec.count} neighbours of chunks of {chunk}"
    out.result(document, [*table(header, lines), said])


def _prepared(files: tuple[Path, ...], directory: Path, tokenizer: Tokenizer) -> Prepared:
    """Files as prepared text: each is a document, whatever its name ends with."""
    from lamina.data import open_prepared
    from lamina.data.prepare import PrepareSpec, prepare
    from lamina.data.prepared import sha256
    from lamina.data.sources import Source

    for path in files:
        if not path.is_file():
            raise LaminaError(f"{path}: no such file, and no directory that lamina data prepare made")
    sources = [Source(str(path), "text", path.stat().st_size, sha256(path)) for path in files]
    prepare(sources, directory, tokenizer, PrepareSpec())
    return open_prepared(directory)


def _compared(chunks: int, without: Score, beside: Score) -> dict[str, Any]:
    both = {
        name: {"perplexity": one.perplexity, "bits_per_byte": one.bits_per_byte} if one.tokens else None
        for name, one in (("without", without), ("with", beside))
    }
    return {"chunks": chunks, "tokens": without.tokens, "bytes": without.bytes, **both}


def _beside(without: Score, beside: Score, name: str, digits: int) -> tuple[str, str]:
    a, b = (f"{getattr(one, name):.{digits}f}" if one.tokens else "-" for one in (without, beside))
    return a, b


def _same(mixed: KnnLM, tokenizer: Tokenizer, path: Path) -> Tensor:
    """(spans, 2): the documents of the database that this file is, which would only be copied."""
    import torch

    from lamina.data.prepared import sha256
    from lamina.generation.files import TextFile
    from lamina.retrieve.chunks import key_of

    key = torch.tensor([key_of(TextFile(path, tokenizer))])
    return mixed.database.own(key, [sha256(path)], torch.tensor([True]))[0]


def _tasks(out: Output, source: str, tasks: tuple[str, ...], given: dict[str, Any]) -> None:
    from lamina.harness.tasks import run

    if not out.progress:
        os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it when it is imported
    logging.getLogger("lm_eval").setLevel(logging.ERROR if out.quiet else logging.WARNING)
    options = {
        "limit": given["limit"],
        "shots": given["shots"],
        "chat": given["chat"],
        "include": given["include_path"],
    }
    model = {name: given[name] for name in ("dtype", "device", "compile", "quantize", "strict")}
    names = [name for task in tasks for name in task.split(",") if name]
    found = run(source, names, batch_size=given["batch_size"] or 1, **options, **model)
    rows = [
        (
            each.task,
            each.metric if each.filter == "none" else f"{each.metric} ({each.filter})",
            "-" if each.value is None else f"{each.value:.4f}",
            "" if each.error is None else f"{each.error:.4f}",
            f"{each.samples:,}",
            "" if each.shots is None else str(each.shots),
        )
        for each in found
    ]
    document = {"source": source, "tasks": [dataclasses.asdict(each) for each in found]}
    out.result(document, table(("task", "metric", "value", "std. error", "questions", "shots"), rows))


def _figures(score: Score) -> dict[str, Any]:
    return {
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "tokens_per_second": round(score.tokens_per_second, 2),
        "seconds": round(score.seconds, 3),
    }


def _row(name: str, score: Score) -> tuple[str, ...]:
    rate = f"{score.tokens_per_second:,.0f}"
    return (name, f"{score.perplexity:.3f}", f"{score.bits_per_byte:.4f}", f"{score.tokens:,}", rate)


def _progress(out: Output, path: Path, text: TextFile, score: Score | None) -> None:
    """One line that is written over, on a terminal only; None clears it."""
    if not out.progress:
        return
    line = ""
    if score is not None:
        line = f"{path.name}: {score.tokens:,} tokens, perplexity {score.perplexity:.2f}, "
        line += f"{score.tokens_per_second:,.0f} tokens/s"
    sys.stderr.write(f"\r\x1b[K{line}")
    sys.stderr.flush()


command = evaluate
