"""What retrieval gains on real text: a small RETRO beside its twin, and SmolLM2 that has learned to read neighbours.

    python benchmarks/retro.py small WORK [--seeds 0,1] [--json FILE]
    python benchmarks/retro.py layers WORK [--rows 24] [--json FILE]
    python benchmarks/retro.py fitted WORK [--seeds 0,1] [--unrelated FILE] [--documents 16] [--tokens N] [--gates 0.6]
                                           [--json FILE]

WORK is a directory in which the commands at the heads of examples/train/retro.yaml and retrofit.yaml were run, up to
the first `lamina train` of the one and the last of the other. `small` trains retro-base.yaml, retro.yaml and its twin
with each seed in WORK/runs/NAME-SEED, `fitted` retrofit.yaml in WORK/runs/retrofit-SEED; a run that is there is not
made again. Every model then reads the held-out pages (the large one the beginning of some) with neighbours, with those
of other chunks, and without; `--unrelated` is a text that has nothing to do with the database. A share is of a chunk:
what its neighbours hold of it in one run of tokens, at most.

`layers` says which layers of SmolLM2 could read, before any training: copies of the attention of all of them get
neighbours, and the gradient of each gate at zero is what the loss of a token would change by.

With --json the part of the file that is not made anew stays.
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

import numpy as np
import torch

import lamina
from lamina.data import Prepared, Writer, open_prepared
from lamina.data.prepare import PrepareSpec, prepare
from lamina.data.sources import find
from lamina.document import assign, decode, read
from lamina.model import Model
from lamina.objectives import CausalLM, Retrieving
from lamina.retrieve import Database, Neighbours, find_neighbours, open_database, open_neighbours
from lamina.retrieve.neighbours import NeighboursSpec
from lamina.retrieve.overlap import Losses, Share, by_overlap, losses, overlaps
from lamina.surgery import build, retrofit
from lamina.train.roles import freeze
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
        subprocess.run([*made, "--layers", "1,2", "--chunk", "32", "--open"], check=True)
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


def layers(rows: int, length: int = 256, at_once: int = 4) -> dict[str, Any]:
    """The gradient of a gate in each layer, in nats a token that reads, with its own neighbours and with others, on
    rows from all over the training pages."""
    database, text = open_database("kernel-smol-index"), open_prepared("kernel-smol/train")
    found, chunk = open_neighbours("kernel-smol-near", database, text), database.spec.chunk
    base = lamina.load("smollm2-135m", "float32")
    assert base.spec.decoder is not None
    places = tuple(range(len(base.spec.decoder.layers)))
    model, _ = build(*retrofit(base.spec, base.state_dict(), layers=places, chunk=chunk, begin="copied"))
    gates = [gate for _, gate in freeze(model, (), ("*.retrieval.gate",))]
    gradients: dict[str, list[float]] = {}
    ways: dict[str, Any] = {"with_neighbours": found, "other_neighbours": Other(found)}
    for name in ways:
        objective = Retrieving(CausalLM(packed=True), lambda prepared, name=name: ways[name], chunk)
        examples, tokens, sums = objective.examples(text, length), 0, torch.zeros(len(gates))
        drawn = [examples.example(i * len(examples) // rows, np.random.default_rng(0)) for i in range(rows)]
        for start in range(0, rows, at_once):
            batch = objective.collate(drawn[start : start + at_once])
            loss = objective.total(model, batch).kinds["next_token"].total
            sums += torch.cat(torch.autograd.grad(loss, gates))
            tokens += int((batch.inputs["neighbours"] >= 0).any(3).any(2).sum()) * chunk
        gradients[name] = [round(one, 4) for one in (sums / tokens).tolist()]
        print(name, gradients[name], flush=True)
    return {"layers": {"rows": rows, "length": length, **gradients}}


@dataclass
class Other:
    """Neighbours of other chunks, from half the text away: what a model gains that does not look at what it reads."""

    found: Neighbours

    @property
    def spec(self) -> NeighboursSpec:
        return self.found.spec

    @property
    def starts(self) -> torch.Tensor:
        return self.found.starts

    def values(self, chunks: torch.Tensor) -> torch.Tensor:
        count = self.found.spec.chunks
        away = (chunks + count // 2) % count
        whole = (self.found.rows >= 0).all(1)  # the ends of documents have none: the last before them that has
        last = torch.where(whole, torch.arange(count), -1).cummax(0).values
        return self.found.values(last[away].clamp(min=0).where(chunks >= 0, -1))


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


def some(text: Prepared, folder: Path, documents: int, tokens: int | None) -> Prepared:
    """That many documents, from all over a text, and the first `tokens` of each."""
    column, count = text.column("text"), len(text.column("text").lengths())
    with Writer(folder, vocabulary=text.vocabulary, tokenizer=text.tokenizer_hash, end=text.end) as writer:
        for i in range(documents):
            ids = column[i * count // documents]
            writer.add({"text": (ids[:-1] if text.end is not None else ids)[:tokens]})
        writer.close()
    text.tokenizer().save(folder)
    return open_prepared(folder)


def small(seeds: list[int], window: int, stride: int) -> dict[str, Any]:
    """RETRO, RETRO without neighbours, and the twin that was trained without."""
    database, text = open_database("llvm-index"), open_prepared("llvm/validation")
    found = open_neighbours("llvm-near-validation", database, text)
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


def fitted(
    seeds: list[int],
    unrelated: Path | None,
    documents: int,
    tokens: int | None,
    gates: float,
    window: int,
    stride: int,
) -> dict[str, Any]:
    """SmolLM2 with neighbours and without, which is SmolLM2 itself. gates: what tanh of each is multiplied by."""
    database = open_database("kernel-smol-index")
    models = [
        lamina.load(trained("retrofit", Path(f"runs/retrofit-{seed}"), f"seed={seed}"), "bfloat16") for seed in seeds
    ]
    for model in models:
        narrow(model, gates)
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        texts = {"related": some(open_prepared("kernel-smol/validation"), Path(folder) / "related", documents, tokens)}
        if unrelated is not None:
            tokenizer = lamina.tokenizer("smollm2-retro")
            prepare(find([str(unrelated)]), Path(folder) / "unrelated", tokenizer, PrepareSpec())
            texts["unrelated"] = open_prepared(Path(folder) / "unrelated")
        for name, text in texts.items():
            found = find_neighbours(database, text, Path(folder) / f"{name}-near")
            parts[name] = about(database, text, window, stride)
            parts[name]["runs"] = [measured(model, text, found, window, stride) for model in models]
            print(json.dumps(parts[name], indent=1), flush=True)
    return {"fitted" if gates == 1.0 else f"fitted_gates_{gates:g}": parts}


@torch.no_grad()
def narrow(model: Model, factor: float) -> None:
    """Multiply what the gates let through."""
    for name, gate in model.named_parameters():
        if factor != 1.0 and name.endswith("retrieval.gate"):
            gate.copy_((gate.float().tanh() * factor).atanh())


def measured(model: Model, text: Prepared, found: Neighbours, window: int, stride: int) -> dict[str, Any]:
    without, beside, other = read_over(model, text, found, window, stride)
    named = {"with_neighbours": beside, "other_neighbours": other, "smollm2": without}
    change = math.exp(float((beside.nats - without.nats).sum() / without.tokens.sum())) - 1
    return {"perplexity_changes_by": round(change, 4), **compared(overlaps(found, text), found.spec.chunk, named)}


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
    parser.add_argument("part", choices=["small", "layers", "fitted"])
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--unrelated", type=Path)
    parser.add_argument("--documents", type=int, default=16, help="held-out pages that the large model reads")
    parser.add_argument("--tokens", type=int, help="of each of these pages, from its beginning [default: all]")
    parser.add_argument("--gates", type=float, default=1.0, help="what tanh of each gate is multiplied by")
    parser.add_argument("--rows", type=int, default=24, help="of training pages that `layers` reads")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--stride", type=int, default=192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    unrelated = None if given.unrelated is None else given.unrelated.resolve()
    target = None if given.json is None else given.json.resolve()
    os.chdir(given.work)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    if given.part == "small":
        document = small(seeds, given.window, given.stride)
    elif given.part == "layers":
        document = layers(given.rows)
    else:
        document = fitted(seeds, unrelated, given.documents, given.tokens, given.gates, given.window, given.stride)
    if target is not None:
        kept = json.loads(target.read_text()) if target.is_file() else {}
        target.write_text(json.dumps(kept | document, indent=1) + "\n")


if __name__ == "__main__":
    main()
