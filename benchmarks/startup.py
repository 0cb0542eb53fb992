"""How long lamina takes to be there: help, version, import, an account of 405 billion parameters, loading 540 MB.

    python benchmarks/startup.py [--rounds 5] [--json FILE]

Each figure is the median of fresh processes. transformers loads the same directory, in turns with lamina, in one run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

IMPORT = "import time; start = time.perf_counter(); import {name}; print(time.perf_counter() - start)"

ACCOUNT = """
import time
import torch
start = time.perf_counter()
import lamina
account = lamina.account("llama3.1/405b")
print(time.perf_counter() - start)
assert account.parameters == 405_853_388_800
"""

LOAD = """
import sys, time, torch
if "{library}" == "lamina":
    import lamina
    import lamina.source
    load = lamina.load
else:
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama
    load = AutoModelForCausalLM.from_pretrained

def peak(reset=False):
    if reset:
        open("/proc/self/clear_refs", "w").write("5")
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024

before = peak(reset=True)
start = time.perf_counter()
model = load(sys.argv[1])
loaded = time.perf_counter() - start
at_load = peak() - before
ids = torch.zeros((1, 1), dtype=torch.int64)
with torch.inference_mode():
    model(ids)
first = time.perf_counter() - start
print(loaded, first, at_load, peak() - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


def seconds(command: list[str]) -> float:
    """Wall time of a command that must succeed."""
    import time

    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def printed(code: str, *arguments: str) -> list[float]:
    """The numbers that a fresh interpreter prints."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(word) for word in done.stdout.split()]


def make_directory(folder: str) -> str:
    """SmolLM2-135M in float32, in the Hugging Face layout: 540 MB."""
    code = "import lamina, sys; lamina.save(lamina.load('smollm2-135m', dtype='float32'), sys.argv[1])"
    directory = f"{folder}/smollm2-float32"
    subprocess.run([sys.executable, "-c", code, directory], check=True)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    lamina = [str(Path(sys.executable).parent / "lamina")]
    bare = [sys.executable, "-c", "pass"]
    for command in ([*lamina, "--help"], bare):  # fill the caches of the file system, and write byte code
        seconds(command)
    rounds = range(options.rounds)
    figures: dict[str, float] = {
        "python_s": statistics.median(seconds(bare) for _ in rounds),
        "help_s": statistics.median(seconds([*lamina, "--help"]) for _ in rounds),
        "version_s": statistics.median(seconds([*lamina, "--version"]) for _ in rounds),
        "import_lamina_s": statistics.median(printed(IMPORT.format(name="lamina"))[0] for _ in rounds),
        "import_torch_s": statistics.median(printed(IMPORT.format(name="torch"))[0] for _ in rounds),
        "account_405b_beyond_torch_s": statistics.median(printed(ACCOUNT)[0] for _ in rounds),
    }
    with tempfile.TemporaryDirectory() as folder:
        directory = make_directory(folder)
        runs: dict[str, list[list[float]]] = {"lamina": [], "transformers": []}
        for _ in rounds:
            for library, found in runs.items():
                found.append(printed(LOAD.format(library=library), directory))
    for library, found in runs.items():
        columns = [statistics.median(column) for column in zip(*found, strict=True)]
        names = ("load_s", "load_and_first_token_s", "peak_at_load", "peak_after_first_token", "weights")
        figures |= {f"{library}_{name}": value for name, value in zip(names, columns, strict=True)}
    weights = figures["lamina_weights"]
    figures["load_ratio"] = figures["lamina_load_s"] / figures["transformers_load_s"]
    figures["load_and_first_token_ratio"] = (
        figures["lamina_load_and_first_token_s"] / figures["transformers_load_and_first_token_s"]
    )
    figures["peak_over_weights"] = figures["lamina_peak_after_first_token"] / weights
    for name, value in figures.items():
        print(f"{name:44} {value / 1e6:10.1f} MB" if value > 1e5 else f"{name:44} {value:10.3f}")
    if options.json:
        options.json.write_text(json.dumps({"cores": os.cpu_count(), **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
