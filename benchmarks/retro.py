"""What retrieval gains on real text: a small RETRO beside its twin, and SmolLM2 that has learned to read neighbours.

    python benchmarks/retro.py small WORK [--seeds 0,1] [--json FILE]
    python benchmarks/retro.py fitted WORK [--unrelated FILE] [--documents 16] [--json FILE]

WORK is a directory in which the commands at the heads of examples/train/retro.yaml and retrofit.yaml were run, up to
the first `lamina train` of the one and the last of the other. `small` trains retro-base.yaml, retro.yaml and its twin
with each seed in WORK/runs/NAME-SEED, `fitted` retrofit.yaml in WORK/runs/retrofit. A run that is there is not made
again. Every model then reads the held-out pages (the large one some of them) with neighbours, with those of other
chunks, and without; `--unrelated` is a text that has nothing to do with the database. A share is of a chunk: what its
neighbours hold of it in one run of tokens, at most. With --json the part of the file that is not made anew stays.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lamina
from lamina.data import Prepared, Writer, open_prepared
from lamina.data.prepare import PrepareSpec, prepare
from lamina.data.sources import find
from lamina.document import assign, decode, read
from lamina.model import Model
from lamina.retrieve import Database, Neighbours, find_neighbours, open_database, open_neighbours
from lamina.retrieve.neighbours import NeighboursSpec
from lamina.retrieve.overlap import Losses, Share, by_overlap, losses, overlaps
from lamina.train.specs import TrainSpec
from lamina.train.training import train

RECIPES = Path(__file__).resolve().parent.parent / "examples/train"


def trained(recipe: str, directory: Path, *assignments: str) -> Path:
    """The model of a run of this recipe, which is made if it is not there."""
    if not (directory / "model").is_dir():
        document = read(RECIPES / f"{recipe}.yaml")
        for assignment in assignments:
            assign(document, assignment)
        train(decode(TrainSpec, document), directory, resume="auto", show=lambda said: print(said, flush=True))
    return directory / "model"


def twins(seed: int) -> tuple[Model, Model]:
    """RETRO and its twin, which go on from one model."""
    start = Path(f"runs/retro-start-{seed}")
    if not start.is_dir():
        base = trained("retro-base", Path(f"runs/retro-base-{seed}"), f"seed={seed}")
        made = [sys.executable, str(RECIPES / "retrofit.py"), str(base), str(start)]
        subprocess.run([*made, "--layers", "1,3", "--chunk", "32"], check=True)
    given = f"model.source={start}", f"seed={10 + seed}"
    one, other = (trained(name, Path(f"runs/{name}-{seed}"), *given) for name in ("retro", "retro-plain"))
    return lamina.load(one), lamina.load(other)


def figures(share: Share | None, whole: Losses) -> dict[str, Any]:
    """Nats a token, bits a byte and perplexity; of everything, or of the chunks of a share."""
    if share is None:
        tokens, nats, size = int(whole.tokens.sum()), float(whole.nats.sum()), int(whole.bytes.sum())
    else:
        tokens, nats, size = share.tokens, share.nats, share.bytes
    return {
        "nats_per_token": round(nats / tokens, 4),
        "bits_per_byte": round(nats / math.log(2) / size, 4),
        "perplexity": round(math.exp(nats / tokens), 3),
    }


@dataclass
class Other:
    """Neighbours of other chunks, from half the text away: what a model gains that does not look at what it reads."""

    found: Neighbours

    @property
    def spec(self) -> NeighboursSpec:
        return self.found.spec

    def values(self, chunks: torch.Tensor) -> torch.Tensor:
        count = self.found.spec.chunks
        away = (chunks + count // 2) % count
        whole = (self.found.rows >= 0).all(1)  # the ends of documents have none: the last before them that has
        last = torch.where(whole, torch.arange(count), -1).cummax(0).values
        return self.found.values(last[away].clamp(min=0))


def read_over(
    model: Model, text: Prepared, found: Neighbours, window: int, stride: int
) -> tuple[Losses, Losses, Losses]:
    """Without neighbours, with them, and with those of other chunks."""
    ways: tuple[Any, ...] = (None, found, Other(found))
    without, beside, other = (losses(model, text, found.spec.chunk, window, stride, way) for way in ways)
    return without, beside, other


def compared(longest: torch.Tensor, chunk: int, each: dict[str, Losses]) -> dict[str, Any]:
    """By name: the losses of everything, and by overlap."""
    parts = {name: by_overlap(longest, one, chunk) for name, one in each.items()}
    first = next(iter(parts.values()))
    rows = [
        {"share": row.share, "chunks": row.chunks, "tokens": row.tokens}
        | {name: figures(part[i], each[name]) for name, part in parts.items()}
        for i, row in enumerate(first)
    ]
    return {**{name: figures(None, one) for name, one in each.items()}, "overlap": rows}


def some(text: Prepared, folder: Path, documents: int) -> Prepared:
    """That many documents, from all over a text."""
    column, count = text.column("text"), len(text.column("text").lengths())
    with Writer(folder, vocabulary=text.vocabulary, tokenizer=text.tokenizer_hash, end=text.end) as writer:
        for i in range(documents):
            ids = column[i * count // documents]
            writer.add({"text": ids[:-1] if text.end is not None else ids})
        writer.close()
    text.tokenizer().save(folder)
    return open_prepared(folder)


def small(seeds: list[int], window: int, stride: int) -> dict[str, Any]:
    """RETRO, RETRO without neighbours, and the twin that was trained without."""
    database, text = open_database("kernel-index"), open_prepared("kernel/validation")
    found = open_neighbours("kernel-near-validation", database, text)
    longest, chunk = overlaps(found, text), database.spec.chunk
    runs = []
    for seed in seeds:
        retro, plain = twins(seed)
        without, beside, other = read_over(retro, text, found, window, stride)
        named = {"retro": beside, "retro_other_neighbours": other, "retro_without_neighbours": without}
        named["plain"] = losses(plain, text, chunk, window, stride)
        runs.append({"seed": seed, **compared(longest, chunk, named)})
        print(json.dumps(runs[-1], indent=1), flush=True)
    return {"small": {**about(database, text, window, stride), "runs": runs}}


def fitted(unrelated: Path | None, documents: int, window: int, stride: int) -> dict[str, Any]:
    """SmolLM2 with neighbours and without, which is SmolLM2 itself."""
    database = open_database("kernel-smol-index")
    model = lamina.load(trained("retrofit", Path("runs/retrofit")), "bfloat16")
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        texts = {"related": some(open_prepared("kernel-smol/validation"), Path(folder) / "related", documents)}
        if unrelated is not None:
            tokenizer = lamina.tokenizer("smollm2-retro")
            prepare(find([str(unrelated)]), Path(folder) / "unrelated", tokenizer, PrepareSpec())
            texts["unrelated"] = open_prepared(Path(folder) / "unrelated")
        for name, text in texts.items():
            found = find_neighbours(database, text, Path(folder) / f"{name}-near")
            parts[name] = measured(model, database, text, found, window, stride)
            print(json.dumps(parts[name], indent=1), flush=True)
    return {"fitted": parts}


def measured(
    model: Model, database: Database, text: Prepared, found: Neighbours, window: int, stride: int
) -> dict[str, Any]:
    without, beside, other = read_over(model, text, found, window, stride)
    named = {"with_neighbours": beside, "other_neighbours": other, "smollm2": without}
    change = math.exp(float((beside.nats - without.nats).sum() / without.tokens.sum())) - 1
    rows = compared(overlaps(found, text), database.spec.chunk, named)
    return {**about(database, text, window, stride), "perplexity_changes_by": round(change, 4), **rows}


def about(database: Database, text: Prepared, window: int, stride: int) -> dict[str, Any]:
    return {
        "documents": database.spec.documents,
        "database_rows": database.spec.rows,
        "chunk": database.spec.chunk,
        "held_out_tokens": text.tokens,
        "window": window,
        "stride": stride,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["small", "fitted"])
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--unrelated", type=Path)
    parser.add_argument("--documents", type=int, default=16, help="held-out pages that the large model reads")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--stride", type=int, default=192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    unrelated = None if given.unrelated is None else given.unrelated.resolve()
    target = None if given.json is None else given.json.resolve()
    os.chdir(given.work)
    if given.part == "small":
        seeds = [int(seed) for seed in given.seeds.split(",")]
        document = small(seeds, given.window, given.stride)
    else:
        document = fitted(unrelated, given.documents, given.window, given.stride)
    if target is not None:
        kept = json.loads(target.read_text()) if target.is_file() else {}
        target.write_text(json.dumps(kept | document, indent=1) + "\n")


if __name__ == "__main__":
    main()
