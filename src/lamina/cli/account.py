"""`lamina account`: what a model costs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from lamina.cli.output import Output, columns, share, table
from lamina.cli.program import command
from lamina.figures import short, size

if TYPE_CHECKING:
    from lamina.accounting import Account

EXAMPLES = """
lamina account llama3.1/405b
lamina account mistral/7b --context 32768 --batch 8
lamina account ./my-model --dtype float32 --json
"""


@command(EXAMPLES)
@click.argument("source")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Texts at once.")
@click.option("--context", type=click.IntRange(min=1), help="Tokens of each text. [default: the model's]")
@click.option("--dtype", help="Of weights and cache. [default: bfloat16]")
def account(out: Output, source: str, batch: int, context: int | None, dtype: str | None) -> None:
    """What a model costs: parameters, compute, cache.

    Counted by building the model without storage and running it: nothing is downloaded for a published size and no
    weights are read. A FLOP is one addition or multiplication of a matrix product.
    """
    from lamina.accounting import account as count

    found = count(source, batch, context, dtype=dtype)
    document = {"source": source, **dataclasses.asdict(found)}
    out.result(document, _lines(source, found))


def _lines(source: str, found: Account) -> list[str]:
    active = ""
    if found.active_parameters != found.parameters:
        active = f", of which a token uses {found.active_parameters:,}"
    facts = [
        ("parameters", f"{found.parameters:,}{active}"),
        ("weights", f"{size(found.weight_bytes)} in {found.dtype}"),
        ("reading", f"{short(found.flops_prefill, 'FLOP')} for {found.batch} x {found.context} tokens"),
        ("one more token", short(found.flops_per_token, "FLOP")),
        ("training", f"{short(found.flops_train_per_token, 'FLOP')} a token"),
        ("cache", f"{size(found.cache_bytes)} for {found.batch} x {found.context} tokens in {found.dtype}"),
    ]
    rows = [
        (
            row.name + (f" (x {row.repeat})" if row.repeat > 1 else ""),
            f"{row.parameters:,}",
            share(row.parameters, found.parameters),
            short(row.flops),
            size(row.cache_bytes),
        )
        for row in found.rows
    ]
    wide = max(len(name) for name, _ in facts)
    lines = [source, *(f"  {name.ljust(wide)}  {value}" for name, value in facts), ""]
    return lines + table(("part", "parameters", "share", "FLOPs, reading", "cache"), rows, min(columns(), 120))


command = account
