"""`lamina verify`: which properties hold for a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lamina.cli.output import Output
from lamina.cli.program import command
from lamina.errors import UnsupportedError

if TYPE_CHECKING:
    from lamina.conformance import Row

EXAMPLES = """
lamina verify smollm2-135m
lamina verify ./my-model --json
lamina verify ./my-model --with transformers
lamina verify llama/7b && echo "never reached: a published size has no weights"
"""
SIGNS = {"holds": ("✓", "green"), "fails": ("✗", "red"), "not tried": ("·", "yellow")}


@command(EXAMPLES)
@click.argument("source")
@click.option("--dtype", help="float32, bfloat16, float16 or float64. [default: as stored]")
@click.option("--compile", "compile", is_flag=True, help="Compile the decoding step, and try it too.")
@click.option(
    "--with",
    "library",
    type=click.Choice(["lamina", "transformers"]),
    default="lamina",
    show_default=True,
    help="What opens SOURCE: transformers (extra lamina[transformers]) is asked what can be asked from outside.",
)
@click.option("--device", default="cpu", show_default=True, help="Where the model lies: cpu, cuda, cuda:1.")
def verify(out: Output, source: str, dtype: str | None, library: str, device: str, compile: bool) -> None:
    """Which of the properties that always hold do hold for SOURCE: cached decoding equals the whole text, padding and
    packing change nothing, later tokens change no earlier bit, backends agree, what is saved is read again, training
    goes on from files, and more (docs/conformance.md).

    A checkpoint of a run is compared with its manifest first, bit by bit. Exit status 1 when a property fails.
    """
    import lamina

    if library == "transformers" and compile:
        raise UnsupportedError("--compile is for --with lamina: a model of transformers has no compiled step")
    if (Path(source) / "manifest.json").is_file():
        from lamina.train.manifest import check

        check(source, verify=True)
    model: Any
    if library == "transformers":
        from lamina.conformance import open_with_transformers

        model = open_with_transformers(source, dtype, device)
    else:
        model = lamina.load(source, dtype, device, compile)

    def show(row: Row) -> None:
        if out.progress and not out.as_json:
            sys.stderr.write(f"\r\x1b[K{row.property}")
            sys.stderr.flush()

    report = lamina.verify(model, progress=show)
    if out.progress and not out.as_json:
        sys.stderr.write("\r\x1b[K")
    counts = {verdict: sum(row.verdict == verdict for row in report.rows) for verdict in SIGNS}
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count or verdict == "fails")
    lines = [*(_line(row) for row in report.rows), f"{summary}; {report.seconds:.1f} s"]
    out.result({"source": source, "with": library, **report.to_dict()}, lines)
    if not report.passed:
        raise click.exceptions.Exit(1)


def _line(row: Row) -> str:
    sign, colour = SIGNS[row.verdict]
    worst = ""
    if row.worst is not None:
        worst = f" (worst {row.worst:.2g} of {row.allowed:.2g})" if row.allowed else f" (differences: {row.worst:g})"
        worst = " (no difference)" if row.worst == 0 else worst
    compared = f": {row.compared}" if row.compared else ""
    note = f"; {row.note}" if row.note and row.verdict != "holds" else ""
    return f"{click.style(sign, fg=colour)} {row.property}{compared}{worst}{note}"


command = verify
