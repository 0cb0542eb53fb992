"""How a command ends badly: one line on standard error, and the exit status that says whose fault it was."""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import click

from lamina.errors import LaminaError, StorageError, TrainingError

FAILED, WRONG, INTERRUPTED = 1, 2, 130


class Failed(Exception):
    """What was asked is right, but it could not be done: a network, a disk, another program. Exit status 1."""


def status_of(error: BaseException, debug: bool) -> int:
    """The exit status of what a command raised, after saying so in one line; with `debug`, after the traceback."""
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        forget_output()  # the reader of a pipe has seen enough
        return 0
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, KeyboardInterrupt | click.Abort):
        complain("lamina: interrupted")
        return INTERRUPTED
    if isinstance(error, click.UsageError):
        complain(f"lamina: error: {_usage(error)}")
        return WRONG
    if isinstance(error, LaminaError):
        complain(f"lamina: error: {error}")
        return FAILED if isinstance(error, StorageError | TrainingError) else WRONG
    complain(f"lamina: error: {_failure(error)}")
    return FAILED


def complain(message: str) -> None:
    """Print a message as exactly one line on standard error, whatever characters a hostile file put into it."""
    line = " ".join(message.split())
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    with suppress(OSError, ValueError):  # standard error may be closed: then nobody is there to be told
        click.echo(line, err=True)


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Inside, a warning is one line, `lamina: warning: ...`; notes for programmers (deprecations) are not shown."""

    def show(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
        complain(f"lamina: warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


def hold_streams() -> None:
    """Make the standard streams safe to write to: letters they lack are escaped, and a closed one stays closed.

    Python has None for a closed stream; its number would be given to the next file that is opened, so it is taken here.
    """
    for number, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)):
        if stream is None and sys.__stdout__ is None and number > 0:
            os.open(os.devnull, os.O_RDWR)
        reconfigure = getattr(stream, "reconfigure", None)
        if number == 1 and reconfigure is not None and getattr(stream, "errors", "") == "strict":
            reconfigure(errors="backslashreplace")


def forget_output() -> None:
    """Let nothing more be written to standard output, so that the end of the program does not complain again."""
    if sys.stdout is sys.__stdout__ and sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage(error: click.UsageError) -> str:
    message = error.format_message().rstrip()
    command = error.ctx.command_path if error.ctx is not None else "lamina"
    return f"{message} (see: {command} --help)"


def _failure(error: BaseException) -> str:
    if isinstance(error, Failed):
        return str(error)
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, OSError) and error.strerror:
        about = f"{error.filename}: " if error.filename else ""
        full = "; free some space and run it again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return f"{about}{error.strerror}{full}"
    if isinstance(error, MemoryError):
        return "there is not enough memory for this"
    said = f"{type(error).__name__}: {error}"
    return f"lamina itself failed: {said[:500]}; this is a bug: run it again with --debug and report what it prints"
