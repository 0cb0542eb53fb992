"""Processes of their own for tests, as forks of one that has imported what they need.

A new interpreter takes two seconds of a core to import torch, and another with torch.distributed; a fork takes none.
The process that forks has run no operator, so it has no threads that a fork would lack.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from lamina.cli import main

CONTEXT = multiprocessing.get_context("forkserver")
IMPORTED = [
    "lamina.cli.train",
    "lamina.parallel.checkpoint",
    "lamina.parallel.layout",
    "lamina.parallel.pipeline",
    "lamina.parallel.state",
    "lamina.train.training",
    "pytest",
    "tests.parallel.same",
    "torch._dynamo",  # as torch's optimisers and its sharding do
]
CONTEXT.set_forkserver_preload(IMPORTED)


def fork(target: Callable[..., Any], *args: Any) -> BaseProcess:
    """A process, not yet started, that runs a function of a module in the environment of this moment."""
    return CONTEXT.Process(target=_run, args=(dict(os.environ), target, args))


class Program:
    """A started process, of which what it writes to both streams is kept. Its function gives its exit status."""

    def __init__(self, target: Callable[..., int], *args: Any) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="forked-")
        self.files = [Path(self.folder.name, stream) for stream in ("out", "err")]
        for file in self.files:  # so that what is written can be watched from the start
            file.touch()
        self.process = fork(_streams, self.files, target, args)
        self.process.daemon = True  # it ends with the tests at the latest, whatever fails before `end`
        self.process.start()

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self, patience: float = 50.0) -> subprocess.CompletedProcess[str]:
        """Wait for the end, which is to come within `patience` seconds."""
        try:
            self.process.join(patience)
            status = self.process.exitcode
        finally:  # also where the test is stopped because it takes too long
            self.process.kill()
            self.process.join()
        found = [file.read_text() for file in self.files]
        self.folder.cleanup()
        assert status is not None, found
        return subprocess.CompletedProcess([], status, *found)


def lamina(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command, as `python -m lamina` does."""
    return Program(main, words).end()


def _run(environment: dict[str, str], target: Callable[..., Any], args: Sequence[Any]) -> None:
    lacking = [name for name in IMPORTED if name not in sys.modules]
    assert not lacking, f"the process that forks could not import {lacking}"
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of pytest-xdist ignore it, and so would a fork
    target(*args)


def _streams(files: Sequence[Path], target: Callable[..., int], args: Sequence[Any]) -> None:
    for descriptor, file in enumerate(files, start=1):
        with file.open("wb") as opened:
            os.dup2(opened.fileno(), descriptor)
    sys.exit(target(*args))
