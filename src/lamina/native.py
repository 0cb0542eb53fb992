"""Kernels in C: built by the machine's own compiler when they are first needed, in about a second, and kept.

They lie in the cache directory under a name made from the source, the flags and the processor. Without a compiler there
are none, and torch does what they would do.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path

from lamina.packaged import cache_directory, processor

FLAGS = ("-march=native", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared")


def library(source: Path, *flags: str) -> ctypes.CDLL | None:
    """The functions of a C file, compiled with `flags` too; None where there is no compiler (`lamina doctor` says)."""
    flags = (*flags, *FLAGS)
    made_from = "\n".join((source.read_text(), *flags, *processor()))
    path = cache_directory() / f"{source.stem}-{hashlib.sha256(made_from.encode()).hexdigest()[:24]}.so"
    try:
        if not path.is_file():
            _compile(source, path, flags)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError):
        return None


def _compile(source: Path, path: Path, flags: tuple[str, ...]) -> None:
    """Build aside and move into place: two processes may do it at once, and a kill leaves nothing broken."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        compiler = os.environ.get("CC", "cc" if platform.system() != "Linux" else "gcc")
        subprocess.run([compiler, *flags, str(source), "-o", str(made)], check=True, capture_output=True)
        os.replace(made, path)
