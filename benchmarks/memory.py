"""What lies beyond the window: does a small model with a memory find it, where the same model without one cannot?

    OMP_NUM_THREADS=1 python benchmarks/memory.py [--only NAME ...] [--task NAME] [--seeds 0 1] [--json FILE]

Texts of 4 segments of 16 tokens. Somewhere in the first one stand pairs of a key and its value, everything else is
filler; the last token is one of the keys, and the model has to say its value, 1 of 16. Attention sees its own segment,
so without a memory that is chance (0.0625). "pass-key" has one pair and one key. "recall" has 3 pairs of 8 keys, and in
training asks for one of them at the end of the first segment too: a memory that passes no gradient back is filled by
layers that have to learn what to store from what is read near by.

Decoders of 2 layers, width 64, 4 heads with rotary positions are trained from scratch with AdamW (3e-3, batches of 32)
on those tokens alone for at most 400 steps (600 in the run without a memory), or until 99.5 % of 512 held-out texts are
answered right at the end. Runs that the JSON already has are not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lamina
from lamina.layers import (
    AttentionSpec,
    CompressiveSpec,
    EmbeddingSpec,
    FeedForwardSpec,
    InfiniSpec,
    LanguageHeadSpec,
    LayerSpec,
    MemorizingSpec,
    MemoryAttentionSpec,
    RecurrenceSpec,
    RMSNormSpec,
    RotarySpec,
    StackSpec,
    StepSpec,
)
from lamina.patterns import BlockWindow, Causal, Pattern

SEGMENT, SEGMENTS, VALUES, KEYS, FILLER = 16, 4, 16, 8, 8
LENGTH = SEGMENT * SEGMENTS
WIDTH, BATCH, STEPS, RATE, EVERY, ENOUGH = 64, 32, 400, 3e-3, 50, 0.995
TASKS = {"pass-key": (1, 1), "recall": (3, KEYS)}
"""Pairs in a text, and keys that there are."""

OWN = Causal() & BlockWindow(size=SEGMENT, back=1)
MODELS: dict[str, tuple[Pattern, Any]] = {
    "no memory": (OWN, None),
    "all keys": (Causal(), None),
    "recurrence, too short": (Causal(), RecurrenceSpec(length=SEGMENT, size=SEGMENT)),
    "recurrence": (Causal(), RecurrenceSpec(length=SEGMENT, size=3 * SEGMENT)),
    "compressive, mean": (Causal(), CompressiveSpec(length=SEGMENT, size=SEGMENT, count=16, rate=2, by="mean")),
    "compressive, max": (Causal(), CompressiveSpec(length=SEGMENT, size=SEGMENT, count=16, rate=2, by="max")),
    "compressive, convolution": (Causal(), CompressiveSpec(length=SEGMENT, size=SEGMENT, count=16, rate=2)),
    "memorizing, nearest 4": (OWN, MemorizingSpec(length=SEGMENT, size=3 * SEGMENT, count=4, sharpness=10.0)),
    "memorizing, nearest 16": (OWN, MemorizingSpec(length=SEGMENT, size=3 * SEGMENT, count=16, sharpness=10.0)),
    "memorizing, sharper": (OWN, MemorizingSpec(length=SEGMENT, size=3 * SEGMENT, count=8, sharpness=30.0)),
    "memorizing, clusters": (
        OWN,
        MemorizingSpec(length=SEGMENT, size=3 * SEGMENT, count=16, sharpness=10.0, clusters=8, probes=3),
    ),
    "infini, linear": (OWN, InfiniSpec(length=SEGMENT)),
    "infini, delta": (OWN, InfiniSpec(length=SEGMENT, update="delta")),
}


def spec_of(pattern: Pattern, memory: Any) -> lamina.ModelSpec:
    """A decoder of 2 layers, each with the memory."""
    op: Any = AttentionSpec(heads=4, key_heads=4, head_dim=WIDTH // 4, pattern=pattern, rotary=RotarySpec())
    if memory is not None:
        op = MemoryAttentionSpec(attention=op, memory=memory)
    layer = LayerSpec(
        steps=(
            StepSpec(name="attention", op=op, pre=RMSNormSpec()),
            StepSpec(name="feedforward", op=FeedForwardSpec(hidden=2 * WIDTH), pre=RMSNormSpec()),
        )
    )
    return lamina.ModelSpec(
        width=WIDTH,
        embedding=EmbeddingSpec(vocabulary=VALUES + KEYS + FILLER),
        decoder=StackSpec(layers=(layer,) * 2, norm=RMSNormSpec()),
        head=LanguageHeadSpec(tied=False),
        context=LENGTH,
    )


def texts(task: str, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (count, LENGTH), the values that follow the end of each, and those that follow the first segment, -100 where
    nothing is asked there. Values are 0..15, keys 16..23, filler from 24 on."""
    pairs, keys = TASKS[task]

    def among(n: int, k: int) -> Tensor:
        """(count, k) different numbers below n."""
        return torch.rand(count, n, generator=generator).argsort(dim=1)[:, :k]

    ids = torch.randint(FILLER, (count, LENGTH), generator=generator) + VALUES + KEYS
    key = among(keys, pairs) + VALUES
    value = torch.randint(VALUES, (count, pairs), generator=generator)
    place = 2 * among(SEGMENT // 2 - 1, pairs) + torch.randint(2, (count, 1), generator=generator)
    ids.scatter_(1, place, key).scatter_(1, place + 1, value)
    ids[:, -1] = key[:, 0]
    near = torch.full((count,), -100)
    if pairs > 1:
        ids[:, SEGMENT - 1], near = key[:, 1], value[:, 1]
    return ids, value[:, 0], near


def train(name: str, task: str, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """Train one model; how often it is right, after how many steps, in which time."""
    model = spec_of(*MODELS[name]).build(seed=seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    held, answers, _ = texts(task, 512, torch.Generator().manual_seed(7))
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    began, right, step = time.perf_counter(), 0.0, 0
    for step in range(1, steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, step / 50)
        ids, value, near = texts(task, BATCH, generator)
        out = model.train()(ids)
        assert out.logits is not None
        asked = out.logits[:, [SEGMENT - 1, LENGTH - 1]].transpose(1, 2)  # (BATCH, vocabulary, 2)
        loss = F.cross_entropy(asked, torch.stack([near, value], dim=1)) + sum(out.losses.values())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % EVERY == 0:
            with torch.inference_mode():
                logits = model.eval()(held, keep_logits=1).logits
            assert logits is not None
            right = float((logits[:, 0].argmax(dim=1) == answers).float().mean())
            if right >= ENOUGH:
                break
    seconds = time.perf_counter() - began
    return {"model": name, "task": task, "seed": seed, "right": right, "steps": step, "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--task", nargs="*", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--json", type=Path, help="file to write the figures to, and to go on with")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    runs = json.loads(asked.json.read_text())["runs"] if asked.json and asked.json.exists() else []
    for task in asked.task:
        for name in asked.only:
            for seed in asked.seeds:
                if any((run["model"], run["task"], run["seed"]) == (name, task, seed) for run in runs):
                    continue
                runs.append(train(name, task, seed))
                print(
                    "{task:9} {model:26} seed {seed}: {right:.3f} at step {steps}, {seconds} s".format(**runs[-1]),
                    flush=True,
                )
                if asked.json:
                    asked.json.write_text(json.dumps({"chance": 1 / VALUES, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
