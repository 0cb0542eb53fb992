"""The directory in which data is prepared: one process at a time, gone on with after a kill, and put in place whole."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lamina.data import manifest as layout
from lamina.durable import SUFFIX, remove, sync
from lamina.errors import LaminaError

PARTS = ("train", "validation")
JOURNAL = "journal.json"  # where the work stands


def journal_of(work: Path, key: str) -> dict[str, Any]:
    """What an earlier run with the same wishes left; anything else is cleared away."""
    path = work / JOURNAL
    found = json.loads(path.read_bytes()) if path.is_file() else {}
    if found.get("key") == key:
        for partial in work.rglob(f".*{SUFFIX}"):  # whose writer was killed: there is one process at a time
            remove(partial)
        return found
    for each in work.iterdir():
        shutil.rmtree(each) if each.is_dir() else each.unlink()
    return {}


def check_target(target: Path, force: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not force:
        raise LaminaError(f"{target}: exists already; name another directory, or replace it with --force")
    if not any((target / part / layout.NAME).is_file() for part in ("", *PARTS)):
        raise LaminaError(f"{target}: is no prepared directory, so it is not replaced; name another one")


def install(work: Path, target: Path) -> None:
    aside = target.with_name(f".{target.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        os.rename(target, aside)
    os.rename(work, target)
    sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def owned(work: Path) -> Iterator[None]:
    """The working directory, for one process."""
    work.mkdir(parents=True, exist_ok=True)
    handle = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise LaminaError(f"{work}: another process is preparing this; wait for it") from None
    finally:
        os.close(handle)
