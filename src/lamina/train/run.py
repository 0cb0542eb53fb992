"""A run directory that is being written: one owner, metrics that are cut back, events, samples."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lamina.durable import write_file
from lamina.errors import LaminaError, StorageError
from lamina.machine import cores, memory, version
from lamina.train.directory import CHECKPOINTS, CONFIG, ENVIRONMENT, EVENTS, LOCK, METRICS, SAMPLES, SPEC, owner
from lamina.train.records import cut_back, without_infinities

PACKAGES = ("lamina", "torch", "numpy", "tokenizers")


class Run:
    """A run directory that this process owns until it is closed.

    >>> with Run("runs/first", "model: gpt2/small\\n", command=["lamina", "train", "first.yaml"]) as run:
    ...     run.record({"step": 1, "loss": 4.2})

    A new run needs a directory that holds no run yet; with `resume`, one that does. Raises LaminaError where another
    process owns it, naming that process, and StorageError where it cannot be written. A directory that is deleted or
    moved away while the run goes on is made anew, with what is recorded from then on.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        config: str,
        *,
        command: Sequence[str] = (),
        spec: str | None = None,
        resume: bool = False,
    ) -> None:
        self.directory = Path(directory).absolute()
        self._texts = {CONFIG: config} | ({} if spec is None else {SPEC: spec})
        self._texts[ENVIRONMENT] = json.dumps(environment(command), indent=1) + "\n"
        self._files: dict[str, IO[bytes]] = {}
        there = (self.directory / METRICS).exists()
        if there and not resume:
            raise LaminaError(
                f"{self.directory}: holds a run already; go on with it (--resume auto), or name another directory"
            )
        self._open()
        self.event(f"{'resumed' if there else 'began'}: {' '.join(command) or 'from Python'}")

    @property
    def checkpoints(self) -> Path:
        return self.directory / CHECKPOINTS

    def record(self, record: Mapping[str, Any]) -> None:
        """Adds one record to the metrics, on disk for every reader when this returns. Numbers that are not finite
        become text ("nan", "inf"), which JSON can say."""
        line = json.dumps(without_infinities(dict(record)), allow_nan=False)
        self._append(METRICS, f"{line}\n")

    def event(self, text: str) -> None:
        """Adds one line to events.log."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._append(EVENTS, f"{stamp} {' '.join(text.splitlines())}\n")

    def warn(self, text: str) -> None:
        """Adds an event that reports and `lamina runs` show as a warning."""
        self.event(f"warning: {text}")

    def sample(self, step: int, text: str, number: int = 0) -> None:
        """Keeps a text that the model wrote at this step; `number` counts those of one step, a file each."""
        self.record({"step": step, "sample": text})
        self._alive()
        (self.directory / SAMPLES).mkdir(exist_ok=True)
        name = f"step-{step}-{number + 1}.txt" if number else f"step-{step}.txt"
        write_file(self.directory / SAMPLES / name, text.encode("utf-8", "backslashreplace"))

    def cut_back(self, step: int) -> int:
        """Removes the records after this step, which a run that resumes there will make again; returns how many."""
        removed = cut_back(self.directory / METRICS, step)
        if removed:
            self.event(f"{METRICS} is cut back to step {step}: {removed} records")
        return removed

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._own()
            for name, text in self._texts.items():
                write_file(self.directory / name, text.encode())
            for name in (METRICS, EVENTS):
                self._files[name] = open(self.directory / name, "ab", buffering=0)  # noqa: SIM115  closed by close()
        except OSError as error:
            self.close()
            raise StorageError(f"{error.filename or self.directory}: cannot be written: {error.strerror}") from None
        except LaminaError:
            self.close()
            raise

    def _own(self) -> None:
        path = self.directory / LOCK
        file = open(path, "a+b", buffering=0)  # noqa: SIM115  the lock lasts as long as it is open
        for attempt in range(5):  # whoever asks for the owner holds it too, for a moment
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05 * attempt)
        else:
            file.close()
            raise LaminaError(
                f"{self.directory}: another process trains here ({owner(self.directory)}); stop it first, or name "
                "another directory"
            )
        self._files[LOCK] = file
        file.truncate(0)
        file.write(
            f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}".encode()
        )

    def _append(self, name: str, line: str) -> None:
        self._alive()
        data = line.encode("utf-8", "backslashreplace")
        try:
            # One call of the system a line, unbuffered: a kill leaves whole lines, and at most one that is cut off.
            written = self._files[name].write(data)
        except OSError as error:
            raise StorageError(f"{self.directory / name}: cannot be written: {error.strerror}") from error
        if written != len(data):
            raise StorageError(f"{self.directory / name}: cannot be written: only {written} bytes of a line had room")

    def _alive(self) -> None:
        """Makes the directory anew where it has gone from under the run."""
        if not self._files:
            raise LaminaError(f"{self.directory}: this run is closed")
        try:
            here = os.stat(self.directory / LOCK)
        except OSError:
            here = None
        mine = os.fstat(self._files[LOCK].fileno())
        if here is None or (here.st_dev, here.st_ino) != (mine.st_dev, mine.st_ino):
            self.close()
            self._open()  # refuses if another run has begun there meanwhile
            self.event("the directory had been deleted or moved away while the run went on, and was made anew")


class Voice:
    """Lines for whoever watches. Where nobody can read them any more (a closed pipe), the run goes on in silence."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.lost: str | None = None  # why nothing is said any more

    def say(self, text: str, end: str = "\n") -> None:
        if self.lost is not None or self.stream is None:
            return
        try:
            self.stream.write(text + end)
            self.stream.flush()
        except (OSError, ValueError) as error:  # a broken pipe or full disk; a stream that was closed
            self.lost = str(error)


def environment(command: Sequence[str] = ()) -> dict[str, Any]:
    """What a run ran on: command, versions, machine, and the commit of the git directory it was started in, if any."""
    return {
        "command": list(command),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "directory": os.getcwd(),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "cores": cores(),
        **memory(),
        "git": git(),
    }


def git() -> dict[str, Any] | None:
    """Commit of the working directory, and whether files differ from it; None where there is no git or no commit."""

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    if commit is None:
        return None
    changed = ask("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": None if changed is None else bool(changed)}
