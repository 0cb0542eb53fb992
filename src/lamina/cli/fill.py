"""`lamina fill`: fill the masked words of a text."""

from __future__ import annotations

from dataclasses import asdict

import click

from lamina.cli.output import Output, heading
from lamina.cli.program import command
from lamina.cli.prompts import shown, standard_input, warn_of_lost

EXAMPLES = """
lamina fill hf:google-bert/bert-base-uncased "The capital of France is [MASK]."
lamina fill ./my-bert "The [MASK] sat on the [MASK]." --top 3
"""


@command(EXAMPLES)
@click.argument("source")
@click.argument("text", required=False)
@click.option("--top", type=int, default=5, show_default=True, help="Candidates for each blank.")
@click.option("--dtype", help="float32, bfloat16, float16 or float64. [default: as stored]")
@click.option("--device", default="cpu", show_default=True, help="Where the model lies: cpu, cuda, cuda:1.")
def fill(out: Output, source: str, text: str | None, top: int, dtype: str | None, device: str) -> None:
    """The likeliest words where TEXT (or standard input) has the model's mask token: [MASK], <mask>, ..."""
    import lamina
    from lamina.generation import fill as find

    text = standard_input() if text is None or text == "-" else text
    tokenizer = lamina.tokenizer(source)
    warn_of_lost(out, tokenizer, text)
    filled = find(lamina.load(source, dtype, device), text, tokenizer, top=top)
    document = {"source": source, "text": filled.text, "blanks": [asdict(blank) for blank in filled.blanks]}
    lines = [shown(filled.text)]
    for number, blank in enumerate(filled.blanks, start=1):
        lines.append(heading(f"blank {number} (token {blank.position})"))
        lines += [f"  {each.probability:7.2%}  {shown(each.token)}" for each in blank.candidates]
    out.result(document, lines)


command = fill
