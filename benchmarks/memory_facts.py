"""How many facts a model keeps: with a product-key memory, and with a feed-forward network of the same arithmetic.

    OMP_NUM_THREADS=1 python benchmarks/memory_facts.py [--seeds 0 1] [--steps 600] [--json FILE]

A fact is a subject, a relation and a value: 128 x 128 of them, each value one of 64 drawn at random, so there is
nothing to learn but the facts themselves. A model reads the subject and the relation and says the value. Decoders of 2
layers, width 64; the second has a feed-forward network or a product-key memory of 4,096 values, of which a token reads
32. The network is as wide as makes a token cost no fewer FLOPs than with the memory. AdamW, 2e-3 (values of the memory
ten times that: a value is read rarely), 512 facts a step.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import lamina
from lamina.layers import (
    AttentionSpec,
    BatchNormSpec,
    EmbeddingSpec,
    FeedForwardSpec,
    LanguageHeadSpec,
    LayerSpec,
    ProductKeySpec,
    RMSNormSpec,
    RotarySpec,
    StackSpec,
    StepSpec,
)

SUBJECTS, RELATIONS, VALUES = 128, 128, 64
FACTS = SUBJECTS * RELATIONS
WIDTH, BATCH, RATE = 64, 512, 2e-3
MEMORY = ProductKeySpec(heads=4, keys=64, key_dim=16, chosen=8, norm=BatchNormSpec())


def spec_of(op: Any) -> lamina.ModelSpec:
    """`op` stands in the second layer where the first has a feed-forward network."""
    attention = AttentionSpec(heads=4, key_heads=4, head_dim=WIDTH // 4, rotary=RotarySpec())
    layers = tuple(
        LayerSpec(
            steps=(
                StepSpec(name="attention", op=attention, pre=RMSNormSpec()),
                StepSpec(name="feedforward", op=one, pre=RMSNormSpec()),
            )
        )
        for one in (FeedForwardSpec(hidden=WIDTH), op)
    )
    return lamina.ModelSpec(
        width=WIDTH,
        embedding=EmbeddingSpec(vocabulary=SUBJECTS + RELATIONS + VALUES),
        decoder=StackSpec(layers=layers, norm=RMSNormSpec()),
        head=LanguageHeadSpec(tied=False),
        context=2,
    )


def beside(memory: Any) -> FeedForwardSpec:
    """The narrowest feed-forward network, in steps of 8, that costs at least what the memory does."""
    most, hidden = lamina.account(spec_of(memory)).flops_per_token, 8
    while lamina.account(spec_of(FeedForwardSpec(hidden=hidden))).flops_per_token < most:
        hidden += 8
    return FeedForwardSpec(hidden=hidden)


def train(name: str, op: Any, seed: int, steps: int) -> dict[str, Any]:
    """The share of all facts that is known in the end."""
    spec = spec_of(op)
    model, generator = spec.build(seed=seed), torch.Generator().manual_seed(seed)
    fact = torch.arange(FACTS)
    ids = torch.stack([fact // RELATIONS, SUBJECTS + fact % RELATIONS], dim=1)
    value = SUBJECTS + RELATIONS + torch.randint(VALUES, (FACTS,), generator=generator)
    table = [p for path, p in model.named_parameters() if ".values." in path]
    others = [p for path, p in model.named_parameters() if ".values." not in path]
    groups = [{"params": others, "rate": RATE}, {"params": table, "rate": 10 * RATE, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW([group for group in groups if group["params"]], lr=RATE, weight_decay=0.01)
    began = time.process_time()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = group["rate"] * min(1.0, (step + 1) / 50, (steps - step) / (0.2 * steps))
        some = torch.randint(FACTS, (BATCH,), generator=generator)
        logits = model.train()(ids[some], keep_logits=1).logits
        assert logits is not None
        loss = F.cross_entropy(logits[:, 0], value[some])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.inference_mode():
        logits = model.eval()(ids, keep_logits=1).logits
    assert logits is not None
    known = float((logits[:, 0].argmax(dim=1) == value).float().mean())
    account = lamina.account(spec)
    return {
        "model": name,
        "seed": seed,
        "known": known,
        "parameters": account.parameters,
        "flops": account.flops_per_token,
        "seconds": round(time.process_time() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    for name, op in (("feed-forward", beside(MEMORY)), ("product keys", MEMORY)):
        for seed in asked.seeds:
            runs.append(train(name, op, seed, asked.steps))
            print(
                "{model:13} seed {seed}: {known:.3f} of the facts, {parameters} parameters, {flops} FLOPs a token,"
                " {seconds} s".format(**runs[-1]),
                flush=True,
            )
    if asked.json:
        figures = {"facts": FACTS, "steps": asked.steps, "chance": 1 / VALUES, "runs": runs}
        asked.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
