"""Databases of real text: how fast chunks are embedded, how fast neighbours are found, and how many of them.

    python benchmarks/retrieval.py DIR --build CORPUS... [--engine lance] --queries 0 --embed 0 [--json FILE]
    python benchmarks/retrieval.py DIR [--threads 2] [--queries 2000] [--embed 2048] [--json FILE]

With --build, DIR is built of the texts first, by the command and as a process of its own, with its time and memory.
FILE keeps what it holds of parts that were not measured this time.

Else DIR is a database of the engine exact; its rows are copied to the engine lance (extra lamina[retrieval]) and
indexed by faiss (extra lamina[faiss]). Queries are vectors of rows, which do not find themselves; they are asked in
batches. Rates are the best of three. Recall is that of the 10 nearest beside the exact search of the same queries.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamina.machine import cores
from lamina.retrieve import Database, Engine, copy, open_database
from lamina.retrieve.build import said
from lamina.retrieve.recall import NEAREST, exactly, recall, sampled
from lamina.retrieve.store import Found, Store

ROUNDS = 3
BATCH = 512


def best(search: Any, queries: int) -> float:
    """Queries a second, the best of some rounds."""
    times = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        search()
        times.append(time.perf_counter() - begun)
    return round(queries / min(times), 1)


def building(corpus: list[Path], directory: Path, engine: str, threads: int) -> dict[str, Any]:
    """`lamina index build` of texts, from the files to the last rename."""
    command = [sys.executable, "-m", "lamina", "index", "build", *map(str, corpus), "-o", str(directory)]
    command += ["--embedder", "minilm-l6", "--dtype", "bfloat16", "--tokenizer", "smollm2-135m", "--engine", engine]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads)}
    begun, held = time.perf_counter(), []
    with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        while child.poll() is None:
            held.append(own_memory(child.pid))
            time.sleep(0.5)
        said = json.loads(child.stdout.read())
    seconds = time.perf_counter() - begun
    fifth = len(held) // 5
    files = [path for each in corpus for path in ([each] if each.is_file() else sorted(each.rglob("*")))]
    texts = 0
    for path in filter(Path.is_file, files):
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            texts += len(file.read())
    return {
        "engine": engine,
        "threads": threads,
        "text_bytes": texts,
        "chunks": said["made"],
        "seconds": round(seconds, 1),
        "chunks_per_second": round(said["made"] / seconds, 1),
        "own_memory_mib": {
            "in_the_second_fifth": max(held[fifth : 2 * fifth], default=0),
            "in_the_last_fifth": max(held[-fifth:], default=0),
        },
    }


def own_memory(process: int) -> int:
    """MiB that are a process's own: mapped files, which the system may drop, are left out."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return max((int(line.split()[1]) >> 10 for line in lines if line.startswith("RssAnon")), default=0)


def embedding(database: Database, count: int) -> dict[str, float]:
    """Chunks a second, from tokens to vectors, of chunks from all over the database."""
    rows = torch.linspace(0, len(database) - 1, count).long()
    texts = said(database.tokenizer, database.store.tokens(rows))
    embedder = database.embedder
    embedder(texts[:64])
    begun = time.perf_counter()
    vectors = embedder(texts)
    seconds = time.perf_counter() - begun
    stored = database.store.vectors(rows)
    return {
        "chunks_per_second": round(count / seconds, 1),
        "least_cosine": round(float((vectors * stored).sum(1).min()), 5),
    }


def searching(database: Database, queries: int) -> dict[str, Any]:
    """The exact engine, then lance with more and more probes."""
    store = database.store
    vectors, spans = sampled(store, queries)
    right = exactly(store, vectors, NEAREST, spans)
    exact = best(lambda: store.search(vectors, NEAREST), queries)
    found: dict[str, Any] = {"exact_queries_per_second": exact, "queries": queries}
    if importlib.util.find_spec("lancedb") is None:
        return found | {"lance": "lancedb is not installed"}
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        spec = copy(database, Path(folder) / "lance", Engine("lance"))
        seconds = time.perf_counter() - begun
        lance = open_database(Path(folder) / "lance").store
        assert spec.table is not None

        def probing(probes: int) -> Store:
            lance.spec = spec.table.replace(probes=probes)  # pyright: ignore
            return lance

        rows = probed(probing, spec.table.lists, vectors, spans, right, exact)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    more = {"lists": spec.table.lists, "chosen_probes": spec.table.probes, "chosen_recall": spec.table.recall}
    return found | {"lance": {"copied_and_indexed_seconds": round(seconds, 1), "bytes": size, **more, "probes": rows}}


def probed(
    probing: Callable[[int], Store], lists: int, vectors: Tensor, spans: Tensor, right: Found, exact: float
) -> list[dict[str, float]]:
    """Recall and rate with more and more lists looked into."""
    rows, probes = [], 1
    while probes <= lists:
        store = probing(probes)
        reached = recall(store.search(vectors, NEAREST, spans), right)
        speed = best(partial(store.search, vectors, NEAREST), len(vectors))
        rows.append({"probes": probes, "recall": round(reached, 4), "queries_per_second": speed})
        rows[-1]["times_exact"] = round(speed / exact, 2)
        if reached > 0.995:
            break
        probes *= 2
    return rows


def accelerating(database: Database, queries: int, exact: float) -> dict[str, Any]:
    """The index of faiss over the same rows, made anew."""
    if importlib.util.find_spec("faiss") is None:
        return {"faiss": "faiss is not installed"}
    from lamina.retrieve.accelerator import accelerated

    vectors, spans = sampled(database.store, queries)
    right = exactly(database.store, vectors, NEAREST, spans)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LAMINA_CACHE"] = folder
        begun = time.perf_counter()
        store = accelerated(database.store, "benchmark", "")
        seconds = time.perf_counter() - begun
    chosen = {"lists": store.index.nlist, "chosen_probes": store.probes, "chosen_recall": round(store.recall, 4)}
    speed = best(lambda: store.search(vectors, NEAREST), queries)
    chosen |= {"chosen_queries_per_second": speed, "chosen_times_exact": round(speed / exact, 2)}

    def probing(probes: int) -> Store:
        store.probes = probes
        return store

    rows = probed(probing, store.index.nlist, vectors, spans, right, exact)
    return {"faiss": {"indexed_and_measured_seconds": round(seconds, 1), **chosen, "probes": rows}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--embed", type=int, default=2048)
    parser.add_argument("--build", type=Path, nargs="+")
    parser.add_argument("--engine", default="exact")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    document: dict[str, Any] = {}
    if given.json is not None and given.json.is_file():
        document = json.loads(given.json.read_text())
    if given.build:
        document["building"] = building(given.build, given.directory, given.engine, given.threads)
    if given.queries or given.embed:
        measure(given, document)
    print(json.dumps(document, indent=1))
    if given.json is not None:
        given.json.write_text(json.dumps(document, indent=1) + "\n")


def measure(given: argparse.Namespace, document: dict[str, Any]) -> None:
    """What is found in the database, and how fast."""
    database = open_database(given.directory)
    spec = database.spec
    if given.embed:
        _ = database.embedder  # one that is not the database's is refused before anything is measured
    document |= {
        "threads": given.threads,
        "rows": spec.rows,
        "documents": spec.documents,
        "chunk": spec.chunk,
        "width": spec.width,
        "embedder": spec.embedder.source,
        "dtype": spec.embedder.dtype,
    }
    if given.queries:
        found = searching(database, given.queries)
        document["searching"] = found | accelerating(database, given.queries, found["exact_queries_per_second"])
    if given.embed:
        document["embedding"] = embedding(database, given.embed)


if __name__ == "__main__":
    main()
