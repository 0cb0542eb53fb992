"""What the commands that read texts share: which files are taken, and what of them is a document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from lamina.errors import LaminaError

OPTIONS = (
    click.option("--field", "fields", multiple=True, help="Field of a row that holds a column: text=body, or body."),
    click.option("--glob", help="Files taken out of directories. [default: text, JSONL and Parquet by suffix]"),
    click.option("--lines", is_flag=True, help="Each line of a text file is a document."),
    click.option("--split-on", help=r"Documents of a text file are separated by this: '\n\n', '<|endoftext|>'."),
    click.option(
        "--characters",
        type=click.Choice(["error", "replace", "skip"]),
        default="error",
        show_default=True,
        help="What is no text (not UTF-8, NUL): refused, replaced, or its document left out.",
    ),
    click.option("--damaged", default=0.01, show_default=True, help="Part of a file's rows that may be damaged."),
)
SAID = ("fields", "lines", "split_on", "characters", "damaged")


def corpus_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of commands that read texts. All but `glob` are for `wanted`."""
    for option in reversed(OPTIONS):
        function = option(function)
    return function


def wanted(given: dict[str, Any], columns: Sequence[str] = ("text",)) -> dict[str, Any]:
    """What the options ask of a `PrepareSpec`; they are taken out of `given`."""
    fields, lines, split_on, characters, damaged = (given.pop(name) for name in SAID)
    if lines and split_on is not None:
        raise LaminaError("--lines and --split-on: choose one; --lines is --split-on '\\n'")
    separator = "\n" if lines else None if split_on is None else _unescaped(split_on)
    return {
        "fields": _fields(columns, fields),
        "split_on": separator,
        "characters": characters,
        "damaged": damaged,
    }


def _fields(columns: Sequence[str], given: Sequence[str]) -> tuple[str, ...]:
    names = dict.fromkeys(columns, "")
    for each in given:
        column, _, name = each.rpartition("=")
        column = column or columns[0]
        if column not in names:
            from lamina.specs import unknown

            raise LaminaError(f"--field {each}: {unknown('column', column, names)}")
        names[column] = name
    return tuple(name or column for column, name in names.items())


def _unescaped(text: str) -> str:
    return text.replace("\\n", "\n").replace("\\t", "\t")
