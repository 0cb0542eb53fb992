"""Progress of long commands: one line that is written over on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lamina.cli.output import Output, duration

if TYPE_CHECKING:
    from lamina.data.prepare import Progress as Reading
    from lamina.retrieve import Progress

EVERY = 10.0  # seconds between two lines where nobody watches


class Line:
    """A line of progress."""

    def __init__(self, out: Output, last: float = -EVERY) -> None:
        """last: when the line before was; at first there was none, so the first is said at once."""
        self.out, self.last = out, last

    def say(self, line: str) -> None:
        now, watched = time.monotonic(), self.out.progress
        if self.out.quiet or now - self.last < (0.2 if watched else EVERY):
            return
        self.last = now
        if watched:
            sys.stderr.write(f"\r\x1b[K{line}")
            sys.stderr.flush()
        else:
            self.out.note(line)

    def clear(self) -> None:
        if self.out.progress:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


class Rows(Line):
    """How far the rows of a database, or what is looked for in one, are."""

    def __init__(self, out: Output) -> None:
        super().__init__(out)
        self.made, self.seconds = 0, 0.0
        self.begin()

    def begin(self) -> None:
        """What is timed begins now."""
        self.started = time.monotonic()

    def reading(self, progress: Reading) -> None:
        part = 100 * progress.bytes / max(progress.total, 1)
        self.say(f"reading: {part:.0f} %, {progress.tokens:,} tokens, {Path(progress.source).name}")

    def show(self, progress: Progress) -> None:
        if progress.what in ("embedding", "searching"):
            self.made, self.seconds = progress.rows - progress.begun, time.monotonic() - self.started
        else:
            self.begin()  # what was embedded before takes no time of what is to come
        line = f"{progress.what}: {progress.rows:,} of {progress.total:,}"
        if self.made and progress.rows < progress.total:
            rate = self.made / self.seconds
            line += f", {rate:,.1f} a second, {duration((progress.total - progress.rows) / rate)} left"
        self.say(line)
