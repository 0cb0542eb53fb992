"""`lamina layers`: the catalogue of the sixteen kinds of layer."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import click

from lamina.cli.output import Output, columns, heading
from lamina.cli.program import command

if TYPE_CHECKING:
    from lamina.catalogue import Kind

EXAMPLES = """
lamina layers
lamina layers rotary
lamina layers experts --json
"""


@command(EXAMPLES)
@click.argument("name", required=False)
def layers(out: Output, name: str | None) -> None:
    """The kinds of layer: all sixteen, or one with its equation and variants.

    The families named are those whose published specs have the layer; nothing of that is typed in by hand. What this
    version does not have yet says so.
    """
    from lamina.catalogue import CATALOGUE, kind

    if name is not None:
        chosen = kind(name)
        out.result(_document(chosen), _one(chosen))
        return
    lines = []
    for one in CATALOGUE:
        mark = "" if one.built else "  (not built yet)"
        lines += [heading(f"{one.name.ljust(16)} {one.title}") + mark, *_wrapped(one.what, 17)]
    out.result({"layers": [_document(one) for one in CATALOGUE]}, [*lines, "", "lamina layers NAME tells more of one."])


def _document(one: Kind) -> dict[str, Any]:
    from lamina.catalogue import users

    return {
        "name": one.name,
        "title": one.title,
        "what": one.what,
        "equation": one.equation,
        "built": one.built,
        "files": [f"lamina/{file}" for file in one.files],
        "families": users(one.used) if one.built else [],
        "variants": [
            {
                "name": variant.name,
                "rule": variant.rule,
                "built": one.built and variant.built,
                "families": users(variant.used),
            }
            for variant in one.variants
        ],
    }


def _one(one: Kind) -> list[str]:
    found = _document(one)
    lines = [heading(one.title), *_wrapped(one.what, 0), "", *_wrapped(one.equation, 4), ""]
    if not one.built:
        return [*lines, f"Not built yet: it will be {', '.join(found['files'])}."]
    lines += [*_wrapped(f"Used by: {', '.join(found['families']) or 'no published size here'}", 0)]
    lines += [f"File{'s' if len(found['files']) > 1 else ''}: {', '.join(found['files'])}"]
    for variant in found["variants"]:
        families = f" [{', '.join(variant['families'])}]" if variant["families"] else ""
        families = families if variant["built"] else " (not built yet)"
        lines += [f"  {heading(variant['name'])}", *_wrapped(f"{variant['rule']}{families}", 6)]
    return lines


def _wrapped(text: str, indent: int) -> list[str]:
    space = " " * indent
    return textwrap.wrap(text, min(columns(), 100), initial_indent=space, subsequent_indent=space)


command = layers
