"""Tokens per second that encoder-decoders write, beside transformers in one run.

    python benchmarks/encoder_decoder.py [--rounds 5] [--threads 2] [--dtype float32] [--json FILE]

T5-small and BART-base as published, with random weights: both libraries read the same directory, and write the same
number of tokens for the same sources, which are padded where there are several. Each library is asked in turns, one
right after the other, and a ratio is the median of the rounds' own ratios: the memory of a shared machine is now faster
and now slower for seconds at a time. `decoding` is the time of the new tokens after the first; `whole` is the call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MODELS = ("t5/small", "bart/base")
SOURCE = 96  # tokens of the longest source
NEW = 48
SHAPES = ((1, 1), (1, 4), (8, 1), (8, 4))  # texts, beams

Write = Callable[[int], torch.Tensor]


def sources(texts: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(texts, SOURCE) ids, the shorter ones padded on the right, and their mask."""
    generator = torch.Generator().manual_seed(texts)
    ids = torch.randint(100, 30_000, (texts, SOURCE), generator=generator)
    if texts == 1:
        return ids, None
    lengths = torch.linspace(SOURCE // 2, SOURCE, texts).long()
    mask = (torch.arange(SOURCE) < lengths[:, None]).long()
    return ids.masked_fill(mask == 0, 0), mask


def writers(ours: Any, theirs: Any, texts: int, beams: int) -> dict[str, Write]:
    """What each library writes, as a function of the number of new tokens."""
    import lamina

    ids, mask = sources(texts)
    seen = torch.ones_like(ids) if mask is None else mask

    def lamina_writes(new: int) -> torch.Tensor:
        return lamina.generate(ours, ids, mask, max_new_tokens=new, min_new_tokens=new, beams=beams)

    def transformers_writes(new: int) -> torch.Tensor:
        options = {"max_new_tokens": new, "min_new_tokens": new, "num_beams": beams, "do_sample": False}
        return theirs.generate(ids, attention_mask=seen, **options)

    return {"transformers": transformers_writes, "lamina": lamina_writes}


def seconds(write: Write, new: int) -> float:
    begin = time.perf_counter()
    write(new)
    return time.perf_counter() - begin


def measure(ours: Any, theirs: Any, rounds: int) -> dict[str, Any]:
    """Seconds and ratios for each number of texts and beams."""
    found: dict[str, Any] = {}
    for texts, beams in SHAPES:
        both = writers(ours, theirs, texts, beams)
        same = {name: write(NEW)[:, : NEW + 1] for name, write in both.items()}  # warm too
        decoding: dict[str, list[float]] = {name: [] for name in both}
        whole: dict[str, list[float]] = {name: [] for name in both}
        for _ in range(rounds):
            for name, write in both.items():
                first, all_of_them = seconds(write, 1), seconds(write, NEW)
                decoding[name].append(texts * (NEW - 1) / (all_of_them - first))
                whole[name].append(texts * NEW / all_of_them)
        row: dict[str, Any] = {"equal": bool(torch.equal(same["lamina"], same["transformers"]))}
        for what, runs in (("decoding", decoding), ("whole", whole)):
            row[what] = {name: round(statistics.median(run), 1) for name, run in runs.items()}
            pairs = zip(runs["lamina"], runs["transformers"], strict=True)
            row[what]["ratio"] = round(statistics.median(mine / other for mine, other in pairs), 2)
        found[f"{texts} texts, {beams} beams"] = row
        said = ", ".join(f"{name} {value:.1f}" for name, value in row["decoding"].items() if name != "ratio")
        print(
            f"  {texts} texts, {beams} beams: {said} tokens/s, ratio {row['decoding']['ratio']:.2f}"
            f" (whole call {row['whole']['ratio']:.2f}), {'the same' if row['equal'] else 'OTHER'} ids",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    import transformers

    import lamina

    transformers.logging.set_verbosity_error()
    figures: dict[str, Any] = {name: getattr(options, name) for name in ("threads", "rounds", "dtype")}
    for name in MODELS:
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            lamina.save(lamina.spec(name).build(seed=0), folder)
            ours = lamina.load(folder, options.dtype)
            auto = transformers.AutoModelForSeq2SeqLM
            theirs = auto.from_pretrained(folder, dtype=getattr(torch, options.dtype)).eval()
            figures[name] = measure(ours, theirs, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
