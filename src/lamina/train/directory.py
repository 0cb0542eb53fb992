"""What is where in the directory of a run.

config.yaml       the configuration as resolved
spec.json         the spec of the model
env.json          command, versions, machine, git commit
metrics.jsonl     a JSON record a line, only ever added to; a run that resumes cuts it back to its step
events.log        what happened, a line each with the time
samples/          texts written on the way, one file each
nonfinite/        what was found in steps that were skipped (train/finite.py)
checkpoints/      train/checkpoint.py
adapter/          at the end, where there is one: peft's files of it
model/            at the end: the trained model, an adapter merged into it
report.html       train/report.py
run.lock          who writes here: held by the system's lock, so a dead owner holds nothing
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

CONFIG, SPEC, ENVIRONMENT = "config.yaml", "spec.json", "env.json"
METRICS, EVENTS, LOCK, REPORT = "metrics.jsonl", "events.log", "run.lock", "report.html"
SAMPLES, CHECKPOINTS, NONFINITE = "samples", "checkpoints", "nonfinite"
ADAPTER, MODEL = "adapter", "model"
PARTS = "parts"  # in a checkpoint, what each rank has written


def owner(directory: str | os.PathLike[str]) -> str | None:
    """Who writes to a run directory now: process, host and since when. None where nobody does."""
    path = Path(directory) / LOCK
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read(500).decode("utf-8", "replace").strip() or "a process that has not said who it is"
    return None
