"""Documents are added and taken out again, and that is killed at random: python killed_editor.py ROOT ENGINE SEED.

Prints the kills, whether every database that was there in between was one of the two, and the generations at the end.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from lamina.data import open_prepared
from lamina.retrieve import Database, Embedder, Engine, add, build, open_database, remove

KILLS = 20


def change(root: Path) -> None:
    database, more = open_database(root / "index"), open_prepared(root / "more")
    if len(database.spec.origins) == 1:
        add(database, more, batch=16, close=True)
    else:
        remove(database, [more.manifest.sources[0].name], batch=16, close=True)


def holds(database: Database) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.arange(len(database))
    return database.store.vectors(rows), database.values(rows)


def main(root: Path, kind: str, seed: int) -> None:
    torch.set_num_threads(1)
    build(open_prepared(root / "text"), root / "index", Embedder(root / "bert"), chunk=7, engine=Engine(kind))
    states = {}
    begun = time.monotonic()
    for _ in range(2):
        found = open_database(root / "index")
        states[len(found)] = holds(found)
        found.close()
        change(root)
    whole, draw, kills, same = time.monotonic() - begun, random.Random(seed), 0, len(states) == 2
    while kills < KILLS:
        child = os.fork()
        if child == 0:
            change(root)
            os._exit(0)
        time.sleep(draw.uniform(0, whole / 2))
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        found = open_database(root / "index")  # readers see a whole one all the time
        right = states[len(found)]
        same = same and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(holds(found), right, strict=True))
        found.verify()
        found.close()
    change(root)
    print(kills, same, len(list((root / "index").glob("generation-*"))))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
