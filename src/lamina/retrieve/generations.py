"""Generations of a database: each a directory that is written beside and appears whole; `current` names the newest.

DIRECTORY/current         "generation-3"
DIRECTORY/generation-3/   index.json and the files that it lists
DIRECTORY/.building/      what is being written, with journal.json
DIRECTORY/corpus/         the prepared text, where it was prepared by the build
DIRECTORY/added/          that of documents which are being added

A reader holds a shared lock on the directory of its generation, which the system lets go of when it ends. A builder
removes old generations that nobody holds.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lamina.durable import remove, sync, write_file
from lamina.errors import CheckpointError, LaminaError

CURRENT, BUILDING, CORPUS, ADDED = "current", ".building", "corpus", "added"
NAMES = frozenset((CURRENT, BUILDING, *(f"{a}{name}{b}" for name in (CORPUS, ADDED)
                   for a, b in (("", ""), (".", ".preparing"), (".", ".old")))))  # fmt: skip
FOLDER = re.compile(r"generation-(\d{1,18})")
ADDRESS = re.compile("[a-z][a-z0-9+.-]+:/")  # of s3://bucket, as a path, s3:/bucket
TRIES = 20  # generations that may pass while one is opened


def check_local(directory: Path) -> None:
    """Raise LaminaError for a uri: the locks and renames of a directory are those of a file system."""
    if ADDRESS.match(str(directory)):
        raise LaminaError(
            f"{directory}: a database's directory is in a file system; it is small, and its rows may lie elsewhere:"
            " name a directory, with --engine lance --uri s3://..."
        )


def current(directory: Path) -> Path:
    """The newest generation. Raises LaminaError where there is none."""
    try:
        with open(directory / CURRENT, "rb") as file:
            name = file.read(100).decode("ascii", "replace").strip()
    except FileNotFoundError:
        unfinished = f"; {BUILDING} is one that was begun: run its build again" if _begun(directory) else ""
        raise LaminaError(f"{directory}: no database: it has no file {CURRENT!r}{unfinished}") from None
    except OSError as error:
        raise LaminaError(f"{directory / CURRENT}: {error.strerror}") from None
    if not FOLDER.fullmatch(name):
        raise CheckpointError(f"{directory / CURRENT}: names {name!r}; it must name a generation, as 'generation-1'")
    return directory / name


def _begun(directory: Path) -> bool:
    return (directory / BUILDING).is_dir()


class Hold:
    """The newest generation, which stays as long as this is held."""

    def __init__(self, directory: Path) -> None:
        check_local(directory)
        for _ in range(TRIES):
            self.path = current(directory)
            try:
                self.handle: int | None = os.open(self.path, os.O_RDONLY)
            except FileNotFoundError:
                self.handle = None
            else:
                try:
                    fcntl.flock(self.handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    if self.path.is_dir():  # else it was removed between the two
                        return
                except BlockingIOError:  # it is being removed
                    pass
                self.close()
            if current(directory) == self.path:
                raise CheckpointError(f"{self.path}: is missing, and {CURRENT!r} names it; build it anew")
        raise CheckpointError(f"{directory}: it was replaced {TRIES} times while it was opened")

    def close(self) -> None:
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None


@contextmanager
def alone(directory: Path) -> Iterator[Path]:
    """The directory that is built in, for one process."""
    work = directory / BUILDING
    work.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield work
    except BlockingIOError:
        raise LaminaError(f"{directory}: another process is building this; wait for it") from None
    finally:
        os.close(handle)


def install(directory: Path) -> Path:
    """Make what was built the newest generation, and remove those that nobody holds."""
    numbers = [int(found[1]) for path in directory.iterdir() if (found := FOLDER.fullmatch(path.name))]
    target = directory / f"generation-{max(numbers, default=0) + 1}"
    sync(directory / BUILDING)
    os.rename(directory / BUILDING, target)
    sync(directory)
    write_file(directory / CURRENT, f"{target.name}\n".encode())
    for path in directory.iterdir():
        if FOLDER.fullmatch(path.name) and path != target:
            _remove(path)
    return target


def _remove(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove(path)
    except BlockingIOError:  # somebody reads it: the next build will remove it
        pass
    finally:
        os.close(handle)
