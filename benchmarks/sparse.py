"""Sparse attention on the CPU: what it costs beside transformers' Longformer and beside torch's fused dense kernel.

    python benchmarks/sparse.py [--rounds 5] [--threads 2] [--json FILE]

The two Longformers (base shape, two layers, one global token, the same random weights) are processes of their own,
loaded and warm, that are asked in turns; a ratio is the median of the rounds' own. Peaks of memory are those of the
forward alone, beyond the loaded model, in fresh processes. Kernels are compared in one process, in turns too.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LENGTHS = (4096, 16384)
LINEAR = (4096, 8192, 16384, 32768, 65536)
WINDOWS = (128, 256, 512, 1024)
HEADS, SIZE, WINDOW = 12, 64, 512


def write_longformer(folder: Path) -> None:
    """The base shape with two layers and room for the longest text, random."""
    from transformers import LongformerConfig, LongformerModel

    config = LongformerConfig(
        vocab_size=50265,
        num_hidden_layers=2,
        attention_window=[512, 512],
        max_position_embeddings=max(LENGTHS) + 2,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    LongformerModel(config).save_pretrained(folder)


def peak(reset: bool = False) -> int:
    """The largest resident size so far, or from now on."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024


def work(library: str, directory: str, threads: int) -> None:
    """A worker: a length on standard input; on standard output seconds, bytes and the sum of what came out."""
    import torch

    torch.set_num_threads(threads)
    if library == "transformers":
        from transformers import LongformerModel
        from transformers.utils import logging

        logging.set_verbosity_error()
        theirs = LongformerModel.from_pretrained(directory).eval()

        def forward(ids: torch.Tensor, marked: torch.Tensor) -> torch.Tensor:
            return theirs(ids, global_attention_mask=marked.long()).last_hidden_state
    else:
        import lamina

        ours = lamina.load(directory).eval()

        def forward(ids: torch.Tensor, marked: torch.Tensor) -> torch.Tensor:
            return ours(ids, marked=marked).hidden

    print("ready", flush=True)
    for line in sys.stdin:
        length = int(line)
        ids = torch.randint(4, 50000, (1, length), generator=torch.Generator().manual_seed(0))
        marked = torch.zeros(1, length, dtype=torch.bool)
        marked[0, 0] = True
        gc.collect()
        before = peak(reset=True)
        with torch.inference_mode():
            begin = time.perf_counter()
            out = forward(ids, marked)
            seconds = time.perf_counter() - begin
        print(json.dumps([seconds, peak() - before, out[0, :: length // 64, :8].flatten().tolist()]), flush=True)


class Worker:
    """A process that answers each line."""

    def __init__(self, library: str, directory: str, threads: int) -> None:
        command = [sys.executable, __file__, "--threads", str(threads), "--worker", library, directory]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None and self.process.stdin is not None
        self.out, self.into = self.process.stdout, self.process.stdin
        if self.out.readline().strip() != "ready":
            raise SystemExit(f"the worker of {library} failed")

    def ask(self, length: int) -> list[Any]:
        self.into.write(f"{length}\n")
        self.into.flush()
        return json.loads(self.out.readline())

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def longformers(rounds: int, threads: int) -> dict[str, Any]:
    """Forward passes of both, in turns, and the peak of a first one."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        write_longformer(Path(name))
        for length in LENGTHS:
            peaks, outputs = {}, {}
            for library in ("transformers", "lamina"):
                worker = Worker(library, name, threads)
                _, peaks[library], outputs[library] = worker.ask(length)
                worker.end()
            gap = max(abs(a - b) for a, b in zip(outputs["transformers"], outputs["lamina"], strict=True))
            workers = {library: Worker(library, name, threads) for library in peaks}
            seconds: dict[str, list[float]] = {library: [] for library in peaks}
            for number in range(rounds + 1):
                for library, worker in workers.items():
                    taken = worker.ask(length)[0]
                    seconds[library] += [taken] if number else []  # the first warms up
            for worker in workers.values():
                worker.end()
            found[str(length)] = {
                "seconds": seconds,
                "peak_bytes": peaks,
                "largest_difference": gap,
                "faster": ratio(seconds["transformers"], seconds["lamina"]),
                "peak_ratio": peaks["lamina"] / peaks["transformers"],
            }
            print(f"Longformer, {length} tokens: {found[str(length)]['faster']:.2f} x", file=sys.stderr, flush=True)
    return found


def ratio(ones: list[float], others: list[float]) -> float:
    """The median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(ones, others, strict=True))


def kernels(rounds: int) -> dict[str, Any]:
    """A causal window beside the fused dense causal kernel, and by itself over lengths and windows."""
    import torch
    import torch.nn.functional as F

    from lamina.attend import Request, attend
    from lamina.patterns import Causal, Window
    from lamina.tokens import plain

    def tensors(length: int, train: bool) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        made = (torch.randn(1, length, HEADS, SIZE, generator=generator).transpose(1, 2) for _ in range(3))
        return [x.requires_grad_(train) for x in made]

    def windowed(qkv: list[torch.Tensor], window: int, backward: bool = False) -> Callable[[], Any]:
        pattern, tokens = Causal() & Window(back=window), plain(1, qkv[0].shape[2])

        def run() -> None:
            request = Request(*qkv, tokens, tokens, pattern, SIZE**-0.5)
            with torch.inference_mode(not backward):
                out = attend(request)
            if backward:
                torch.autograd.grad(out.sum(), qkv)

        return run

    def dense(qkv: list[torch.Tensor], backward: bool = False) -> Callable[[], Any]:
        def run() -> None:
            with torch.inference_mode(not backward):
                out = F.scaled_dot_product_attention(*qkv, is_causal=True)
            if backward:
                torch.autograd.grad(out.sum(), qkv)

        return run

    found: dict[str, Any] = {}
    for what, backward in (("forward", False), ("forward and backward", True)):
        qkv = tensors(16384, backward)
        found[what] = seconds = in_turns(
            {"dense": dense(qkv, backward), "window": windowed(qkv, WINDOW, backward)}, rounds
        )
        seconds["faster"] = ratio(seconds["dense"], seconds["window"])
        print(f"window of {WINDOW}, {what}: {seconds['faster']:.2f} x dense", file=sys.stderr, flush=True)
    runs = {str(length): windowed(tensors(length, False), WINDOW) for length in LINEAR}
    found["lengths"] = in_turns(runs, rounds)
    qkv = tensors(16384, False)
    found["windows"] = in_turns({str(window): windowed(qkv, window) for window in WINDOWS}, rounds)
    first = found["lengths"][str(LINEAR[0])]
    found["times_linear"] = {  # 1: exactly as many times as long as the text is
        name: ratio(taken, [one * int(name) / LINEAR[0] for one in first]) for name, taken in found["lengths"].items()
    }
    return found


def in_turns(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Seconds of each, round by round, after one round that warms up."""
    seconds: dict[str, Any] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name] += [time.perf_counter() - begin] if number else []
    return seconds


def caches() -> dict[str, Any]:
    """Bytes of the cache of a small decoder of two layers after more and more tokens, by the pattern of its layers."""
    import torch

    from lamina import ModelSpec
    from lamina.layers import AttentionSpec, EmbeddingSpec, LayerSpec, RotarySpec, StackSpec, StepSpec
    from lamina.patterns import Causal, Prefix, Sinks, Window, bigbird

    patterns = {
        "dense": Causal(),
        "window of 512": Causal() & Window(back=512),
        "window of 512 and 4 sinks": Causal() & (Window(back=512) | Sinks(count=4)),
        "window of 512 and marked tokens": Causal() & (Window(back=512) | Prefix()),
        "blocks of 64, two and the first": bigbird(size=64, random_blocks=0),
    }
    found: dict[str, Any] = {}
    for name, pattern in patterns.items():
        attention = AttentionSpec(heads=4, key_heads=2, head_dim=64, rotary=RotarySpec(), pattern=pattern)
        layer = LayerSpec(steps=(StepSpec(name="attention", op=attention),))
        spec = ModelSpec(width=256, embedding=EmbeddingSpec(vocabulary=100), decoder=StackSpec(layers=(layer,) * 2))
        model = spec.build().eval()
        cache, ids = model.new_cache(), torch.randint(100, (1, 4096), generator=torch.Generator().manual_seed(0))
        held: dict[str, int] = {}
        with torch.inference_mode():
            for step in range(8):
                model(ids[:, :1024], cache=cache, marked=(ids[:, :1024] < (step == 0)).bool())
                for token in ids[:, 1024:1064].split(1, dim=1):
                    model(token, cache=cache)
                if step in (0, 3, 7):
                    held[str(cache.length)] = cache.bytes()
        found[name] = held
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker, options.threads)
        return
    import torch

    torch.set_num_threads(options.threads)
    figures = {
        "threads": options.threads,
        "rounds": options.rounds,
        "longformer": longformers(options.rounds, options.threads),
        "kernels": kernels(options.rounds),
        "cache_bytes": caches(),
    }
    for length, one in figures["longformer"].items():
        medians = {library: round(statistics.median(taken), 2) for library, taken in one["seconds"].items()}
        print(
            f"Longformer, {length} tokens: {medians} s, {one['faster']:.2f} times as fast, {one['peak_ratio']:.2f} of"
            f" the peak ({ {name: round(peak / 2**20) for name, peak in one['peak_bytes'].items()} } MiB), largest"
            f" difference {one['largest_difference']:.1e}"
        )
    kernel = figures["kernels"]
    for what in ("forward", "forward and backward"):
        print(f"window of {WINDOW} in 16,384 tokens, {what}: {kernel[what]['faster']:.2f} times as fast as dense")
    print("times linear:", {name: round(value, 2) for name, value in kernel["times_linear"].items()})
    print("windows:", {name: round(statistics.median(taken), 3) for name, taken in kernel["windows"].items()})
    print("bytes of the cache:", figures["cache_bytes"])
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
