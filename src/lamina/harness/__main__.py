"""`python -m lamina.harness`: the command `lm_eval`, which then knows `--model lamina`."""

from __future__ import annotations

import sys
from collections.abc import Callable

from lamina.errors import LaminaError
from lamina.harness import missing, register


def imported() -> Callable[[], None]:
    """The harness' own command, or an error that names the package it lacks. What its tasks lack it says itself."""
    try:
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise missing(error) from None
    return cli_evaluate


def main() -> int:
    """The exit status. What lamina refuses is one line, as it is of the command `lamina`."""
    try:
        register()
        imported()()
    except LaminaError as error:
        print("lamina: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
