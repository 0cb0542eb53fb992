"""Runs of the past, or of now, read from their directories: whatever is half written or damaged is passed over."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lamina.errors import LaminaError
from lamina.train.directory import CHECKPOINTS, CONFIG, ENVIRONMENT, EVENTS, METRICS, SPEC, owner
from lamina.train.records import Records, read_records


@dataclass(frozen=True)
class Past:
    """What a run directory holds."""

    directory: Path
    name: str
    config: str
    environment: dict[str, Any]
    metrics: Records
    events: tuple[str, ...]
    checkpoints: tuple[int, ...]  # their steps, lowest first
    owner: str | None  # who writes to it now, if somebody does
    spec: str | None = None  # spec.json, where it is there

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(line for line in self.events if " warning: " in line)

    @property
    def samples(self) -> tuple[dict[str, Any], ...]:
        return tuple(record for record in self.metrics.records if isinstance(record.get("sample"), str))

    def summary(self) -> dict[str, Any]:
        """The figures by which runs are compared; None where a run has none."""
        metrics = self.metrics
        losses, validation = metrics.curve("loss"), metrics.curve("validation", "loss")
        speeds = [value for _, value in metrics.curve("tokens_per_second")]
        finite = (point for point in validation if math.isfinite(point[1]))
        best = min(finite, key=lambda point: point[1], default=None)
        memory = [value for _, value in metrics.curve("memory_bytes")]
        return {
            "steps": max((record["step"] for record in metrics.records), default=0),
            "tokens": metrics.last("tokens"),
            "loss": losses[-1][1] if losses else None,
            "validation_loss": validation[-1][1] if validation else None,
            "best_validation_loss": None if best is None else best[1],
            "best_step": None if best is None else best[0],
            "tokens_per_second": statistics.median(speeds) if speeds else None,
            "utilisation": _middle(metrics.curve("utilisation")),
            "seconds": metrics.last("seconds"),
            "memory_bytes": max(memory, default=None),
            "damaged_lines": len(metrics.damaged),
        }


def read_run(directory: str | os.PathLike[str]) -> Past:
    """A run. Raises LaminaError where the directory holds none."""
    directory = Path(directory)
    if not (directory / METRICS).is_file():
        raise LaminaError(f"{directory}: is no run: it has no {METRICS}")
    try:
        metrics = read_records(directory / METRICS)
    except OSError as error:
        raise LaminaError(f"{directory / METRICS}: {error.strerror}") from None
    kept = (directory / CHECKPOINTS).glob("step-*") if (directory / CHECKPOINTS).is_dir() else ()
    steps = (path.name.removeprefix("step-") for path in kept)
    return Past(
        directory,
        directory.resolve().name,
        _text(directory / CONFIG),
        _mapping(_text(directory / ENVIRONMENT)),
        metrics,
        tuple(_text(directory / EVENTS).splitlines()),
        tuple(sorted(int(step) for step in steps if step.isdigit())),
        owner(directory),
        _text(directory / SPEC) or None,
    )


def find_runs(directories: Iterable[str | os.PathLike[str]]) -> list[Past]:
    """The runs among these directories, and those directly in them, in the order of their names.

    Raises LaminaError for a directory that is not there.
    """
    found: list[Past] = []
    for given in map(Path, directories):
        if not given.is_dir():
            raise LaminaError(f"{given}: no such directory")
        if (given / METRICS).is_file():
            found.append(read_run(given))
        else:
            found += [read_run(path) for path in sorted(given.iterdir()) if (path / METRICS).is_file()]
    return found


def configuration(run: Past) -> dict[str, Any]:
    """The configuration as {path: value}; nothing where it cannot be read, or refers to parts of itself: some kilobytes
    of such references can stand for gigabytes, and lamina writes none."""
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(run.config)):
            return {}
        found = yaml.safe_load(run.config)
    except yaml.YAMLError:
        return {}

    def flat(value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, dict) and value:
            return {key: v for name, item in value.items() for key, v in flat(item, f"{path}.{name}").items()}
        # As JSON says it: YAML also knows dates.
        return {path.removeprefix("."): json.loads(json.dumps(value, default=str, skipkeys=True))}

    return flat(found, "") if isinstance(found, dict) else {}


def differing(runs: Sequence[Past]) -> dict[str, list[Any]]:
    """The paths at which the configurations differ, each with the value of every run; None where one has none."""
    found = [configuration(run) for run in runs]
    paths = dict.fromkeys(path for each in found for path in each)
    values = {path: [each.get(path) for each in found] for path in paths}
    return {path: each for path, each in values.items() if any(value != each[0] for value in each)}


def duration(seconds: float) -> str:
    """3725 -> "1 h 2 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s"


def _middle(points: list[tuple[int, float]]) -> float | None:
    return statistics.median(value for _, value in points) if points else None


def _text(path: Path) -> str:
    """What a file says; nothing where it is not there, since a run may have been killed before it was written."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _mapping(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
