"""Builds that are killed at random, as processes of their own: python killed_builder.py ROOT ENGINE SEED.

Each goes on where the one before it was killed; when one is done, another begins, until there were 20 kills. Prints the
kills, whether every database that came of it is that of a build which nobody disturbed, and what lies there at the end.
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
from lamina.retrieve import Embedder, Engine, build, open_database

KILLS = 20


def main(root: Path, kind: str, seed: int) -> None:
    torch.set_num_threads(1)
    text, embedder = open_prepared(root / "text"), Embedder(root / "bert")
    engine = Engine(kind)
    begun = time.monotonic()
    build(text, root / "quiet", embedder, chunk=7, batch=16, engine=engine)
    whole = time.monotonic() - begun
    quiet, draw, kills, same = open_database(root / "quiet"), random.Random(seed), 0, True
    held = open_database(root / "killed")
    every = torch.arange(len(quiet))
    while kills < KILLS:
        child = os.fork()
        if child == 0:
            embedder.cut = 0
            build(text, root / "killed", embedder, chunk=7, batch=16, engine=engine, force=True)
            os._exit(0)
        time.sleep(draw.uniform(0, whole / 3))
        os.kill(child, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        kills += killed
        found = open_database(root / "killed")  # readers see a whole one all the time
        if found.folder == held.folder:
            assert found.spec == held.spec
        else:  # it was done before the kill, or killed after it was done
            same = same and len(quiet) == len(found) and quiet.spec.notes == found.spec.notes
            same = same and torch.equal(quiet.store.vectors(every), found.store.vectors(every))
            same = same and torch.equal(quiet.store.tokens(every), found.store.tokens(every))
            held.close()
            held = open_database(root / "killed")
        found.verify()
        found.close()
    build(text, root / "killed", embedder, chunk=7, batch=16, engine=engine, force=True)
    found = open_database(root / "killed")
    same = same and torch.equal(quiet.store.vectors(every), found.store.vectors(every))
    print(kills, same and quiet.spec.notes == found.spec.notes, len(list((root / "killed").glob("generation-*"))))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
