"""A process whose children save checkpoints and are killed: `python -m tests.train.killed_saver DIRECTORY N`.

Prints one JSON line a kill: what was newest and valid, by hash too, and what was still lying about. With `NAME,NAME` in
place of N, a child for each kills itself at that moment of its third save.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from lamina.train import checkpoint


def content(step: int) -> checkpoint.Content:
    """About 5 MB, all of whose numbers tell the step."""
    full = {f"layers.{i}.weight": torch.full((256, 512), float(step)) for i in range(6)}
    moments = {"state": {0: {"step": torch.tensor(float(step)), "exp_avg": torch.full((400_000,), float(step))}}}
    return checkpoint.Content({"model": full}, {"optimiser": moments}, {"step": step})


def save_for_ever(directory: Path, step: int) -> None:
    while True:
        step += 1
        checkpoint.save(directory, step, content(step))


def consistent(path: Path) -> bool:
    saved = checkpoint.read(path, verify=True)
    step = saved.manifest.step
    optimiser = saved.tree("optimiser")["state"][0]
    values = [*saved.tensors("model").values(), *optimiser.values()]
    return saved.state["step"] == step and all(bool((value == step).all()) for value in values)


def look(directory: Path) -> dict:
    newest, skipped = checkpoint.newest_valid(directory, verify=True)
    return {
        "newest": newest and newest.name,
        "skipped": [str(pair) for pair in skipped],
        "consistent": newest is None or consistent(newest),
        "rubbish": [path.name for path in directory.iterdir() if path.name.startswith(".")],
        "kept": sorted(path.name for path in directory.glob("step-*")),
    }


def kill_at(name: str) -> None:
    """Puts a SIGKILL in the place of the hook, in this process: in its third save, the first that deletes anything."""
    seen = []

    def moment(now: str) -> None:
        seen.append(now)
        if now == name and seen.count("began") == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.moment = moment


def one(directory: Path, step: int, name: str | None, after: float) -> dict:
    """A child that saves and is killed: at the moment `name`, or `after` seconds."""
    directory.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        if name is not None:
            kill_at(name)
        save_for_ever(directory, step)
    if name is None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    seen = look(directory)
    checkpoint.sweep(directory)
    return seen | {"left": [path.name for path in directory.iterdir() if path.name.startswith(".")]}


def main(directory: Path, what: str) -> None:
    torch.set_num_threads(1)
    chance = random.Random(0)
    begin = time.perf_counter()
    checkpoint.save(directory / "timed", 1, content(1))
    longest = min(3 * (time.perf_counter() - begin), 0.5)  # so that kills come in and between saves on any machine
    step = 0
    for name in [None] * int(what) if what.isdigit() else what.split(","):
        seen = one(directory / (name or ""), step, name, chance.uniform(0.0, longest))
        step = int(seen["newest"].removeprefix("step-")) if name is None and seen["newest"] else step
        print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
