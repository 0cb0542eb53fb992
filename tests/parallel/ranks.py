"""Several processes for a test: each does all checks of a list, one after the other, and says what failed."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from tests.forked import fork

Check = Callable[[int, Path], None]
"""A check gets the rank, and a folder that all ranks share; they make an assertion where it fails."""


def run(
    world: int, checks: dict[str, Check], folder: Path, patience: float = 180.0, *, again: bool = False
) -> dict[str, list[str]]:
    """For each check, what failed on each rank: "" where it held, "missing" where a rank did not come so far.

    again: where a rank died by a signal (glibc has found the heap of one damaged, once in some ten runs of all meshes;
    by what is not known) all checks are done once more in an empty folder, and it is said. What a check says is never
    asked again.
    """
    found, crashed = _ran(world, checks, folder, patience)
    if crashed and again:
        sys.stderr.write(f"a rank died by signal {crashed}; all its checks are done again\n")
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        found, _ = _ran(world, checks, folder, patience)
    return found


def _ran(world: int, checks: dict[str, Check], folder: Path, patience: float) -> tuple[dict[str, list[str]], int]:
    """What each check said, and the signal by which a rank died of itself, or 0."""
    processes = [fork(_work, rank, world, checks, str(folder)) for rank in range(world)]
    for process in processes:
        process.start()
    crashed = 0
    for process in processes:
        process.join(patience)
        if process.is_alive():
            process.kill()
            process.join()
        elif process.exitcode is not None and process.exitcode < 0:
            crashed = -process.exitcode
    found: dict[str, list[str]] = {name: [] for name in checks}
    for rank in range(world):
        path = folder / f"{rank}.json"
        said = json.loads(path.read_text()) if path.exists() else {}
        for name in checks:
            found[name].append(said.get(name, "missing"))
    return found, crashed


def _work(rank: int, world: int, checks: dict[str, Check], folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    said: dict[str, str] = {}
    for name, check in checks.items():
        try:
            check(rank, Path(folder))
            said[name] = ""
        except Exception:
            said[name] = traceback.format_exc()
        Path(folder, f"{rank}.json").write_text(json.dumps(said))
        if said[name]:
            break  # the ranks may no longer be at the same place
    if dist.is_initialized():  # else a check has left it
        dist.destroy_process_group()


def folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="ranks-")


def first(found: dict[str, list[str]]) -> str:
    """What went wrong first, in full."""
    for name, said in found.items():
        for rank, text in enumerate(said):
            if text not in ("", "missing"):
                return f"{name}, rank {rank}: {text}"
    return "a rank did not come to the end"
