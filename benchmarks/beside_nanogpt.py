"""nanoGPT and `lamina train` on the same text with the same budget: both curves in one report.

    python benchmarks/beside_nanogpt.py --nanogpt DIR --text FILE [-o DIR] [--steps 2000] [--threads 1] [--json FILE]

nanoGPT is its own code in DIR: its preparation of the characters, and its train.py with the arguments that its README
gives for the CPU (4 layers, 4 heads, width 128, 12 x 64 characters). lamina is examples/train/shakespeare.yaml. Each
measures its own validation loss every 250 steps on 1,200 rows of the held-out tenth: nanoGPT on random ones, lamina
on rows from all over it, always the same. How fast they are is measured by benchmarks/train.py: here they do not take
turns.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lamina.train.past import read_run
from lamina.train.report import compared
from lamina.train.run import Run

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "examples/train/shakespeare.yaml"
LAYERS, HEADS, WIDTH, LENGTH, BATCH, EVERY = 4, 4, 128, 64, 12, 250
ITERATIONS = 100  # batches of 12 rows that nanoGPT measures on
STEP = re.compile(r"step (\d+): train loss ([\d.]+), val loss ([\d.]+)")
ITER = re.compile(r"iter (\d+): loss ([\d.]+), time ([\d.]+)ms")


def nanogpt(folder: Path, text: Path, room: Path, directory: Path, steps: int, env: dict[str, str]) -> None:
    """Train it in a copy of its folder, and write what it says as the records of a run."""
    copy = room / "nanogpt"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(".git", "assets", "*.bin"))
    data = copy / "data/shakespeare_char"
    shutil.copy(text, data / "input.txt")
    subprocess.run([sys.executable, "prepare.py"], cwd=data, env=env, check=True, stdout=subprocess.DEVNULL)
    said = {
        "device": "cpu", "compile": False, "eval_iters": ITERATIONS, "eval_interval": EVERY, "log_interval": 1,
        "block_size": LENGTH, "batch_size": BATCH, "n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH,
        "max_iters": steps, "lr_decay_iters": steps, "dropout": 0.0,
    }  # fmt: skip
    command = [sys.executable, "-u", "train.py", "config/train_shakespeare_char.py"]
    command += [f"--{name}={value}" for name, value in said.items()]
    config = "".join(f"{name}: {json.dumps(value)}\n" for name, value in said.items())
    shown = ["nanoGPT", *command[2:]]
    with (
        Run(directory, config, command=shown) as run,
        subprocess.Popen(command, cwd=copy, env=env, stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout is not None
        seconds = 0.0
        for line in process.stdout:
            if found := STEP.match(line):
                run.record({"step": int(found[1]), "validation": {"loss": float(found[3])}})
                print(f"nanoGPT {line.strip()}", flush=True)
            elif found := ITER.match(line):
                step, milliseconds = int(found[1]), float(found[3])
                if step % EVERY:  # the time of these steps holds an evaluation
                    seconds += milliseconds / 1000
                if step % 10 == 1:
                    speed = BATCH * LENGTH / milliseconds * 1000
                    record = {"step": step, "tokens": step * BATCH * LENGTH, "loss": float(found[2])}
                    run.record({**record, "tokens_per_second": speed, "seconds": seconds})
    if process.returncode:
        raise SystemExit(f"nanoGPT ended with status {process.returncode}")


def ours(text: Path, room: Path, directory: Path, steps: int, env: dict[str, str]) -> None:
    """The recipe, by its commands."""
    lamina = [sys.executable, "-m", "lamina"]
    prepare = ["data", "prepare", str(text), "-o", "shakespeare", "--tokenizer", "characters", "--validation", "0.1"]
    subprocess.run([*lamina, *prepare], cwd=room, env=env, check=True)
    changes = [f"loop.steps={steps}", f"evaluation.every={EVERY}", f"evaluation.rows={ITERATIONS * BATCH}"]
    train = ["train", str(RECIPE), "-o", str(directory), *changes, "log.every=10"]
    subprocess.run([*lamina, *train], cwd=room, env=env, check=True)


def figures(directory: Path) -> dict[str, Any]:
    run = read_run(directory)
    found = run.summary()
    kept = ("steps", "tokens", "validation_loss", "best_validation_loss", "tokens_per_second")
    curve = [[step, value] for step, value in run.metrics.curve("validation", "loss")]
    return {name: found[name] for name in kept} | {"validation": curve}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help="a folder with nanoGPT's code")
    parser.add_argument("--text", type=Path, required=True, help="Tiny Shakespeare, or any other text")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/beside-nanogpt"), help="directory of the runs")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    source = str(ROOT / "src")
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "PYTHONPATH": path}
    directories = {name: (options.output / name).absolute() for name in ("nanoGPT", "lamina")}
    text = options.text.absolute()
    with tempfile.TemporaryDirectory() as room:
        nanogpt(options.nanogpt, text, Path(room), directories["nanoGPT"], options.steps, env)
        ours(text, Path(room), directories["lamina"], options.steps, env)
    page = options.output / "compared.html"
    page.write_text(compared([read_run(one) for one in directories.values()]), encoding="utf-8")
    found = {"text": text.name, "threads": options.threads, **{n: figures(one) for n, one in directories.items()}}
    for name in directories:
        one = found[name]
        print(f"{name:8} validation loss {one['validation_loss']:.4f}, {one['tokens_per_second']:,.0f} tokens/s")
    print(f"both curves: {page}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
