"""What a larger table costs a product-key memory: a token's share with 64 thousand and with a million values.

    python benchmarks/memory_values.py [--rounds 9] [--threads 1] [--whole] [--json FILE]

One layer of width 1,024 (4 heads, 32 values each, keys of 256 features) with 256^2 and with 1,024^2 values, by itself
("plain": Lample et al.; "gated": Memory+) and in a layer of a model, beside its attention and its feed-forward network:
forward; and, of width 256, forward, backward and a step of the optimiser, with gradients of the rows that were read and
(--whole) with whole ones. Sizes take turns within a round, and a ratio is the median of the rounds' own ratios. Times
are those of the processor, which other programs disturb less than those of a clock. Weights lie in large pages, as
those of a compiled model do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WIDTH, TOKENS = 1024, 256
COUNTS = {"64 thousand": 256, "a million": 1024}


def memory(keys: int, kind: str) -> Any:
    from lamina.layers import ProductKeySpec

    return ProductKeySpec(heads=4, keys=keys, key_dim=256, gated=kind != "plain")


def layer(keys: int, kind: str, width: int = WIDTH) -> tuple[torch.nn.Module, torch.Tensor, Any]:
    """A memory by itself, or in a layer of a model, with what it reads."""
    from lamina.generation.pages import settle_in_large_pages
    from lamina.layers import (
        AttentionSpec,
        Call,
        FeedForwardSpec,
        LayerSpec,
        RMSNormSpec,
        RotarySpec,
        StepSpec,
    )
    from lamina.tokens import plain

    torch.manual_seed(0)
    spec: Any = memory(keys, kind)
    if kind == "in a layer":
        attention = AttentionSpec(heads=16, key_heads=16, head_dim=64, rotary=RotarySpec())
        parts = {"attention": attention, "feedforward": FeedForwardSpec(hidden=2816), "memory": spec}
        steps = (StepSpec(name=name, op=part, pre=RMSNormSpec()) for name, part in parts.items())
        spec = LayerSpec(steps=tuple(steps))
    with torch.device("meta"):
        module = spec.build(width)
    module.to_empty(device="cpu")
    for weight in module.parameters():
        if weight.numel() > 2**23:
            torch.nn.init.constant_(weight, 0.02)  # drawing a table takes minutes, and its values do not matter here
        else:
            torch.nn.init.normal_(weight, std=0.02)
    settle_in_large_pages(module)
    return module, torch.randn(1, TOKENS, width), Call(tokens=plain(1, TOKENS))


def forward(keys: int, kind: str) -> Callable[[], Any]:
    module, x, call = layer(keys, kind)

    def run() -> None:
        with torch.inference_mode():
            module.eval()(x, call)

    return run


def step(keys: int, sparse: bool) -> Callable[[], Any]:
    """Forward, backward and optimiser, of a plain memory."""
    module, x, call = layer(keys, "plain", 256)
    module.values.sparse = sparse  # pyright: ignore
    tables = list(module.values.parameters())  # pyright: ignore
    others = [p for p in module.parameters() if all(p is not table for table in tables)]
    table = torch.optim.SparseAdam(tables) if sparse else torch.optim.AdamW(tables, fused=True)
    optimisers = (torch.optim.AdamW(others, fused=True), table)

    def run() -> None:
        module(x, call).square().mean().backward()
        for one in optimisers:
            one.step()
            one.zero_grad()

    return run


def timed(run: Callable[[], Any]) -> float:
    begin = time.process_time()
    run()
    return time.process_time() - begin


def rounds(makes: dict[str, Callable[[], Callable[[], Any]]], count: int) -> dict[str, list[float]]:
    """Microseconds a token of each run in each round; they take turns, each first as often as the others."""
    runs = {name: make() for name, make in makes.items()}
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(count):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(timed(runs[name]) / TOKENS * 1e6)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--whole", action="store_true", help="also steps with whole gradients: 8 GB of memory")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ways: dict[str, Callable[[int], Callable[[], Any]]] = {
        f"forward, {kind}": lambda keys, kind=kind: forward(keys, kind) for kind in ("plain", "gated", "in a layer")
    }
    ways["a step, rows that were read"] = lambda keys: step(keys, True)
    if options.whole:
        ways["a step, whole gradients"] = lambda keys: step(keys, False)
    figures: dict[str, Any] = {"threads": options.threads, "rounds": options.rounds, "microseconds": {}, "ratios": {}}
    for name, way in ways.items():
        found = rounds({count: lambda keys=keys, way=way: way(keys) for count, keys in COUNTS.items()}, options.rounds)
        small, large = found.values()
        figures["microseconds"][name] = {
            count: {"median": statistics.median(times), "best": min(times), "worst": max(times), "rounds": times}
            for count, times in found.items()
        }
        figures["ratios"][name] = statistics.median(b / a for a, b in zip(small, large, strict=True))
        medians = "".join(f"{statistics.median(times):10.1f}" for times in found.values())
        print(f"{name:30}{medians} us a token{figures['ratios'][name]:8.2f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
