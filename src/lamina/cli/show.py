"""`lamina show`: a model opened up, as a table, as the names of its tensors, or as a picture."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lamina.cli.output import Output, bullets, heading, share, table, wrapped
from lamina.cli.program import command
from lamina.figures import short, size

if TYPE_CHECKING:
    from lamina.accounting import Account, Row
    from lamina.families.undisclosed import Undisclosed
    from lamina.model import ModelSpec

EXAMPLES = """
lamina show smollm2-135m
lamina show llama3.1/405b --names hf
lamina show ./my-model --svg picture.svg
lamina show gpt4
"""
CONTEXT = 1024  # of a model that does not say its own


@command(EXAMPLES)
@click.argument("source")
@click.option("--names", type=click.Choice(["hf"]), help="The tensors, and what Hugging Face's files call them.")
@click.option("--svg", type=click.Path(dir_okay=False), help="Draw the architecture into this file.")
@click.option(
    "--html", type=click.Path(dir_okay=False), help="The same with the table, as one page that needs no other."
)
def show(out: Output, source: str, names: str | None, svg: str | None, html: str | None) -> None:
    """A model opened up: its layers, their shapes and costs.

    Reads the configuration and the headers of the files, and no weights. Equal layers are shown once. The compute is
    that of one more token at the end of a full context, the cache what one token adds to it. Of GPT-4, whose
    architecture is not public, it says what is known.
    """
    from lamina.families.undisclosed import undisclosed

    closed = undisclosed(source)
    if closed is not None and not (names or svg or html or Path(source).exists()):
        _closed(out, source, closed)
        return
    from lamina.accounting import account
    from lamina.families import note
    from lamina.source import spec as spec_of
    from lamina.words import shape_of

    spec = spec_of(source)
    found = account(spec, context=spec.context or CONTEXT)
    tensors = _tensors(source, spec) if names else []
    written = _draw(source, spec, found, {"svg": svg, "html": html})
    document: dict[str, Any] = {"source": source, "what": shape_of(spec), "spec": spec.to_dict()}
    document |= dataclasses.asdict(found) | ({"tensors": tensors} if names else {})
    document |= {"note": note(source)} if note(source) else {}
    document |= {"written": written} if written else {}
    if written:
        lines = written
    elif names:
        lines = _names(spec, tensors)
    else:
        lines = _lines(source, spec, found, account(spec, context=1))
        lines += textwrap.wrap(f"Note: {note(source)}.", 80) if note(source) else []
    out.result(document, lines)


def _closed(out: Output, source: str, closed: Undisclosed) -> None:
    """What is public of a model whose architecture is not, and where to start instead."""
    own = closed.own.format(template=closed.template)
    document = {
        "source": source,
        "what": closed.called,
        "public": list(closed.public),
        "not_public": list(closed.not_public),
        "reference": closed.source,
        "template": closed.template,
        "own_spec": own,
    }
    lines = [heading(f"{closed.called}: its architecture is not public"), "", f"Public ({closed.source}):"]
    lines += [*bullets(closed.public), "", "Not public, and not guessed here:", *bullets(closed.not_public), ""]
    lines += [
        *wrapped(
            f"So there is no spec to show and nothing to count. {closed.template} is a published decoder of its"
            f" style: lamina show {closed.template}. A spec of one's own is a few lines of Python:"
        ),
        "",
    ]
    out.result(document, [*lines, *(f"    {line}".rstrip() for line in own.splitlines())])


def _lines(source: str, spec: ModelSpec, found: Account, single: Account) -> list[str]:
    from lamina.words import shape_of

    rows: list[tuple[str, ...]] = []

    def add(row: Row, one: Row, depth: int) -> None:
        times = f" (x {row.repeat})" if row.repeat > 1 and depth == 0 else ""
        numbers = (
            f"{row.parameters:,}",
            share(row.parameters, found.parameters),
            short(row.flops_per_token),
            size(one.cache_bytes) if one.cache_bytes else "",
        )
        rows.append((f"{'  ' * depth}{row.name}{times}: {row.what}{_shapes(row)}", *numbers))
        for part, other in zip(row.parts, one.parts, strict=True):
            add(part, other, depth + 1)

    for row, one in zip(found.rows, single.rows, strict=True):
        add(row, one, 0)
    lines = [heading(source), *textwrap.wrap(shape_of(spec), 80), ""]
    lines += table(("part", "parameters", "share", "FLOPs/token", "cache/token"), rows)
    lines += ["", f"{found.parameters:,} parameters, {size(found.weight_bytes)} in {found.dtype}"]
    cache = f"; their cache: {size(found.cache_bytes)}" if found.cache_bytes else ""
    return [*lines, f"{short(found.flops_per_token, 'FLOP')} a token at the end of {found.context} tokens{cache}"]


def _shapes(row: Row) -> str:
    """The matrices of a part: "; q 576 x 576, k 192 x 576". Vectors are left out."""
    matrices = {name: shape for name, shape in row.shapes.items() if len(shape) > 1}
    said = [f"{name} {' x '.join(map(str, shape))}".removeprefix("weight ") for name, shape in matrices.items()]
    return f"; {', '.join(said)}" if said else ""


def _tensors(source: str, spec: ModelSpec) -> list[dict[str, Any]]:
    """Our parameters and the tensors that the Hugging Face layout has for them."""
    from lamina.exporting import exportable
    from lamina.families import family, sizes
    from lamina.locate import locate
    from lamina.opening import open_source
    from lamina.weights import rules

    located = locate(source)
    stored: dict[str, str] = {}
    chosen = None
    if located.kind == "published":
        chosen = family(sizes()[located.name])
    else:
        origin = open_source(located).origin
        chosen = origin.family
        stored = {name: entry.name for name, entry in origin.stored.items()}
    if chosen is None or chosen.config is None:
        chosen, _ = exportable(spec)
    shapes = {name: tuple(p.shape) for name, p in spec.build(device="meta").named_parameters()}
    moves = rules.bind(chosen.rules(spec), shapes)
    theirs = rules.their_shapes(moves, shapes)
    return [
        {
            "ours": list(move.ours),
            "theirs": [stored.get(name, name) for name in move.theirs],
            "shape": [list(theirs[name]) for name in move.theirs],
        }
        for move in moves
    ]


def _names(spec: ModelSpec, tensors: list[dict[str, Any]]) -> list[str]:
    """Two lines a tensor: ours, and theirs with its shape; layers that are equal to an earlier one are left out."""
    again = set()
    for name, stack in (("encoder", spec.encoder), ("decoder", spec.decoder)):
        seen = set()
        for i, layer in enumerate(() if stack is None else stack.layers):
            if layer in seen:
                again.add(f"{name}.layers.{i}.")
            seen.add(layer)
    lines = []
    for tensor in tensors:
        if tensor["ours"][0].startswith(tuple(again)):
            continue
        lines.append(heading(", ".join(tensor["ours"])))
        for theirs, shape in zip(tensor["theirs"], tensor["shape"], strict=True):
            lines.append(f"    {theirs}  {' x '.join(map(str, shape))}")
    if again:
        lines += ["", f"{len(again)} layers that are equal to one above are left out; --json has them."]
    return lines


def _draw(source: str, spec: ModelSpec, found: Account, files: dict[str, str | None]) -> list[str]:
    from lamina.pictures import architecture

    written = []
    for kind, file in files.items():
        if file is not None:
            if kind == "svg":
                text = architecture(spec, found, source)
            else:
                from lamina.report import overview

                text = overview(source, spec, found)
            Path(file).write_text(text, encoding="utf-8")
            written.append(file)
    return written


command = show
