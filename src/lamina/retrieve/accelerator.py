"""A faster index over the rows of a database: faiss' inverted file (extra lamina[faiss]), which can be made anew.

faiss trusts what it reads, so an index is read only where this user's machine made it: it lies in the cache directory,
under the hash of the generation that it is of, and says of which database. One of an older generation is stale: its
rows are other ones now, so it is never read again. One that comes from elsewhere has to be named, and trusted.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamina.durable import remove, sync, write_file
from lamina.errors import CheckpointError, LaminaError, UnsupportedError
from lamina.packaged import cache_directory
from lamina.retrieve.manifest import sha256
from lamina.retrieve.recall import NEAREST, exactly, fewest, sampled
from lamina.retrieve.store import BLOCK, SPARE, Found, Store, checked, joined, without
from lamina.weights.files import read_json

LIST = (
    50  # rows of a list, about: of 200,000 rows, 0.957 of the neighbours at 8 times the rate of exact search (200: 5)
)
TRAINED = 64  # rows a list that the lists are found by
FILE, ABOUT = "index.faiss", "about.json"
OWN = 0.5  # part of the rows that have to find themselves: more would miss those that many equal ones lie beside


def _faiss() -> Any:
    try:
        import faiss  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise UnsupportedError("this needs the package faiss; it is in an extra: pip install 'lamina[faiss]'") from None
    return faiss


class Accelerated:
    """A store whose rows are found by faiss; tokens and vectors are those of the store below."""

    def __init__(self, store: Store, index: Any, probes: int, recall: float, stale: int = 0) -> None:
        """stale: indexes of older generations, which were removed when this one was made."""
        self.store, self.index, self.recall, self.stale = store, index, recall, stale
        self.rows, self.width = store.rows, store.width
        self.probes = probes

    def search(self, queries: Tensor, count: int, exclude: Tensor | None = None) -> Found:
        found = (self._search(q, count, spans) for q, spans in checked(queries.cpu(), self.width, count, exclude))
        return joined(found, count)

    def _search(self, queries: Tensor, count: int, exclude: Tensor | None) -> Found:
        faiss, wanted = _faiss(), min(count, self.rows)
        parameters = faiss.SearchParametersIVF(nprobe=self.probes)
        fetched = count if exclude is None else count + SPARE
        distances, rows = map(torch.from_numpy, self.index.search(queries.numpy(), fetched, params=parameters))
        found = Found(rows, distances.masked_fill(rows < 0, torch.inf))
        found = found if exclude is None else without(found, exclude, count)
        short = (found.rows[:, :wanted] < 0).any(1)
        if bool(short.any()):  # few: most of what was found was left out, or the lists held too little
            rest = exactly(self.store, queries[short], count, None if exclude is None else exclude[short])
            found.rows[short], found.distances[short] = rest.rows, rest.distances
        return found

    def tokens(self, rows: Tensor) -> Tensor:
        return self.store.tokens(rows)

    def vectors(self, rows: Tensor) -> Tensor:
        return self.store.vectors(rows)

    def verify(self) -> None:
        self.store.verify()


def accelerated(store: Store, name: str, of: str, trusted: str | os.PathLike[str] | None = None) -> Accelerated:
    """The rows of a store found by faiss: by the index that was made before, or by one that is made now.

    name: the hash of the generation. of: the directory of the database. trusted: an index from elsewhere, which is
    read as it is; a file that was made to harm can run code. Raises CheckpointError for an index of other rows.
    """
    if trusted is not None:
        index = _read(Path(trusted))
        _check(Path(trusted), index, store)
        _check_vectors(Path(trusted), index, store)
        return _measured(store, index)
    folder = _room() / name
    about = read_json(folder / ABOUT) if (folder / ABOUT).is_file() else None
    if about is not None and (folder / FILE).is_file() and sha256(folder / FILE) == about["sha256"]:
        index = _read(folder / FILE)
        _check(folder / FILE, index, store)
        return Accelerated(store, index, about["probes"], about["recall"])
    old = stale(of, name)
    made = _measured(store, _made(store))
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{FILE}.{secrets.token_hex(4)}.partial"
    _faiss().write_index(made.index, str(partial))
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    said = {"sha256": sha256(partial), "probes": made.probes, "recall": made.recall, "of": of}
    os.replace(partial, folder / FILE)
    sync(folder)
    write_file(folder / ABOUT, json.dumps(said).encode())
    for each in old:
        remove(each)
    made.stale = len(old)
    return made


def stale(of: str, name: str) -> list[Path]:
    """The indexes of a database that are not of its generation `name`."""
    files = [path for path in _room().glob(f"*/{ABOUT}") if path.parent.name != name]
    return [path.parent for path in files if read_json(path).get("of") == of]


def _room() -> Path:
    return cache_directory() / "faiss"


def _made(store: Store) -> Any:
    faiss = _faiss()
    lists = max(1 << round(math.log2(max(store.rows / LIST, 1))), 1)
    index = faiss.index_factory(store.width, f"IVF{lists},Flat", faiss.METRIC_L2)
    vectors, _ = sampled(store, min(TRAINED * lists, store.rows))
    index.train(np.ascontiguousarray(vectors.cpu().numpy()))
    for start in range(0, store.rows, BLOCK):
        block = torch.arange(start, min(start + BLOCK, store.rows))
        index.add(np.ascontiguousarray(store.vectors(block).cpu().numpy()))
    return index


def _measured(store: Store, index: Any) -> Accelerated:
    """With as many lists looked into as the recall asks for."""
    queries, spans = sampled(store)
    right = exactly(store, queries, NEAREST, spans)

    def found(probes: int) -> Found:
        return Accelerated(store, index, probes, 0.0).search(queries, NEAREST, spans)

    probes, recall = fewest(found, right, index.nlist)
    return Accelerated(store, index, probes, round(recall, 4))


def _read(path: Path) -> Any:
    faiss = _faiss()
    if not path.is_file():
        raise LaminaError(f"{path}: no such file; an index that faiss wrote is needed")
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: faiss cannot read it: {' '.join(str(error).split())[:160]}") from None


def _check(path: Path, index: Any, store: Store) -> None:
    if not hasattr(index, "nlist") or (index.ntotal, index.d) != (store.rows, store.width):
        raise CheckpointError(
            f"{path}: {type(index).__name__} of {index.ntotal:,} rows of width {index.d}; an inverted file of"
            f" {store.rows:,} rows of width {store.width} is needed"
        )


def _check_vectors(path: Path, index: Any, store: Store) -> None:
    """Whether rows find themselves. The nearest of another generation are as near: only their numbers are wrong."""
    queries, spans = sampled(store)
    found = Accelerated(store, index, index.nlist, 0.0).search(queries, NEAREST)
    own = float((found.rows == spans[:, 0, :1]).any(1).float().mean())
    if own < OWN:
        raise CheckpointError(
            f"{path}: {own:.0%} of some rows find themselves: it is stale, of an older generation of this database, or"
            " of another one; name none, and it is made anew"
        )
