"""Files and directories that are there whole or not at all, also after a kill, and durable once they are there."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lamina.errors import CheckpointError, StorageError

SUFFIX = ".partial"  # of what is being written, beside the place where it will stand
STALE = 60.0  # seconds after which something partial that nobody holds is a dead writer's


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes one small file, which appears whole or not at all, and replaces one that was there in one step."""
    target = Path(os.path.realpath(path))
    with reported(target, len(data)), locked(partial_name(target), directory=False) as (partial, lock):
        with open(lock, "wb", closefd=False) as file:
            file.write(data)
            flush(file)
        os.replace(partial, target)
        sync(target.parent)


def flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync(directory: Path) -> None:
    """Makes names durable: a rename is on disk only when its directory is."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def partial_name(target: Path) -> Path:
    return target.parent / f".{target.name}.{secrets.token_hex(4)}{SUFFIX}"


@contextmanager
def reported(target: Path, needed: int) -> Iterator[None]:
    """Makes the parent, checks for room, and turns what the system refuses into one line that names both numbers."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        free = shutil.disk_usage(target.parent).free
        if free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield
    except OSError as error:
        raise refused(target, needed, error) from error


def refused(target: Path, needed: int, error: OSError, state: str = "nothing was changed") -> StorageError:
    """What to raise when the system refuses to write: why, how much is needed and free, and how things stand now."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(next(folder for folder in target.absolute().parents if folder.is_dir())).free
        reason = f"{reason}: {needed:,} bytes are needed, and {free:,} are free"
    return StorageError(f"{target}: cannot be written: {reason}; {state}")


@contextmanager
def locked(partial: Path, directory: bool) -> Iterator[tuple[Path, int]]:
    """A new file or directory, locked so that others can tell that its writer lives, and removed if still there."""
    if directory:
        partial.mkdir()
    handle = os.open(partial, os.O_RDONLY if directory else os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield partial, handle
    finally:
        os.close(handle)
        remove(partial)


def sweep(target: Path) -> None:
    """Removes what writers of this target left behind when they were killed: old, and locked by nobody."""
    for path in target.parent.iterdir():
        if not (path.name.startswith(f".{target.name}.") and path.suffix == SUFFIX):
            continue
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError:  # it has gone meanwhile, or belongs to another user
            continue
        try:
            if time.time() - os.fstat(handle).st_mtime > STALE:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(path)
        except BlockingIOError:  # its writer lives
            pass
        finally:
            os.close(handle)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def install(partial: Path, target: Path, force: bool) -> None:
    """Gives the whole directory its name. What it replaces then bears the partial one's name, and is removed."""
    if force and target.exists() and _exchange(partial, target):
        return
    aside = partial.with_name(partial.name.removesuffix(SUFFIX) + f".old{SUFFIX}")
    replaced = force and target.exists()
    if replaced:
        try:
            os.rename(target, aside)
        except FileNotFoundError:  # another writer has moved it aside meanwhile, and comes first
            replaced = False
    try:
        os.rename(partial, target)  # onto nothing, or onto an empty directory; the system refuses all else
    except OSError as error:
        if replaced:
            os.rename(aside, target)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise CheckpointError(f"{target}: another process has written it meanwhile; nothing was changed") from None
        raise
    if replaced:
        remove(aside)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step, where the system can: Linux, renameat2 with RENAME_EXCHANGE (2)."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    here = -100  # AT_FDCWD: names are relative to the working directory, as everywhere
    return swap is not None and swap(here, os.fsencode(one), here, os.fsencode(other), 2) == 0
