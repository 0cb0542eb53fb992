"""Sparse attention on a GPU: what patterns cost beside torch's fused dense causal kernel, in time and in memory.

    python benchmarks/gpu.py [--device cuda] [--lengths 4096 16384 65536] [--window 512] [--rounds 20] [--json FILE]

Twelve heads of 64 in bfloat16, one row. Each backend is warm (what it compiles, and its plan of plain tokens, are not
counted, as from the second step of a training run on); runs are taken in turns, and a ratio is the median of the
rounds' own. `--device cpu` is there to try the program: float32, forward only, and no figure of it says anything.
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
import torch.nn.functional as F

from lamina.attend import BACKENDS, Request, attend
from lamina.patterns import Causal, Global, Pattern, Window, bigbird
from lamina.tokens import Tokens, plain

HEADS, SIZE = 12, 64


def cases(window: int) -> dict[str, tuple[str, Pattern, bool]]:
    """What is measured: a name, and (backend, pattern, whether the first token is marked)."""
    longformer = Window(back=window // 2 + 1, ahead=window // 2)
    return {
        "causal window, packed": ("varlen", Causal() & Window(back=window), False),
        "causal window, flex": ("flex", Causal() & Window(back=window), False),
        "Longformer": ("flex", longformer | Global(), True),
        "BigBird": ("flex", bigbird(), False),
    }


def measured(device: str, length: int, window: int, rounds: int, backward: bool) -> dict[str, Any]:
    """Seconds of each case and of the dense kernel, round by round, and the peak of bytes beyond the inputs."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    made = (torch.randn(1, length, HEADS, SIZE, generator=generator, device=device, dtype=dtype) for _ in range(3))
    qkv = [x.transpose(1, 2).requires_grad_(backward) for x in made]
    tokens = plain(1, length, device=device)
    marked = Tokens(tokens.position, tokens.document, tokens.position == 0)

    def timed(forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            with torch.set_grad_enabled(backward):
                out = forward()
            if backward:
                torch.autograd.grad(out, qkv, out.detach())

        return run

    runs = {"dense": timed(lambda: F.scaled_dot_product_attention(*qkv, is_causal=True))}
    refused = {}
    for name, (backend, pattern, marks) in cases(window).items():
        which = marked if marks else tokens
        request = Request(*qkv, which, which, pattern, SIZE**-0.5)
        with torch.set_grad_enabled(backward):
            reason = BACKENDS[backend].refuses(request)
        if reason:
            refused[name] = reason
        else:
            runs[name] = timed(lambda request=request, backend=backend: attend(request, backend))
    found: dict[str, Any] = {"seconds": {name: [] for name in runs}, "refused": refused}
    for number in range(rounds + 2):
        for name, run in runs.items():
            seconds = clocked(run, device)
            found["seconds"][name] += [seconds] if number > 1 else []
    found["faster_than_dense"] = {
        name: statistics.median(a / b for a, b in zip(found["seconds"]["dense"], taken, strict=True))
        for name, taken in found["seconds"].items()
    }
    if device == "cuda":
        found["peak_bytes"] = {name: peak(run) for name, run in runs.items()}
    return found


def clocked(run: Callable[[], None], device: str) -> float:
    """Seconds until the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def peak(run: Callable[[], None]) -> int:
    """The most bytes at once, beyond what is there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "gpu.py: there is no CUDA device here; --device cpu --lengths 256 --window 32 --rounds 1 tries the program"
        )
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    figures: dict[str, Any] = {"device": name, "window": options.window, "rounds": options.rounds}
    for what in ("forward", "forward and backward")[: 1 if options.device == "cpu" else 2]:
        for length in options.lengths:
            one = measured(options.device, length, options.window, options.rounds, what != "forward")
            figures[f"{what}, {length}"] = one
            faster = {name: round(ratio, 2) for name, ratio in one["faster_than_dense"].items()}
            print(f"{what}, {length} tokens: times as fast as dense causal: {faster}")
            for case, reason in one["refused"].items():
                print(f"  {case}: left out: {reason}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
