"""Training beside transformers, nanoGPT and x-transformers in one run: tokens per second, memory, utilisation.

    python benchmarks/train.py [--rounds 7] [--threads 2] [--nanogpt DIR] [--json FILE] [--device cpu]

A GPT of 6 layers, width 384 and a vocabulary of 8,192 on 8 x 256 tokens: forward, loss, backward, clipping and a step
of AdamW, in float32 and in bfloat16 (theirs by autocast, as nanoGPT trains; ours as `lamina train` does it). The
libraries take turns within a round; a ratio is the median of the rounds' own ratios, memory the peak of a process of
its own. Utilisation is the arithmetic of the products (`lamina account`) by what this machine does at best in one large
product, measured in the same run. nanoGPT is its `model.py`, in a folder of yours; libraries that are not there
are left out and said to be. On CUDA GPT-2 small in bfloat16 is measured instead, by itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

LAYERS, HEADS, WIDTH, LENGTH, BATCH, VOCABULARY = 6, 6, 384, 256, 8, 8192
PRECISIONS = ("float32", "bfloat16")
Step = Callable[[], Any]


def batches(device: str) -> Callable[[], torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return lambda: torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=random).to(device)


def groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return [
        {"params": [one for one in weights if one.dim() >= 2], "weight_decay": 0.1},
        {"params": [one for one in weights if one.dim() < 2], "weight_decay": 0.0},
    ]


def looped(model: torch.nn.Module, loss: Callable[[torch.Tensor], torch.Tensor], precision: str, device: str) -> Step:
    """The plain loop that users write."""
    model.train()
    optimiser = torch.optim.AdamW(groups(model), lr=3e-4, betas=(0.9, 0.95), fused=True)
    draw = batches(device)

    def step() -> None:
        ids = draw()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            found = loss(ids)
        found.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def of_transformers(precision: str, device: str, folder: str) -> Step:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, n_positions=LENGTH, vocab_size=VOCABULARY,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).to(device)
    return looped(model, lambda ids: model(ids[:, :-1], labels=ids[:, :-1]).loss, precision, device)


def of_nanogpt(precision: str, device: str, folder: str) -> Step:
    found = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["nanogpt_model"] = module
    found.loader.exec_module(module)
    config = module.GPTConfig(
        block_size=LENGTH, vocab_size=VOCABULARY, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, dropout=0.0, bias=True
    )
    model = module.GPT(config).to(device)
    return looped(model, lambda ids: model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())[1], precision, device)


def of_x_transformers(precision: str, device: str, folder: str) -> Step:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=WIDTH, depth=LAYERS, heads=HEADS, attn_flash=True)
    model = TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=LENGTH, attn_layers=layers, tie_embedding=True)
    model = model.to(device)

    def loss(ids: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())

    return looped(model, loss, precision, device)


def of_lamina(precision: str, device: str, folder: str) -> Step:
    return trained(gpt(), precision, device, BATCH, LENGTH)


def gpt() -> Any:
    from lamina.families import Fields, family

    said = {
        "model_type": "gpt2", "n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "n_positions": LENGTH,
        "vocab_size": VOCABULARY, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip
    return family("gpt2").spec(Fields(said))


def trained(spec: Any, precision: Any, device: str, batch: int, length: int) -> Step:
    """One step of our own trainer on random rows."""
    import numpy as np

    from lamina.objectives import CausalLM
    from lamina.train.loader import Loader
    from lamina.train.loop import Trainer
    from lamina.train.optimiser import AdamW
    from lamina.train.schedule import Constant
    from lamina.train.specs import LoopSpec

    class Rows:
        def __len__(self) -> int:
            return 1 << 30

        def example(self, index: int, random: np.random.Generator) -> dict[str, np.ndarray]:
            return {"tokens": random.integers(spec.embedding.vocabulary, size=length + 1)}

    objective = CausalLM(documents=False)
    loader = Loader(objective, Rows(), range(1 << 30), batch=batch, micro=batch, seed=0)
    loop = LoopSpec(steps=1000, batch=batch, precision=precision)
    model = spec.build(device=device, seed=0)
    trainer = Trainer(model, objective, loader, AdamW(), Constant(), loop, device=device)
    return trainer.step


LIBRARIES: dict[str, Callable[[str, str, str], Step]] = {
    "transformers": of_transformers,
    "nanoGPT": of_nanogpt,
    "x-transformers": of_x_transformers,
    "lamina": of_lamina,
}
WANTED = {
    "float32": {"transformers": 1.15, "nanoGPT": 1.0, "x-transformers": 1.0},
    "bfloat16": {"transformers": 1.3, "nanoGPT": 1.2, "x-transformers": 1.2},
}


def there(folder: Path | None) -> list[str]:
    """The libraries that can be measured."""
    found = ["transformers", "lamina"]
    if folder is not None and (folder / "model.py").is_file():
        found.append("nanoGPT")
    if importlib.util.find_spec("x_transformers") is not None:
        found.append("x-transformers")
    return [name for name in LIBRARIES if name in found]


def peak(precision: str) -> float:
    """FLOP/s of one large product, the best of several."""
    dtype, size = getattr(torch, precision), 2048
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times)


def timed(step: Step, count: int, device: str) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        step()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / count


def memory(library: str, precision: str, options: argparse.Namespace) -> float:
    """Bytes at the peak of a process that makes four steps, beyond what importing the library takes."""
    command = [sys.executable, __file__, "--memory", library, precision, "--threads", str(options.threads)]
    if options.nanogpt:
        command += ["--nanogpt", str(options.nanogpt)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def remembered(library: str, precision: str, folder: Path | None) -> None:
    """What `memory` runs."""
    torch.ones(8, 8) @ torch.ones(8, 8)
    if library == "transformers":
        from transformers import GPT2LMHeadModel  # noqa: F401
    step = LIBRARIES[library](precision, "cpu", str(folder or ""))
    for _ in range(4):
        step()
    # ru_maxrss would be the parent's, where that was larger.
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import lamina

    names = there(options.nanogpt)
    figures: dict[str, Any] = {"threads": options.threads, "rounds": options.rounds, "left_out": []}
    figures["left_out"] = [name for name in LIBRARIES if name not in names]
    flops = lamina.account(gpt(), BATCH, LENGTH, dtype="float32").flops_train_per_token
    figures["flops_per_token"] = flops
    for precision in PRECISIONS:
        steps = {name: LIBRARIES[name](precision, "cpu", str(options.nanogpt or "")) for name in names}
        for step in steps.values():
            step()
            step()
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(options.rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                times[name].append(timed(steps[name], options.steps, "cpu"))
        best = peak(precision)
        del steps
        found: dict[str, Any] = {"peak_flops": best, "libraries": {}, "ratios": {}}
        for name in names:
            rate = BATCH * LENGTH / statistics.median(times[name])
            found["libraries"][name] = {
                "tokens_per_second": rate,
                "utilisation": rate * flops / best,
                "bytes": memory(name, precision, options),
                "seconds": times[name],
            }
        for name in names:
            if name != "lamina":
                ratio = statistics.median(a / b for a, b in zip(times[name], times["lamina"], strict=True))
                found["ratios"][name] = {"speed": ratio, "wanted": WANTED[precision][name]}
        figures[precision] = found
    return figures


def on_gpu(options: argparse.Namespace) -> dict[str, Any]:
    """GPT-2 small in bfloat16 on one GPU, by itself: utilisation of the measured peak of a product."""
    import lamina

    spec, batch, length = lamina.spec("gpt2/small"), 16, 1024
    step = trained(spec, "bfloat16", "cuda", batch, length)
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    seconds = statistics.median(timed(step, options.steps, "cuda") for _ in range(options.rounds))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    best = 2 * 8192**3 / min(times)
    rate = batch * length / seconds
    flops = lamina.account(spec, batch, length, dtype="bfloat16").flops_train_per_token
    return {
        "device": torch.cuda.get_device_name(),
        "tokens_per_second": rate,
        "peak_flops": best,
        "utilisation": rate * flops / best,
        "bytes": torch.cuda.max_memory_allocated(),
    }


def table(figures: dict[str, Any]) -> list[str]:
    lines = []
    for precision in PRECISIONS:
        found = figures[precision]
        lines.append(f"{precision}: the machine's best product {found['peak_flops'] / 1e9:,.0f} GFLOP/s")
        for name, one in found["libraries"].items():
            said = f"  {name:16}{one['tokens_per_second']:9,.0f} tokens/s  {one['utilisation']:5.0%} of it"
            said += f"  {one['bytes'] / 2**20:7,.0f} MiB"
            if name in found["ratios"]:
                ratio = found["ratios"][name]
                said += f"   lamina is {ratio['speed']:.2f} times as fast (wanted {ratio['wanted']})"
            lines.append(said)
    return lines + [f"not here: {', '.join(figures['left_out'])}"] * bool(figures["left_out"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of each library in each round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nanogpt", type=Path, help="a folder with nanoGPT's model.py")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        return remembered(*options.memory, options.nanogpt)
    figures = on_gpu(options) if options.device == "cuda" else measure(options)
    print(json.dumps(figures, indent=1) if options.device == "cuda" else "\n".join(table(figures)))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
