"""What memory tokens carry: a value in the first of three segments, asked for at the end of the last.

    python benchmarks/memory_tokens.py [--seeds 2] [--steps 250] [--processes 1] [--json FILE]

48 tokens: fillers, and in the first 16 somewhere a mark and one of 16 values; the last token asks for the value. Two
layers of width 64 with rotary positions read segments of 16. Without a memory each segment is a text of its own, so the
answer is a guess (1 in 16). With memory vectors a value has to be written twice and read once; gradients go through
both ends, or through none. One thread, a minute or two a run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

SEGMENT, SEGMENTS, VALUES, FILLERS = 16, 3, 16, 32
MARK, QUERY = VALUES + FILLERS, VALUES + FILLERS + 1
WAYS: dict[str, dict[str, Any]] = {
    "no memory": {"tokens": None},
    "4 vectors": {"tokens": 4},
    "4 vectors, gradients within a segment": {"tokens": 4, "gradients": 0},
}


def model(tokens: int | None, gradients: int | None = None) -> Any:
    import lamina
    from lamina.layers import (
        AttentionSpec,
        EmbeddingSpec,
        FeedForwardSpec,
        LanguageHeadSpec,
        LayerSpec,
        RecurrentMemorySpec,
        RMSNormSpec,
        RotarySpec,
        StackSpec,
        StepSpec,
    )

    attention = AttentionSpec(heads=4, key_heads=4, head_dim=16, rotary=RotarySpec())
    steps = (
        StepSpec(name="attention", op=attention, pre=RMSNormSpec()),
        StepSpec(name="feedforward", op=FeedForwardSpec(hidden=128), pre=RMSNormSpec()),
    )
    memory = None if tokens is None else RecurrentMemorySpec(tokens=tokens, length=SEGMENT, gradients=gradients)
    stack = StackSpec(layers=(LayerSpec(steps=steps),) * 2, norm=RMSNormSpec(), recurrence=memory)
    return lamina.ModelSpec(
        width=64, embedding=EmbeddingSpec(vocabulary=QUERY + 1), decoder=stack, head=LanguageHeadSpec()
    )


def batch(rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts (rows, 48), and the value that each asks for."""
    ids = torch.randint(VALUES, VALUES + FILLERS, (rows, SEGMENT * SEGMENTS), generator=generator)
    value = torch.randint(VALUES, (rows,), generator=generator)
    at = torch.randint(SEGMENT - 1, (rows,), generator=generator)
    row = torch.arange(rows)
    ids[row, at], ids[row, at + 1], ids[:, -1] = MARK, value, QUERY
    return ids, value


def run(way: dict[str, Any], steps: int, seed: int) -> dict[str, Any]:
    """Train on new texts, and answer 1,000 others."""
    generator = torch.Generator().manual_seed(seed)
    trained = model(**way).build(seed=seed)
    optimiser = torch.optim.AdamW(trained.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
    apart = torch.arange(SEGMENT * SEGMENTS)[None] // SEGMENT if way["tokens"] is None else None
    clock, reached = time.perf_counter(), None

    def answers(ids: torch.Tensor) -> torch.Tensor:
        return trained(ids, document_ids=apart, keep_logits=1).logits[:, 0, :VALUES]

    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min((step + 1) / 50, 1.0)
        ids, value = batch(32, generator)
        loss = F.cross_entropy(answers(ids), value)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if reached is None and float(loss.detach()) < 0.05:
            reached = step + 1
    ids, value = batch(1000, torch.Generator().manual_seed(10_000 + seed))
    with torch.inference_mode():
        right = float((answers(ids).argmax(-1) == value).float().mean())
        cache, parts, at = trained.new_cache(batch=1000), [], 0
        for size in (7, 16, 20, 5):  # the same from a cache, in other pieces than the segments
            documents = None if apart is None else apart[:, at : at + size]
            parts.append(trained(ids[:, at : (at := at + size)], document_ids=documents, cache=cache).logits)
        cached = float((parts[-1][:, -1, :VALUES].argmax(-1) == value).float().mean())
    return {"accuracy": right, "cached": cached, "below 0.05 at": reached, "seconds": time.perf_counter() - clock}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures: dict[str, Any] = {"steps": options.steps, "chance": 1 / VALUES, "ways": {}}
    with ProcessPoolExecutor(options.processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        runs = {
            name: [pool.submit(run, way, options.steps, seed) for seed in range(options.seeds)]
            for name, way in WAYS.items()
        }
        for name, found in runs.items():
            figures["ways"][name] = [one.result() for one in found]
    for name in WAYS:
        for one in figures["ways"][name]:
            print(
                f"{name:40}{one['accuracy']:8.3f}{one['cached']:8.3f} {one['below 0.05 at']} {one['seconds']:.0f} s",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
