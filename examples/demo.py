"""What lamina does, in a minute: a model as a stack of layers, text as it is written, sentences compared, a report.

lamina fetch smollm2-135m minilm-l6
python examples/demo.py [REPORT.html]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

import lamina
from lamina.figures import short, size
from lamina.generation import Writing
from lamina.report import Ranking, report

console = Console(highlight=False)
SENTENCES = (
    "A man is playing a guitar on stage.",
    "Someone performs music with a guitar.",
    "A band gives a concert in the park.",
    "The chef slices vegetables for the soup.",
    "The stock market fell sharply today.",
)


def headline(number: int, text: str) -> None:
    console.print(f"\n[bold cyan]{number}[/]  [bold]{text}[/]\n")


def stack(model: lamina.Model) -> None:
    """The layers, with what each costs at 1,024 tokens."""
    account = lamina.account(model, context=1024)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, side in (
        ("part", "left"),
        ("what it is", "left"),
        ("parameters", "right"),
        ("FLOPs/token", "right"),
        ("cache", "right"),
    ):
        table.add_column(name, justify=side, overflow="fold")
    for row in account.rows:
        times = f" × {row.repeat}" if row.repeat > 1 else ""
        parts = [(f"{row.name}{times}", row)]
        parts += [(f"  {part.name}", part) for part in row.parts]
        for name, part in parts:
            cache = size(part.cache_bytes) if part.cache_bytes else ""
            style = "bold" if part is row else ""
            what = next((inner.what for inner in part.parts if inner.name == "op"), part.what)
            cells = (name, what, f"{part.parameters:,}", short(part.flops_per_token), cache)
            table.add_row(*(Text(cell) for cell in cells), style=style)
    console.print(table)
    console.print(
        f"\n[dim]{account.parameters:,} parameters, {size(account.weight_bytes)} in {account.dtype};"
        f" {short(account.flops_per_token)}FLOP for one more token, {size(account.cache_bytes)} of cache at 1,024.[/]"
    )


def write(model: lamina.Model, tokenizer, ids: list[int], shown: str, most: int) -> Writing:
    """Text, as it comes."""
    console.print(Text(shown, style="dim"), end="")
    writing = Writing(model, tokenizer, ids, max_new_tokens=most, probabilities=True)
    for piece in writing:
        console.print(Text(piece, style="green"), end="")
    console.print(
        f"\n[dim]{len(ids)} tokens read at {writing.prefill_tokens_per_second:.0f} tokens/s,"
        f" {len(writing.ids)} written at {writing.tokens_per_second:.1f} tokens/s[/]\n"
    )
    return writing


def alike(name: str) -> Ranking:
    """Sentences by how like the first one they are."""
    encoder, tokenizer = lamina.load(name), lamina.tokenizer(name)
    began = time.perf_counter()
    vectors = lamina.embed(encoder, SENTENCES, tokenizer)
    seconds = time.perf_counter() - began
    likeness = (vectors @ vectors[0]).tolist()
    console.print(f"like [italic]{SENTENCES[0]}[/]")
    for i in sorted(range(1, len(SENTENCES)), key=lambda i: -likeness[i]):
        bar = "█" * round(24 * max(likeness[i], 0))
        console.print(f"  {likeness[i]:7.4f}  [green]{bar:24}[/]  {SENTENCES[i]}")
    console.print(f"[dim]{len(SENTENCES)} sentences in {seconds * 1000:.0f} ms[/]")
    return Ranking(name, SENTENCES, likeness)


def main() -> None:
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "report.html")
    began = time.perf_counter()
    headline(1, "SmolLM2-135M is a stack of layers")
    with console.status("reading the weights"):
        model, tokenizer = lamina.load("smollm2-135m"), lamina.tokenizer("smollm2-135m")
    stack(model)

    headline(2, "It writes")
    start = "The capital of France is"
    write(model, tokenizer, tokenizer.encode(start), start, 6)
    question = "What is the capital of France?"
    ids = tokenizer.chat_ids([{"role": "user", "content": question}])
    answer = write(model, tokenizer, ids, f"{question}\n", 40)

    headline(3, "MiniLM-L6 says what is alike")
    ranking = alike("minilm-l6")

    headline(4, "All of it in one page")
    with console.status("drawing"):
        page = report("SmolLM2-135M-Instruct", model, writing=answer, ranking=ranking, context=1024)
        target.write_text(page, encoding="utf-8")
    console.print(f"{target.resolve()}  [dim]({size(target.stat().st_size)}; open it in a browser)[/]")
    console.print(f"[dim]done in {time.perf_counter() - began:.0f} s[/]")


if __name__ == "__main__":
    try:
        main()
    except lamina.LaminaError as error:
        sys.exit(f"lamina: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
