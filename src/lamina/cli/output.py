"""What commands print: results on standard output, as text or one JSON document; messages on standard error."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import click

SCHEMA = "lamina/RESULT/1"
"""What every JSON result bears; the number goes up when a field changes its meaning."""


@dataclass
class Output:
    """Where a command's result and messages go, as its shared options ask."""

    as_json: bool = False
    quiet: bool = False
    no_color: bool = False
    silent: bool = False  # no result either: one of several processes that do the same

    def result(self, document: dict[str, Any], lines: Iterable[str]) -> None:
        """The result: the document with --json, else the lines."""
        if self.silent:
            return
        if self.as_json:
            click.echo(json.dumps({"schema": SCHEMA, **document}, indent=1, allow_nan=False))
            return
        for line in lines:
            click.echo(line, color=self.color)

    def note(self, message: str) -> None:
        """A message on standard error, unless --quiet."""
        if not self.quiet:
            click.echo(message, err=True, color=self.color)

    @property
    def color(self) -> bool | None:
        """False where colour is unwanted; None leaves it to click, which colours terminals only."""
        return False if self.no_color or os.environ.get("NO_COLOR") else None

    @property
    def progress(self) -> bool:
        """Whether somebody is watching standard error."""
        return not self.quiet and sys.stderr is not None and sys.stderr.isatty()


def heading(text: str) -> str:
    """A line that stands out on a terminal."""
    return click.style(text, bold=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """Lines of a table: the first column is wrapped to fit and keeps its indentation, the others stand to the right."""
    width = columns() if width is None else width
    sizes = [max(len(row[i]) for row in [header, *rows]) for i in range(1, len(header))]
    first = max(width - sum(sizes) - 2 * len(sizes), 20)
    first = min(first, max(len(row[0]) for row in [header, *rows]))
    lines = []
    for number, row in enumerate([header, *rows]):
        indent = " " * (len(row[0]) - len(row[0].lstrip()))
        text = textwrap.wrap(row[0], first, initial_indent="", subsequent_indent=f"{indent}  ", drop_whitespace=True)
        text = text or [""]
        if indent and not text[0].startswith(indent):
            text[0] = indent + text[0].lstrip()
        cells = [cell.rjust(size) for cell, size in zip(row[1:], sizes, strict=True)]
        line = "  ".join([text[0].ljust(first), *cells]).rstrip()
        lines.append(heading(line) if number == 0 else line)
        lines += text[1:]
    return lines


WIDEST = 100
"""Columns of running text, however wide the terminal."""


def wrapped(text: str, indent: int = 0, first: str | None = None, widest: int = WIDEST) -> list[str]:
    """Running text in lines, indented; the first line begins with `first` instead, which may be styled."""
    joined = text.replace(" %", "\0%")  # a number keeps its sign
    lines = textwrap.wrap(joined, min(columns(), widest) - indent, break_long_words=False, break_on_hyphens=False)
    lines = [line.replace("\0", " ") for line in lines]
    return [(" " * indent if first is None or i else first) + line for i, line in enumerate(lines)]


def bullets(texts: Iterable[str]) -> list[str]:
    """A list, an entry a text."""
    return [line for text in texts for line in wrapped(text, 4, first="  - ")]


def columns() -> int:
    """The width of the terminal, at least 60; 80 where there is none, so that what is piped does not change."""
    return max(shutil.get_terminal_size((80, 24)).columns, 60)


def share(part: int, whole: int) -> str:
    """A part in per cent."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def duration(seconds: float) -> str:
    """1:02:03, 4:05, or 3.2 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
