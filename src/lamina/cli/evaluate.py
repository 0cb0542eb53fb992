"""`lamina evaluate`: how well a model predicts the texts in files, or does the tasks of lm-evaluation-harness."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lamina.cli.output import Output, table
from lamina.cli.program import command
from lamina.cli.prompts import load, loading, named
from lamina.errors import LaminaError

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.generation import Score
    from lamina.generation.files import TextFile
    from lamina.retrieve import KnnLM
    from lamina.text import Tokenizer

EXAMPLES = """
lamina evaluate smollm2-135m book.txt
lamina evaluate smollm2-135m a.txt b.txt --window 1024 --stride 512 --json
lamina evaluate smollm2-135m book.txt --knn states --weight 0.25 --temperature 100
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
@click.option("--count", type=click.IntRange(1), help="With --knn: neighbours of each token. [default: 1024]")
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
    tasks: tuple[str, ...],
    **given: Any,
) -> None:
    """Perplexity and bits per byte of FILES (UTF-8 text), each by itself and together; or what --tasks come to.

    Every token is scored once, with at least WINDOW - STRIDE tokens before it where the text has them. Files are read
    piece by piece. Bits per byte compare models with different tokenizers; perplexities do not.

    Tasks need the extra lamina[eval] and the data that they name. All options of the harness are those of
    `python -m lamina.harness --model lamina --model_args source=SOURCE --tasks NAME`.
    """
    mixing = {name: value for name in ("weight", "count", "temperature") if (value := given.pop(name)) is not None}
    if mixing and knn is None:
        raise LaminaError(f"--{next(iter(mixing))} is for --knn")
    if tasks:
        if files or knn is not None or window is not None or stride is not None:
            raise LaminaError("--tasks brings its own texts: FILES, --knn, --window and --stride are not for it")
        return _tasks(out, source, tasks, given)
    for name in TASKS_ONLY:
        if given.pop(name) not in (None, False):
            raise LaminaError(f"--{name.replace('_', '-')} is for --tasks")
    if not files:
        raise LaminaError("no FILES and no --tasks: name a text, or a task of lm-evaluation-harness")
    import lamina
    from lamina.generation import Score, measure
    from lamina.generation.files import TextFile
    from lamina.generation.perplexity import window_of

    for path in files:
        if not path.is_file():
            raise LaminaError(f"{path}: no such file")
    tokenizer = lamina.tokenizer(source)
    model = load(source, given)
    window, stride = window_of(model, window, stride)
    around = tokenizer.encode("")
    begin = around[0] if around and around[0] == tokenizer.bos else None
    mixed = None
    if knn is not None:
        from lamina.retrieve import KnnLM, open_database

        mixed = KnnLM(model, open_database(knn), **mixing)
    scores: list[Score] = []
    for path in files:
        text, found = TextFile(path, tokenizer), Score()
        first = _First(text)
        block = None if mixed is None else mixed.block(_same(mixed, tokenizer, path))
        for found in measure(model, first, begin=begin, window=window, stride=stride, block=block):
            _progress(out, path, text, found)
        if found.tokens == 0:
            raise LaminaError(f"{path}: {text.bytes} bytes give no token to predict; a text is needed")
        # The first token is not predicted where nothing stands before it, so its bytes do not count either.
        unscored = 0 if begin is not None else len(tokenizer.decode([first.id], skip_special=False).encode())
        found.bytes = text.bytes - unscored
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


class _First:
    """The ids of a file one by one, noting the first."""

    def __init__(self, text: TextFile) -> None:
        self.text, self.id = text, 0

    def __iter__(self) -> Any:
        first = True
        for part in self.text:
            if first and part:
                self.id, first = part[0], False
            yield from part


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
