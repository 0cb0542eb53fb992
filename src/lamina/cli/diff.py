"""`lamina diff`: what differs between two models, one line a field."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from lamina.cli.output import Output
from lamina.cli.program import command

EXAMPLES = """
lamina diff llama2/7b llama3/8b
lamina diff llama/7b mistral/7b --json
lamina diff ./before ./after --html difference.html
"""
Difference = tuple[str, Any, Any]


@command(EXAMPLES)
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--html", type=click.Path(dir_okay=False), help="Both side by side, layer by layer, as one page.")
def diff(out: Output, a: str, b: str, html: str | None) -> None:
    """The differences between two models, as specs: no weights are read.

    A and B are sources. A line is the path of a field, its value in A, and its value in B; the same difference in many
    layers is one line. Where one stack is deeper, the layers that both have are compared.
    """
    from lamina.source import spec as spec_of
    from lamina.words import say

    specs = spec_of(a), spec_of(b)
    found = list(differences(*specs))
    document = {
        "a": a,
        "b": b,
        "same": not found,
        "differences": [{"path": path, "a": _plain(left), "b": _plain(right)} for path, left, right in found],
    }
    said = [(path, say(left), say(right)) for path, left, right in found]
    lines = [f"{path}: {left} -> {right}" for path, left, right in said] or [f"{a} and {b} have the same spec"]
    if html is not None:
        from lamina.report.stacks import Named, stacks

        text = stacks(Named(a, specs[0]), Named(b, specs[1]), differences=said)
        Path(html).write_text(text, encoding="utf-8")
        document |= {"written": [html]}
        lines = [html]
    out.result(document, lines)


def differences(a: Any, b: Any, path: str = "") -> Iterator[Difference]:
    """(path, value in a, value in b). Paths name steps and branches as parameters do, and layers by their numbers."""
    from lamina.specs import Spec

    if isinstance(a, Spec) and type(a) is type(b):
        for field in dataclasses.fields(a):  # pyright: ignore[reportArgumentType]
            left, right = getattr(a, field.name), getattr(b, field.name)
            if field.name in ("steps", "branches"):
                yield from _by_name(left, right, path)
            elif field.name == "layers" and isinstance(left, tuple):
                yield from _layers(left, right, f"{path}.layers")
            else:
                yield from differences(left, right, f"{path}.{field.name}".removeprefix("."))
    elif a != b or type(a) is not type(b):
        yield path, a, b


def _by_name(a: tuple[Any, ...], b: tuple[Any, ...], path: str) -> Iterator[Difference]:
    """Parts that have names are compared with their namesakes."""
    left, right = {part.name: part for part in a}, {part.name: part for part in b}
    for name in dict.fromkeys([*left, *right]):
        yield from differences(left.get(name), right.get(name), f"{path}.{name}")
    if set(left) == set(right) and list(left) != list(right):
        yield f"{path} order", ", ".join(left), ", ".join(right)


def _layers(a: tuple[Any, ...], b: tuple[Any, ...], path: str) -> Iterator[Difference]:
    """The depths, then the differences of the layers that both stacks have: equal ones once, with their numbers."""
    from lamina.words import span

    if len(a) != len(b):
        yield path, f"{len(a)} layers", f"{len(b)} layers"
    places: dict[Difference, list[int]] = {}
    for i, (left, right) in enumerate(zip(a, b, strict=False)):
        for difference in differences(left, right):
            places.setdefault(difference, []).append(i)
    common = min(len(a), len(b))
    for (below, left, right), numbers in places.items():
        which = "*" if len(numbers) == common else span(numbers)
        yield f"{path}.{which}.{below.removeprefix('.')}", left, right


def _plain(value: Any) -> Any:
    from lamina.specs import Spec

    return value.to_dict() if isinstance(value, Spec) else list(value) if isinstance(value, tuple) else value


command = diff
