"""Tokens per second of SmolLM2-135M, batch 1, beside transformers and llama.cpp in one run.

    python benchmarks/decode.py [--rounds 7] [--threads 2] [--python PYTHON] [--json FILE]

Every variant is a process of its own that is loaded and warm. They are asked in turns, those of one dtype one right
after the other, and a ratio is the median of the rounds' own ratios: the memory of a shared machine is now faster and
now slower by half for seconds at a time, and figures of different moments must not be compared. llama.cpp (package
xllamacpp, in an environment of its own) reads the same weights as float32, bfloat16 and Q8_0. Decoding is measured from
the first new token on, prefill for 1,024 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LIBRARIES = ("transformers", "eager", "compiled", "llama.cpp")
NEW = 60
PREFILL = 1024
PROMPT = "The capital of France is"

LLAMA_CPP = r"""
import json, os, sys
import xllamacpp
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
new, threads = int(sys.argv[2]), int(sys.argv[3])
parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx, parameters.n_parallel, parameters.verbosity = 2048, 1, -1
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(parameters)
def ask(prompt, new):
    answer = server.handle_completions(
        {"prompt": prompt, "n_predict": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False})
    return (json.loads(answer) if isinstance(answer, str) else answer)["timings"]
ask("The capital of France is", 8)
print("ready", file=out, flush=True)
for line in sys.stdin:
    if line.strip() == "decode":
        print(ask("The capital of France is", new)["predicted_per_second"], file=out, flush=True)
    else:
        print(ask(json.loads(line), 1)["prompt_per_second"], file=out, flush=True)
"""


def write_gguf(folder: Path) -> dict[str, Path]:
    """The packaged model's weights as llama.cpp reads them: float32, bfloat16 and Q8_0."""
    import gguf
    import numpy as np

    from lamina.locate import locate

    reader = gguf.GGUFReader(locate("smollm2-135m").path)
    kinds = {"float32": ("F32", 0), "bfloat16": ("BF16", 32), "int8": ("Q8_0", 7)}
    for name, (stored, number) in kinds.items():
        writer = gguf.GGUFWriter(folder / f"{name}.gguf", "llama")
        for field in reader.fields.values():
            left_out = ("general.architecture", "general.file_type", "general.quantization_version")
            if field.name.startswith("GGUF.") or field.name in left_out:
                continue
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
        writer.add_file_type(number)
        for tensor in reader.tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            if values.ndim == 1 or stored == "F32":
                writer.add_tensor(tensor.name, values)
            else:
                quantised = gguf.GGMLQuantizationType[stored]
                writer.add_tensor(tensor.name, gguf.quants.quantize(values, quantised), raw_dtype=quantised)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return {name: folder / f"{name}.gguf" for name in kinds}


def work(library: str, dtype: str, directory: str, threads: int) -> None:
    """A worker: "decode" or a list of ids on standard input, tokens a second on standard output."""
    import torch

    torch.set_num_threads(threads)
    ids = torch.tensor([json.loads(os.environ["LAMINA_BENCHMARK_IDS"])])
    if library == "transformers":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()

        def write(new: int) -> float:
            begin = time.perf_counter()
            model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=2)
            return time.perf_counter() - begin

        def decode() -> float:
            return NEW / (write(NEW + 1) - write(1))

        def forward(prompt: torch.Tensor) -> Any:
            return model(prompt, use_cache=True, logits_to_keep=1)
    else:
        import lamina
        from lamina.generation import Sampling, limits_of, stream

        quantize = "int8" if dtype == "int8" else None
        as_stored = "float32" if dtype == "int8" else dtype
        model = lamina.load(directory, as_stored, compile=library == "compiled", quantize=quantize)

        def decode() -> float:
            limits = limits_of(model, NEW + 1, NEW + 1)
            clock = [time.perf_counter() for _ in stream(model, ids, sampling=Sampling(), limits=limits)]
            return (len(clock) - 1) / (clock[-1] - clock[0])

        def forward(prompt: torch.Tensor) -> Any:
            return model(prompt, cache=model.new_cache(), keep_logits=1)

    decode()
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "decode":
            print(decode(), flush=True)
            continue
        prompt = torch.tensor([json.loads(line)])
        with torch.inference_mode():
            begin = time.perf_counter()
            forward(prompt)
        print(prompt.shape[1] / (time.perf_counter() - begin), flush=True)


class Worker:
    """A process that answers each line."""

    def __init__(self, command: list[str], ids: list[int]) -> None:
        environment = {**os.environ, "LAMINA_BENCHMARK_IDS": json.dumps(ids), "HF_HUB_OFFLINE": "1"}
        begin = time.perf_counter()
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - not a pipe, which nobody reads while the worker works
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, stderr=self.said
        )
        assert self.process.stdout is not None
        while (line := self.process.stdout.readline()) and line.strip() != "ready":
            pass
        self.ready_in = time.perf_counter() - begin
        if not line:
            self.said.seek(0)
            raise SystemExit(f"{command[:4]} failed:\n{self.said.read()[-2000:]}")

    def ask(self, line: str) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def perplexities(directory: str) -> dict[str, float]:
    """Of 20 kB of the Python documentation, with float32, bfloat16 and 8-bit weights."""
    import lamina
    from lamina.generation.perplexity import measure

    tokenizer = lamina.tokenizer(directory)
    ids = tokenizer.encode("\n\n".join(list(pydoc_data.topics.topics.values())[:40])[:20_000])
    found = {}
    for name, dtype, quantize in (
        ("float32", "float32", None),
        ("bfloat16", "bfloat16", None),
        ("int8", "float32", "int8"),
    ):
        model = lamina.load(directory, dtype, quantize=quantize)
        *_, total = measure(model, ids)
        found[name] = total.perplexity
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--python", type=Path, help="an interpreter that has xllamacpp")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker, options.threads)
        return
    from tokenizer_parity import environment

    import lamina

    python = str(options.python or environment())
    figures: dict[str, Any] = {"threads": options.threads, "rounds": options.rounds}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_gguf(folder)
        directory = str(folder / "model")
        lamina.save(lamina.load("smollm2-135m", dtype="float32"), directory)
        tokenizer = lamina.tokenizer(directory)
        ids = tokenizer.encode(PROMPT)
        long = tokenizer.encode("\n".join(list(pydoc_data.topics.topics.values())[:10]))[:PREFILL]
        workers: dict[str, Worker] = {}
        here = [sys.executable, __file__, "--threads", str(options.threads), "--worker"]
        for dtype in ("float32", "bfloat16"):
            for library in ("transformers", "eager", "compiled"):
                workers[f"{library} {dtype}"] = Worker([*here, library, dtype, directory], ids)
        workers["compiled int8"] = Worker([*here, "compiled", "int8", directory], ids)
        for dtype, path in files.items():
            command = [python, "-c", LLAMA_CPP, str(path), str(NEW), str(options.threads)]
            workers[f"llama.cpp {dtype}"] = Worker(command, ids)
        order = [f"{library} {dtype}" for dtype in ("float32", "bfloat16", "int8") for library in LIBRARIES]
        workers = {name: workers[name] for name in order if name in workers}
        decoding: dict[str, list[float]] = {name: [] for name in workers}
        reading: dict[str, list[float]] = {
            name: [] for name in workers if "compiled" not in name and "int8" not in name
        }
        for count in range(options.rounds):
            for name, found in decoding.items():
                found.append(workers[name].ask("decode"))
            print(
                f"round {count}: " + ", ".join(f"{n} {f[-1]:.1f}" for n, f in decoding.items()),
                file=sys.stderr,
                flush=True,
            )
        for _ in range(max(options.rounds // 2, 3)):
            for name, found in reading.items():
                found.append(workers[name].ask(json.dumps(long)))
        for worker in workers.values():
            worker.process.kill()
        figures["perplexity"] = perplexities(directory)
    for what, runs in (("decode", decoding), ("prefill", reading)):
        print(f"\n{what}, tokens a second{'':24}median    best   worst")
        for name, found in runs.items():
            row = {"median": statistics.median(found), "best": max(found), "worst": min(found), "rounds": found}
            figures.setdefault(what, {})[name] = row
            print(f"  {name:44}" + "".join(f"{row[key]:8.1f}" for key in ("median", "best", "worst")))
    figures["ready_seconds"] = {name: round(worker.ready_in, 2) for name, worker in workers.items()}
    figures["ratios"] = ratios(figures)
    print("\nratios, each the median of the rounds' own")
    for name, value in figures["ratios"].items():
        print(f"  {name:52}{value:6.2f}")
    print("\nperplexity", {name: round(value, 4) for name, value in figures["perplexity"].items()})
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def ratios(figures: dict[str, Any]) -> dict[str, float]:
    """What the figures are about."""

    def of(what: str, one: str, other: str) -> float:
        pairs = zip(figures[what][one]["rounds"], figures[what][other]["rounds"], strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    found = {}
    for dtype in ("float32", "bfloat16"):
        found[f"decode {dtype}: compiled / transformers"] = of("decode", f"compiled {dtype}", f"transformers {dtype}")
        found[f"decode {dtype}: compiled / llama.cpp"] = of("decode", f"compiled {dtype}", f"llama.cpp {dtype}")
        found[f"decode {dtype}: eager / transformers"] = of("decode", f"eager {dtype}", f"transformers {dtype}")
        found[f"prefill {dtype}: lamina / transformers"] = of("prefill", f"eager {dtype}", f"transformers {dtype}")
    found["decode int8: compiled / llama.cpp Q8_0"] = of("decode", "compiled int8", "llama.cpp int8")
    return found


if __name__ == "__main__":
    main()
