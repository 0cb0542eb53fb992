"""Eight readers of a database that is rebuilt meanwhile, as processes of their own: python rebuilt.py ROOT ENGINE.

Each reader opens the database again and again and checks what it finds against the text that its generation is of.
Prints how many times they opened it, how many generations they saw, and how many of them failed.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from lamina.data import open_prepared
from lamina.retrieve import Embedder, Engine, build, open_database

READERS, REBUILDS = 8, 4


def read(root: Path, until: Path) -> int:
    """Opens until the file is there: how often, and the generations, as 1000 * generations + times."""
    times, seen = 0, set()
    while not until.exists() or times < 3:
        found = open_database(root / "index")
        rows = torch.arange(len(found))
        chosen = rows[torch.randperm(len(rows))[:20]]
        near = found.search(found.store.vectors(chosen), 3)
        assert near.distances[:, 0].max() < 1e-4  # each row finds itself, or one that lies where it lies
        tokens = found.values(chosen)
        assert tokens.shape == (20, 2 * found.spec.chunk) and found.spec.chunk in (5, 6, 7)
        times += 1
        seen.add(found.folder.name)
        time.sleep(0.005)
        found.search(torch.zeros(1, found.spec.width), 2)
        found.close()
    return 1000 * len(seen) + min(times, 999)


def main(root: Path, kind: str) -> None:
    torch.set_num_threads(1)
    text, embedder, until = open_prepared(root / "text"), Embedder(root / "bert"), root / "done"
    build(text, root / "index", embedder, chunk=5, engine=Engine(kind))
    pipes, children = [], []
    for number in range(READERS):
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            torch.manual_seed(number)
            status = 1
            try:
                os.write(send, str(read(root, until)).encode())
                status = 0
            finally:
                os._exit(status)
        os.close(send)
        pipes.append(receive)
        children.append(child)
    for number in range(REBUILDS):
        build(text, root / "index", embedder, chunk=6 + number % 2, engine=Engine(kind), force=True)
    until.touch()
    failed = sum(os.waitpid(child, 0)[1] != 0 for child in children)
    told = [int(os.read(pipe, 100) or 0) for pipe in pipes]
    print(sum(each % 1000 for each in told), max(each // 1000 for each in told), failed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
