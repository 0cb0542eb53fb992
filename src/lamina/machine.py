"""The machine and what is installed on it, as facts to be shown or written down. Imports none of what it names."""

from __future__ import annotations

import ctypes
import os
from importlib import metadata
from pathlib import Path


def version(name: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cores() -> int | None:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def memory() -> dict[str, int | None]:
    """Bytes of memory, and of those that are available now; None where the system does not say."""
    found: dict[str, int | None] = {"memory_bytes": None, "memory_available_bytes": None}
    names = {"MemTotal": "memory_bytes", "MemAvailable": "memory_available_bytes"}
    table = Path("/proc/meminfo")
    for line in table.read_text().splitlines() if table.is_file() else []:
        name, _, rest = line.partition(":")
        if name in names:
            found[names[name]] = int(rest.split()[0]) * 1024
    return found


def give_back() -> None:
    """Give memory that was freed back to the system. The C library keeps it for tensors to come; where each batch has
    other sizes than the last these fit nowhere, and a process that lives on 250 MB was seen to hold 2.5 GB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc; others give back by themselves, or cannot
    if trim is not None:
        trim(0)
