"""What lies beyond the window: does a small model with a memory find it, where the same model without one cannot?

    OMP_NUM_THREADS=1 python benchmarks/memory.py [--only NAME ...] [--task NAME] [--seeds 0 1] [--json FILE]

Texts of 4 segments of 16 tokens. In the first one stand pairs of a key and one of 16 values, the rest is filler, and at
the end the model has to say the value of a key. Attention sees its own segment, so without a memory that is chance
(0.0625). The same is asked at the end of the first segment, where attention sees the pair: no gradient goes into most
memories, so what they hold is worth finding only where something near by taught the layers to write it.

- pass-key: one pair, anywhere in the first segment. The key stands again at the end of each segment, so in training it
  is asked from near and from further and further.
- recall: 4 pairs of 8 keys. The keys alone stand again, in another order, at the end of the first segment and of the
  last: 4 answers a text. To know which values there were, but not whose, is to be right in 0.25 of them.

Decoders of 2 layers, width 64, 4 heads, half of whose features turn with the position, are trained from scratch with
AdamW (3e-3, batches of 32) on those answers alone for at most 600 steps, or until 99.5 % of the last ones in 512
held-out texts are right. Seconds are the processor's. Runs that the JSON already has are not made again.
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
    RecurrentMemorySpec,
    RMSNormSpec,
    RotarySpec,
    StackSpec,
    StepSpec,
)
from lamina.patterns import BlockWindow, Causal, Pattern

SEGMENT, SEGMENTS, VALUES, KEYS, FILLER = 16, 4, 16, 8, 8
LENGTH = SEGMENT * SEGMENTS
WIDTH, BATCH, STEPS, RATE, EVERY, ENOUGH = 64, 32, 600, 3e-3, 50, 0.995
TASKS = {"pass-key": 1, "recall": 4}
"""Pairs in a text."""

OWN = Causal() & BlockWindow(size=SEGMENT, back=1)


def compressive(by: Any) -> tuple[Pattern, CompressiveSpec]:
    """The segment before, and two older ones at 2 to 1."""
    return Causal(), CompressiveSpec(length=SEGMENT, size=SEGMENT, count=SEGMENT, rate=2, by=by)


def memorizing(**fields: Any) -> tuple[Pattern, MemorizingSpec]:
    """Three segments of keys. The scale begins where scores of length 1 tell keys apart."""
    return OWN, MemorizingSpec(length=SEGMENT, size=3 * SEGMENT, count=8, sharpness=20.0, **fields)


MODELS: dict[str, tuple[Pattern, Any]] = {
    "no memory": (OWN, None),
    "all keys": (Causal(), None),
    "recurrence, too short": (Causal(), RecurrenceSpec(length=SEGMENT, size=SEGMENT)),
    "recurrence": (Causal(), RecurrenceSpec(length=SEGMENT, size=3 * SEGMENT)),
    "compressive, mean": compressive("mean"),
    "compressive, max": compressive("max"),
    "compressive, convolution": compressive("convolution"),
    "compressive, most used": compressive("most-used"),
    "memorizing": memorizing(),
    "memorizing, clusters": memorizing(clusters=8, probes=3),
    "infini, linear": (OWN, InfiniSpec(length=SEGMENT)),
    "infini, delta": (OWN, InfiniSpec(length=SEGMENT, update="delta")),
    "memory tokens": (Causal(), RecurrentMemorySpec(tokens=4, length=SEGMENT)),
}


def decoder(
    op: Any, vocabulary: int, width: int, hidden: int, layers: int = 2, recurrence: RecurrentMemorySpec | None = None
) -> lamina.ModelSpec:
    """A pre-norm decoder that has this attention in each layer."""
    layer = LayerSpec(
        steps=(
            StepSpec(name="attention", op=op, pre=RMSNormSpec()),
            StepSpec(name="feedforward", op=FeedForwardSpec(hidden=hidden), pre=RMSNormSpec()),
        )
    )
    return lamina.ModelSpec(
        width=width,
        embedding=EmbeddingSpec(vocabulary=vocabulary),
        decoder=StackSpec(layers=(layer,) * layers, norm=RMSNormSpec(), recurrence=recurrence),
        head=LanguageHeadSpec(tied=False),
        context=LENGTH,
    )


def spec_of(pattern: Pattern, memory: Any) -> lamina.ModelSpec:
    """The model of the tasks, with the memory in both layers, or around them."""
    op: Any = AttentionSpec(heads=4, key_heads=4, head_dim=WIDTH // 4, pattern=pattern, rotary=RotarySpec(width=8))
    around = memory if isinstance(memory, RecurrentMemorySpec) else None
    if memory is not None and around is None:
        op = MemoryAttentionSpec(attention=op, memory=memory)
    return decoder(op, VALUES + KEYS + FILLER, WIDTH, 2 * WIDTH, recurrence=around)


def texts(task: str, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids (count, LENGTH), and the value that is asked for at each place, -100 where nothing is. Values are 0..15, keys
    16..23, filler from 24 on."""
    pairs = TASKS[task]

    def among(n: int, k: int) -> Tensor:
        """(count, k) different numbers below n."""
        return torch.rand(count, n, generator=generator).argsort(dim=1)[:, :k]

    ids = torch.randint(FILLER, (count, LENGTH), generator=generator) + VALUES + KEYS
    asked = torch.full_like(ids, -100)
    key = among(1 if pairs == 1 else KEYS, pairs) + VALUES
    value = torch.randint(VALUES, (count, pairs), generator=generator)
    if pairs == 1:
        place = torch.randint(SEGMENT - 2, (count, 1), generator=generator)
        ids.scatter_(1, place, key).scatter_(1, place + 1, value)
        ids[:, SEGMENT - 1 :: SEGMENT], asked[:, SEGMENT - 1 :: SEGMENT] = key, value
        return ids, asked
    ids[:, : 2 * pairs] = torch.stack([key, value], dim=2).flatten(1)
    for end in (SEGMENT, LENGTH):
        order = among(pairs, pairs)
        ids[:, end - pairs : end], asked[:, end - pairs : end] = key.gather(1, order), value.gather(1, order)
    return ids, asked


def train(name: str, task: str, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """Train one model; how often it is right in the last segment, after how many steps, in which time."""
    model = spec_of(*MODELS[name]).build(seed=seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    held, answers = texts(task, 512, torch.Generator().manual_seed(7))
    answers[:, :-SEGMENT] = -100
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    began, right, step = time.process_time(), 0.0, 0
    for step in range(1, steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, step / 50)
        ids, asked = texts(task, BATCH, generator)
        out = model.train()(ids)
        assert out.logits is not None
        loss = F.cross_entropy(out.logits.transpose(1, 2), asked) + sum(out.losses.values())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % EVERY == 0:
            with torch.inference_mode():
                logits = model.eval()(held).logits
            assert logits is not None
            there = answers >= 0
            right = float((logits.argmax(dim=2) == answers)[there].float().mean())
            if right >= ENOUGH:
                break
    seconds = time.process_time() - began
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
