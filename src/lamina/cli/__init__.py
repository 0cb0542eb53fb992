"""The command line: `lamina COMMAND ...`, one file a command. Nothing heavy is imported before one runs."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 it failed, 2 the input was wrong, 130 interrupted."""
    from lamina.cli.program import run

    return run(argv)
