"""`lamina edit`: operate on a checkpoint as a plan says, and print what was kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lamina.cli.convert import LAYOUTS, Size
from lamina.cli.output import Output, heading, table, wrapped
from lamina.cli.program import command
from lamina.errors import LaminaError
from lamina.figures import short, size

if TYPE_CHECKING:
    from lamina.editing import Costs
    from lamina.surgery import Applied, Verdict

EXAMPLES = """
lamina edit smollm2-135m plan.yaml --dry-run
lamina edit smollm2-135m plan.yaml -o ./smollm2-window --text book.txt --html verdict.html
lamina edit ./smollm2-experts --undo -o ./smollm2-dense
"""


@command(EXAMPLES)
@click.argument("source")
@click.argument("plan", required=False, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), help="Directory to write.")
@click.option("--dry-run", is_flag=True, help="Say what would be done and what it would cost; read and write nothing.")
@click.option("--undo", is_flag=True, help="In place of PLAN: what leads back from the last operations on SOURCE.")
@click.option("--text", type=click.Path(path_type=Path), help="A text for the verdict. [default: a packaged sample]")
@click.option("--tokens", type=click.IntRange(2), help="At most so many tokens of it. [default: 2048]")
@click.option("--length", type=click.IntRange(2), default=512, show_default=True, help="Tokens read at one time.")
@click.option("--no-verdict", is_flag=True, help="Write the model, and do not run it.")
@click.option(
    "--html", type=click.Path(dir_okay=False, path_type=Path), help="Plan, verdict and both stacks, as one page."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights that are new.")
@click.option("--format", "layout", type=click.Choice(LAYOUTS), help="Layout. [default: the first that can say it]")
@click.option("--shard-size", type=Size(), default="5GB", show_default=True, help="Largest file of weights.")
@click.option("--force", is_flag=True, help="Replace the directory; the old one stays whole until the new one is.")
def edit(
    out: Output,
    source: str,
    plan: Path | None,
    output: Path | None,
    dry_run: bool,
    undo: bool,
    text: Path | None,
    tokens: int | None,
    length: int,
    no_verdict: bool,
    html: Path | None,
    seed: int,
    layout: str | None,
    shard_size: int,
    force: bool,
) -> None:
    """Operate on SOURCE as PLAN.yaml says, write the new model, and measure what was kept.

    A plan is a list of operations, each a mapping with op and its fields: - {op: key_heads, heads: 1}. It is checked as
    a whole before a weight is read, and weights are written one at a time, so that a model may be larger than memory.
    """
    from lamina import editing, exporting

    if undo == (plan is not None):
        raise LaminaError("name a PLAN.yaml, or --undo, and not both")
    if output is None and not dry_run:
        raise LaminaError("no --output: name a directory to write, or ask for --dry-run")
    if output is not None and output.exists() and not force and not dry_run:
        raise LaminaError(f"{output} is there already; choose another directory, or replace it with --force")
    if html is not None and not html.absolute().parent.is_dir():
        raise LaminaError(f"{html}: its directory is not there")
    if text is not None and not text.is_file():
        raise LaminaError(f"{text}: no such file")
    opened, done = editing.planned(source, editing.undoing(source) if undo else plan or ())
    cost = editing.costs(done)
    document: dict[str, Any] = {"source": source, "directory": None, **_plan_document(done, cost)}
    lines = _plan_lines(done, cost)
    if dry_run or output is None:
        return out.result(document, [*lines, *_page(html, source, str(output or "planned"), done, document, None)])
    layout = layout or exporting.layout(done.spec, opened.origin.family)
    out.note(f"writing {output}")
    editing.write(opened, done, output, layout, seed=seed, force=force, shard_size=shard_size)
    document |= {"directory": str(output), "format": layout, "fits": list(done.fits)}
    lines += fit_lines(done)
    verdict = None
    if not no_verdict and not editing.has_verdict(done):
        out.note("no verdict: the new model reads other tokens, and predicts no next one, so that no text has a price")
    elif not no_verdict:
        out.note("reading a text with both models")
        verdict = editing.judge(source, output, text=text, tokens=tokens, length=length, progress=_progress(out))
        document["verdict"] = verdict.to_dict()
        lines += ["", *verdict_lines(verdict)]
    lines += ["", f"{output}: {layout} layout", *_page(html, source, str(output), done, document, verdict)]
    out.result(document, lines)


def _page(
    html: Path | None, source: str, output: str, done: Applied, document: dict[str, Any], verdict: Verdict | None
) -> list[str]:
    """Write the page, where one is asked for; the line that says so."""
    if html is None:
        return []
    from lamina.report.stacks import Named, stacks

    both = Named(source, done.before), Named(output, done.spec)
    html.write_text(stacks(*both, operations=document["operations"], verdict=verdict), encoding="utf-8")
    document["written"] = [str(html)]
    return [str(html)]


def _progress(out: Output) -> Any:
    if not out.progress:
        return None
    return lambda tokens: click.echo(f"\r{tokens:,} tokens", err=True, nl=False)


def _plan_document(done: Applied, cost: Costs) -> dict[str, Any]:
    from lamina.surgery import said

    names = ("parameters", "active_parameters", "flops_per_token", "flops_prefill", "cache_bytes")
    return {
        "operations": [
            {**said(operation), "kept": promise.kept, "why": promise.why}
            for operation, promise in zip(done.operations, done.promises, strict=True)
        ],
        "kept": done.kept,
        "undo": None if done.undo is None else [said(operation) for operation in done.undo],
        "weights": [
            {"name": w.name, "shape": list(w.shape), "sources": list(w.sources), "how": list(w.how)}
            for w in done.table
            if w.how or not w.sources or w.sources != (w.name,)
        ],
        **{side: {name: getattr(getattr(cost, side), name) for name in names} for side in ("before", "after")},
    }


def _plan_lines(done: Applied, cost: Costs) -> list[str]:
    lines = []
    for number, (operation, promise) in enumerate(zip(done.operations, done.promises, strict=True), 1):
        lines += wrapped(f"{operation.NAME}: {promise.kept}: {promise.why}", first=f"{number}. ", indent=3)
    before, after = cost.before, cost.after
    rows = [
        ("parameters", f"{before.parameters:,}", f"{after.parameters:,}"),
        ("active parameters", f"{before.active_parameters:,}", f"{after.active_parameters:,}"),
        ("FLOP a token", short(before.flops_per_token), short(after.flops_per_token)),
        ("cache", size(before.cache_bytes), size(after.cache_bytes)),
    ]
    lines += ["", *table(("cost", "before", "after"), rows)]
    kinds: dict[tuple[str, ...], list[str]] = {}
    for weight in done.table:
        if weight.how or not weight.sources:
            kinds.setdefault(weight.how or ("begins as the spec says",), []).append(weight.name)
    if kinds:
        lines += ["", heading("weights")]
        for how, names in kinds.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines += wrapped(f"{names[0]}{more}: {', '.join(how)}", first="  ", indent=4)
    kept = len(done.table) - sum(map(len, kinds.values()))
    return [*lines, f"  {kept} of {len(done.table)} weights stay as they are"]


def fit_lines(done: Applied) -> list[str]:
    """What fits to a text lost, as people read it."""
    lines = []
    for operation, fit in zip(done.operations, done.fits, strict=True):
        if fit:
            place = max(fit, key=lambda one: fit[one])
            mean = sum(fit.values()) / len(fit)
            lines.append(f"{operation.NAME}: of what is fitted {mean:.1%} is lost, at most {fit[place]:.1%} ({place})")
    return ["", *lines] if lines else []


def verdict_lines(verdict: Verdict) -> list[str]:
    """The verdict as people read it."""
    sides = verdict.before, verdict.after
    rows = [
        ("perplexity", *(_figure(side.perplexity) for side in sides)),
        ("cache", *("-" if side.cache_bytes is None else size(side.cache_bytes) for side in sides)),
        ("tokens/s, reading", *(_figure(side.tokens_per_second, 0) for side in sides)),
        ("tokens/s, writing", *(_figure(side.decoded_per_second, 1) for side in sides)),
    ]
    if verdict.before.bits_per_byte is not None:
        rows.insert(0, ("bits per byte", *(_figure(side.bits_per_byte, 4) for side in sides)))
    difference = "each by its own tokenizer" if verdict.worst is None else f"largest difference {verdict.worst:.2g}"
    lines = [f"{heading('verdict')}: {verdict.found}, on {verdict.tokens:,} tokens ({difference})"]
    if verdict.divergence is not None and verdict.agreement is not None:
        lines.append(
            f"KL divergence {verdict.divergence:.3g} nats a token; the likeliest next token is the same after"
            f" {verdict.agreement:.1%}"
        )
    if verdict.drift:
        first, worst = verdict.drift[0], max(verdict.drift, key=lambda one: one.drift)
        lines.append(f"drift: {first.drift:.2g} after the first layer, at most {worst.drift:.2g} ({worst.layer})")
    return [*lines, "", *table(("measured", "before", "after"), rows)]


def _figure(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


command = edit
