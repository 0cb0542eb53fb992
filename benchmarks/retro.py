"""What retrieval gains on real text: a small RETRO beside its twin, and SmolLM2 that has learned to read neighbours.

    python benchmarks/retro.py small WORK [--seeds 0,1] [--json FILE]
    python benchmarks/retro.py fitted WORK [--unrelated FILE] [--documents 16] [--json FILE]

WORK is a directory in which the commands at the heads of examples/train/retro.yaml and retrofit.yaml were run, up to
those of training. `small` trains the first and its twin with each seed in WORK/runs/NAME-SEED; `fitted` trains the
second in WORK/runs/retrofit. A run that is there is not made again. Every model then reads the held-out pages (the
large one some of them) with neighbours and without; `--unrelated` is a text that has nothing to do with the database.
A share is of a chunk: what its neighbours hold of it in one run of tokens, at most. With --json the part of the file
that is not made anew stays.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

import lamina
from lamina.data import Prepared, Writer, open_prepared
from lamina.data.prepare import PrepareSpec, prepare
from lamina.data.sources import find
from lamina.model import Model
from lamina.retrieve import Database, Neighbours, find_neighbours, open_database, open_neighbours
from lamina.retrieve.overlap import Losses, Share, by_overlap, losses, overlaps
from lamina.train.document import assign, decode, read
from lamina.train.specs import TrainSpec
from lamina.train.training import train

RECIPES = Path(__file__).resolve().parent.parent / "examples/train"


def trained(recipe: str, directory: Path, seed: int) -> Path:
    """The model of a run of this recipe, which is made if it is not there."""
    if not (directory / "model").is_dir():
        document = read(RECIPES / f"{recipe}.yaml")
        assign(document, f"seed={seed}")
        train(decode(TrainSpec, document), directory, resume="auto", show=lambda said: print(said, flush=True))
    return directory / "model"


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


def read_over(
    model: Model, text: Prepared, found: Neighbours, window: int, stride: int, beside: bool
) -> tuple[Losses, Losses | None]:
    """Without neighbours, and with them."""
    chunk = found.spec.chunk
    without = losses(model, text, chunk, window, stride)
    return without, losses(model, text, chunk, window, stride, found) if beside else None


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


def small(work: Path, seeds: list[int], window: int, stride: int) -> dict[str, Any]:
    """RETRO, RETRO without neighbours, and the twin that was trained without."""
    database, text = open_database("kernel-index"), open_prepared("kernel/validation")
    found = open_neighbours("kernel-near-validation", database, text)
    longest, chunk = overlaps(found, text), database.spec.chunk
    runs = []
    for seed in seeds:
        retro = lamina.load(trained("retro", work / f"runs/retro-{seed}", seed))
        plain = lamina.load(trained("retro-plain", work / f"runs/retro-plain-{seed}", seed))
        without, beside = read_over(retro, text, found, window, stride, True)
        alone, _ = read_over(plain, text, found, window, stride, False)
        assert beside is not None
        named = {"retro": beside, "retro_without_neighbours": without, "plain": alone}
        runs.append({"seed": seed, **compared(longest, chunk, named)})
        print(json.dumps(runs[-1], indent=1), flush=True)
    return {"small": {**about(database, text, window, stride), "runs": runs}}


def fitted(work: Path, unrelated: Path | None, documents: int, window: int, stride: int) -> dict[str, Any]:
    """SmolLM2 with neighbours and without, which is SmolLM2 itself."""
    database = open_database("kernel-smol-index")
    model = lamina.load(trained("retrofit", work / "runs/retrofit", 0), "bfloat16")
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
    without, beside = read_over(model, text, found, window, stride, True)
    assert beside is not None
    named = {"with_neighbours": beside, "smollm2": without}
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
        document = small(Path(), seeds, given.window, given.stride)
    else:
        document = fitted(Path(), unrelated, given.documents, given.window, given.stride)
    if target is not None:
        kept = json.loads(target.read_text()) if target.is_file() else {}
        target.write_text(json.dumps(kept | document, indent=1) + "\n")


if __name__ == "__main__":
    main()
