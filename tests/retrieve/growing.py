"""How much memory a build holds after each batch, as a process of its own: python growing.py ROOT DTYPE TEXTS,
where TEXTS are embedded at once.

The embedder is as wide as real ones, with one layer of random weights, and chunks differ in length as they do in real
text: tensors of ever other sizes come and go. Prints the MB after the second batch, and the most after a later one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from lamina.retrieve import Embedder, Progress, build
from tests import tiny
from tests.retrieve import made

BATCHES, BATCH = 10, 96
CHUNK = 900  # bytes: each text is one
WIDE = tiny.BERT | {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_attention_heads": 12,
    "num_hidden_layers": 1,
    "max_position_embeddings": 256,
}


def held() -> int:
    """MB that are this process's own."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) >> 10


def main(root: Path, dtype: str, at_once: int) -> None:
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    sizes = random.integers(20, 200, BATCHES * BATCH)
    texts = [" ".join(random.choice(["a", "the", "on", "cat", "."], size)) for size in sizes]
    text = made.prepared(root / "text", made.rows(root / "t.jsonl", texts))
    tiny.checkpoint(root / "bert", WIDE)
    seen: list[int] = []

    def note(progress: Progress) -> None:
        if progress.what == "embedding":
            seen.append(held())

    embedder = Embedder(root / "bert", dtype, batch=at_once)
    build(text, root / "index", embedder, chunk=CHUNK, batch=BATCH, report=note)
    assert len(seen) == BATCHES + 1
    print(seen[2], max(seen[3:]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
