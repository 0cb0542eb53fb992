"""Mixtures of experts beside transformers in one run: Switch, Mixtral, and what more experts cost.

    python benchmarks/experts.py [--rounds 7] [--threads 2] [--json FILE]

Two models of width 512 and 4 layers (Switch: 4 and 4) with 8 experts and no head, on 4 x 256 tokens, with the same
weights in both libraries: Switch as base-8 has it (every second layer, ReLU of 4 widths, top-1), in transformers a loop
over experts; Mixtral (every layer, SwiGLU of 3.5 widths, top-2), in transformers torch's grouped product. Results agree
before anything is timed. Libraries take turns within a round, and a ratio is the median of the rounds' own ratios. Then
one layer of top-2 with 8 to 64 experts on 4,096 tokens: the arithmetic is the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

BATCH, LENGTH, WIDTH, LAYERS, EXPERTS = 4, 256, 512, 4, 8
COUNTS = (8, 16, 32, 64)
TOKENS = 4096

Passes = dict[str, dict[str, Callable[[], Any]]]


def switch() -> tuple[Any, dict[str, Any]]:
    from transformers import SwitchTransformersConfig, SwitchTransformersModel

    half = {"num_sparse_encoder_layers": LAYERS // 2, "num_sparse_decoder_layers": LAYERS // 2}
    config = SwitchTransformersConfig(
        d_model=WIDTH,
        d_ff=4 * WIDTH,
        num_heads=WIDTH // 64,
        num_layers=LAYERS,
        num_decoder_layers=LAYERS,
        num_experts=EXPERTS,
        expert_capacity=10**6,  # nothing is dropped: both do the same work
        dropout_rate=0.0,
        router_jitter_noise=0.0,
        **half,
    )
    ids = torch.randint(config.vocab_size, (2, BATCH, LENGTH))
    return SwitchTransformersModel(config), {"input_ids": ids[0], "decoder_input_ids": ids[1]}


def mixtral() -> tuple[Any, dict[str, Any]]:
    from transformers import MixtralConfig, MixtralModel

    config = MixtralConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 7 // 2,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 64,
        num_key_value_heads=WIDTH // 256,
        num_local_experts=EXPERTS,
    )
    model = MixtralModel(config)
    model.set_experts_implementation("grouped_mm")
    return model, {"input_ids": torch.randint(config.vocab_size, (BATCH, LENGTH))}


MODELS = {"switch": switch, "mixtral": mixtral}


def passes(name: str) -> Passes:
    """Forward, and forward with backward, of both libraries on the same weights."""
    import lamina

    torch.manual_seed(0)
    theirs, arguments = MODELS[name]()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = lamina.load(folder)
    models = {"transformers": (theirs, {"use_cache": False}), "lamina": (ours, {})}
    with torch.no_grad():
        one, other = (states(model.eval()(**arguments, **more)) for model, more in models.values())
        apart = (one - other).abs().amax(-1) > 1e-4 * one.abs().max()
        assert float(apart.float().mean()) < 0.01, "the libraries disagree"  # but where two experts are as good

    def forward(model: Any, more: dict[str, Any]) -> None:
        with torch.no_grad():
            model.eval()(**arguments, **more)

    def both(model: Any, more: dict[str, Any]) -> None:
        out = model.train()(**arguments, **more)
        states(out).square().mean().backward()
        model.zero_grad()

    return {
        what: {
            library: lambda run=run, model=model, more=more: run(model, more)
            for library, (model, more) in models.items()
        }
        for what, run in (("forward", forward), ("forward and backward", both))
    }


def states(out: Any) -> torch.Tensor:
    """The last hidden states of either library."""
    return out.last_hidden_state if hasattr(out, "last_hidden_state") else out.hidden


def layer(experts: int) -> Callable[[], Any]:
    """The forward of one layer of Mixtral's shape."""
    from lamina.layers import Call, ExpertsSpec, FeedForwardSpec, TopKSpec
    from lamina.tokens import plain

    spec = ExpertsSpec(router=TopKSpec(experts=experts), expert=FeedForwardSpec(hidden=WIDTH * 7 // 2))
    torch.manual_seed(0)
    module, x = spec.build(WIDTH).eval(), torch.randn(1, TOKENS, WIDTH)

    def run() -> None:
        with torch.no_grad():
            module(x, Call(tokens=plain(1, TOKENS)))

    return run


def timed(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def rounds(runs: dict[str, Callable[[], Any]], count: int) -> dict[str, list[float]]:
    """Seconds of each run in each round; they take turns, each first as often as the others."""
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(count):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(timed(runs[name]))
    return found


def row(times: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(times), "best": min(times), "worst": max(times), "rounds": times}


def ratio(one: list[float], other: list[float]) -> float:
    """The median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {"threads": options.threads, "rounds": options.rounds, "models": {}, "ratios": {}}
    for name in MODELS:
        for what, runs in passes(name).items():
            found = rounds(runs, options.rounds)
            figures["models"].setdefault(name, {})[what] = {library: row(times) for library, times in found.items()}
            figures["ratios"][f"{name}, {what}: transformers / lamina"] = ratio(found["transformers"], found["lamina"])
    found = rounds({str(count): layer(count) for count in COUNTS}, options.rounds)
    figures["experts"] = {name: row(times) for name, times in found.items()}
    for name, times in found.items():
        figures["ratios"][f"one layer, {name} / {COUNTS[0]} experts"] = ratio(times, found[str(COUNTS[0])])
    print(f"{'seconds':44}  median    best   worst")
    for name, parts in figures["models"].items():
        for what, libraries in parts.items():
            for library, one in libraries.items():
                title = f"{name}, {what}, {library}"
                print(f"  {title:44}" + "".join(f"{one[key]:8.3f}" for key in ("median", "best", "worst")))
    for name, one in figures["experts"].items():
        title = f"one layer of {name} experts, {TOKENS} tokens"
        print(f"  {title:44}" + "".join(f"{one[key]:8.3f}" for key in ("median", "best", "worst")))
    for name, value in figures["ratios"].items():
        print(f"  {name:52}{value:6.2f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
