"""The records of a run, metrics.jsonl: read however damaged, cut back to a step, gathered into curves.

A record has a step, and one of: the figures of a training step ("loss", "rate", "tokens_per_second", ...), those of an
evaluation ("validation": {"loss": ...}), or a text ("sample").
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class Records:
    """What a file of metrics holds. `damaged`: numbers of the lines that are no records; a last one cut off is one."""

    records: tuple[dict[str, Any], ...]
    damaged: tuple[int, ...] = ()

    def curve(self, *names: str) -> list[tuple[int, float]]:
        """(step, number) of every record that has one under these names: `curve("validation", "loss")`."""
        points = []
        for record in self.records:
            value: Any = record
            for name in names:
                value = value.get(name) if isinstance(value, dict) else None
            if isinstance(value, int | float) and not isinstance(value, bool):
                points.append((record["step"], float(value)))
            elif isinstance(value, str) and value in WORDS:
                points.append((record["step"], WORDS[value]))
        return points

    def last(self, *names: str) -> float | None:
        points = self.curve(*names)
        return points[-1][1] if points else None


def read_records(path: str | os.PathLike[str]) -> Records:
    """Every line that is a record. Raises OSError where the file cannot be read."""
    records, damaged = [], []
    for number, (_, record) in enumerate(_lines(Path(path)), 1):
        if record is None:
            damaged.append(number)
        else:
            records.append(record)
    return Records(tuple(records), tuple(damaged))


def cut_back(path: str | os.PathLike[str], step: int) -> int:
    """Removes the records after a step, and a last line that is cut off; returns how many lines went.

    Steps only ever grow in the file, so everything from the first later one on goes.
    """
    kept = removed = 0
    for line, record in _lines(Path(path)):
        if removed or not line.endswith(b"\n") or (record is not None and record["step"] > step):
            removed += 1
        else:
            kept += len(line)
    with open(path, "r+b") as file:
        file.truncate(kept)
        os.fsync(file.fileno())
    return removed


def without_infinities(value: Any) -> Any:
    """The same with "nan", "inf" and "-inf" in place of the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: without_infinities(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_infinities(item) for item in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def smooth(points: Iterable[tuple[int, float]], window: int) -> list[tuple[int, float]]:
    """Means of the last `window` finite values, at the step of the newest of them."""
    found: list[tuple[int, float]] = []
    inside: deque[float] = deque(maxlen=window)
    for step, value in points:
        if math.isfinite(value):
            inside.append(value)
            found.append((step, math.fsum(inside) / len(inside)))
    return found


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line, and its record; None where it is none."""
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:  # damaged: not JSON, or not UTF-8
                record = None
            step = record.get("step") if isinstance(record, dict) else None
            whole = isinstance(step, int) and not isinstance(step, bool)
            yield line, record if whole else None
