"""What keeps a run from ending badly, apart from its numbers: signals, spikes, a watchdog."""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from types import FrameType
from typing import Any

from lamina.errors import LaminaError

STOPPING = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Inside, signals ask the loop for something instead of ending it where it stands.

    SIGTERM and SIGINT: `asked` becomes "stop"; the loop finishes its step, saves and leaves with `status`. A second one
    stops at once, as KeyboardInterrupt or by the signal itself. SIGUSR1: `asked` becomes "save", until `done()`.
    In a thread that is not the main one, where Python gives no signals, nothing is ever asked.
    """

    def __init__(self) -> None:
        self.asked: str | None = None  # "stop" or "save"
        self.signal: int | None = None  # which one asked to stop
        self._before: dict[int, Any] = {}

    @property
    def status(self) -> int:
        """What the process should exit with: 143 after SIGTERM, 130 after SIGINT, 0 if nothing asked it to stop."""
        return 0 if self.signal is None else 128 + self.signal

    def done(self) -> None:
        """The checkpoint that was asked for is saved."""
        if self.asked == "save":
            self.asked = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (*STOPPING, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.asked = self.asked or "save"
        elif self.signal is None:
            self.asked, self.signal = "stop", number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class Spikes:
    """Notices a loss far above those before it. A spike is said, and never changes the run.

    A loss is a spike where it exceeds the median of the last `window` by more than `factor` times their spread (the
    median distance from the median), and by more than 10 %.
    """

    def __init__(self, window: int = 64, factor: float = 8.0) -> None:
        self.factor = factor
        self.count = 0
        self._losses: deque[float] = deque(maxlen=window)

    def check(self, step: int, loss: float) -> str | None:
        """A line to be shown where this loss is a spike."""
        said = None
        if len(self._losses) == self._losses.maxlen and math.isfinite(loss):
            middle = statistics.median(self._losses)
            spread = statistics.median(abs(each - middle) for each in self._losses)
            if loss - middle > max(self.factor * spread, 0.1 * abs(middle)):
                self.count += 1
                said = f"step {step}: the loss is {loss:.4g}, and {middle:.4g} in the middle of the last "
                said += f"{len(self._losses)} steps"
        if math.isfinite(loss):
            self._losses.append(loss)
        return said


class Watchdog:
    """Writes the stacks of all threads to a file when no step ends for `seconds`; again and again, until one does.

    The run itself is left alone: whoever reads the file decides. Where the file cannot be written any more, they go to
    standard error. A clock that is set meanwhile changes nothing.
    """

    def __init__(self, seconds: float, path: str | os.PathLike[str]) -> None:
        if not seconds > 0:
            raise LaminaError(f"watchdog is {seconds:g}, and must be more than 0 seconds")
        self.seconds = seconds
        self.fired = 0
        self._path = path
        self._beat = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """A step has ended."""
        self._beat = time.monotonic()

    def __enter__(self) -> Watchdog:
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        said = self._beat
        while not self._end.wait(min(self.seconds / 4, 1.0)):
            said = max(said, self._beat)
            if time.monotonic() - said >= self.seconds:
                self._say(time.monotonic() - self._beat)
                self.fired += 1
                said = time.monotonic()

    def _say(self, quiet: float) -> None:
        line = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} no step for {quiet:.1f} s; what every thread is doing:\n"
        try:
            with open(self._path, "a") as file:
                file.write(line)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            if sys.__stderr__ is not None:
                sys.__stderr__.write(line)
                faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
