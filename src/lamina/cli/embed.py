"""`lamina embed`: vectors of texts, and which texts are like the first."""

from __future__ import annotations

from pathlib import Path

import click

from lamina.cli.output import Output, table
from lamina.cli.program import command
from lamina.cli.prompts import shown, standard_input, warn_of_lost
from lamina.errors import LaminaError

EXAMPLES = """
lamina embed minilm-l6 "a man plays a guitar" "someone makes music" "the market fell"
lamina embed minilm-l6 --file sentences.txt --json > vectors.json
"""


@command(EXAMPLES)
@click.argument("source")
@click.argument("texts", nargs=-1)
@click.option("--file", type=click.Path(path_type=Path), help="Texts, one a line; - for standard input.")
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Texts read at once.")
@click.option("--dtype", help="float32, bfloat16, float16 or float64. [default: as stored]")
@click.option("--device", default="cpu", show_default=True, help="Where the model lies: cpu, cuda, cuda:1.")
def embed(
    out: Output, source: str, texts: tuple[str, ...], file: Path | None, batch: int, dtype: str | None, device: str
) -> None:
    """Vectors of length 1 for TEXTS (--json), or how like the first text the others are.

    Tokens are pooled as the checkpoint says. A text that is longer than the model reads is refused, not cut.
    """
    import lamina

    given = [*texts, *_from(file)]
    if not given:
        raise LaminaError("no text is given; write texts after SOURCE, or --file FILE with one a line")
    tokenizer = lamina.tokenizer(source)
    for text in given:
        warn_of_lost(out, tokenizer, text)
    model = lamina.load(source, dtype, device)
    vectors = lamina.embed(model, given, tokenizer, batch=batch)
    likeness = (vectors @ vectors[0]).tolist()
    document = {
        "source": source,
        "width": vectors.shape[1],
        "texts": given,
        "vectors": vectors.tolist(),
        "similarity": likeness,
    }
    if len(given) == 1:
        out.result(document, [f"{vectors.shape[1]} numbers: " + " ".join(f"{x:.4f}" for x in vectors[0].tolist())])
        return
    ranked = sorted(range(1, len(given)), key=lambda i: -likeness[i])
    rows = [(shown(given[i]), f"{likeness[i]:.4f}") for i in ranked]
    out.result(document, [f"like {shown(given[0])!r}:", *table(("text", "cosine"), rows)])


def _from(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        text = standard_input() if str(file) == "-" else file.read_text(encoding="utf-8")
    except OSError as error:
        raise LaminaError(f"{file}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise LaminaError(f"{file}: not UTF-8 at byte {error.start:,}") from None
    return [line for line in text.splitlines() if line.strip()]


command = embed
