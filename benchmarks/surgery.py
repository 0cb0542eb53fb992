"""What operations keep of a pretrained model: each plan is applied to SmolLM2-135M, and its verdict is written down.

    python benchmarks/surgery.py --text FILE [--only NAME ...] [--json benchmarks/results/surgery.json]
    python benchmarks/surgery.py --large 12 [--json FILE]

--large: the layers of the model are repeated so often, and the large checkpoint that this gives is operated on in
processes that are watched: seconds, bytes of the files, and the most memory beyond what the program holds when it has
read nothing, of its own and with the pages of files that it has mapped.
Plans that the JSON already has are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SOURCE = "smollm2-135m"

PLANS: dict[str, tuple[list[dict[str, Any]], int]] = {
    "one key head, mean": ([{"op": "key_heads", "heads": 1}], 512),
    "one key head, least squares": ([{"op": "key_heads", "heads": 1, "by": "least_squares"}], 512),
    "window of 512 with 4 sinks": ([{"op": "window", "back": 512, "sinks": 4}], 2048),
    "window of 128 with 4 sinks": ([{"op": "window", "back": 128, "sinks": 4}], 2048),
    "4 experts, 2 a token": ([{"op": "experts", "experts": 4}], 512),
    "YaRN, 4 times the context": (
        [{"op": "rope", "scaling": {"kind": "yarn", "factor": 4.0, "original": 8192}, "context": 32768}],
        2048,
    ),
    "40 layers: 0-19, 10-29": ([{"op": "layers", "order": ["0-19", "10-29"]}], 512),
    "40 layers, new ones add nothing": ([{"op": "new_layers", "after": ["20-29"]}], 512),
    "RETRO graft": ([{"op": "retrieval", "begin": "copied", "at": ["decoder.layers.17", "decoder.layers.20"]}], 512),
}
"""Name -> the operations, and the tokens that the verdict reads at one time."""


def command(*given: object) -> list[str]:
    return [sys.executable, "-m", "lamina", *map(str, given)]


def judged(plan: list[dict[str, Any]], length: int, text: Path, tokens: int) -> dict[str, Any]:
    """What `lamina edit` says of a plan."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        path = Path(folder) / "plan.yaml"
        path.write_text(json.dumps(plan))
        reading = ("--text", text, "--tokens", tokens, "--length", length)
        given = command("edit", SOURCE, path, "-o", Path(folder) / "made", *reading, "--json")
        done = subprocess.run(given, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(given)}: {done.stderr.strip()}")
    found = json.loads(done.stdout)
    verdict = found["verdict"]
    drift = [one["drift"] for one in verdict.pop("drift")]
    promises = [{"kept": one["kept"], "why": one["why"]} for one in found["operations"]]
    return {"plan": plan, "length": length, "promises": promises, **verdict, "most_drift": max(drift, default=None)}


class Watch:
    """The most memory of a process, looked at every few milliseconds."""

    def __init__(self, process: subprocess.Popen[Any]) -> None:
        self.own = self.all = 0
        self.process = process
        self.thread = threading.Thread(target=self._look)
        self.thread.start()

    def _look(self) -> None:
        while self.process.poll() is None:
            try:
                lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
            except OSError:
                return
            sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
            self.own = max(self.own, sizes.get("RssAnon", 0))
            self.all = max(self.all, sum(sizes.values()))
            time.sleep(0.005)


def watched(given: list[str]) -> dict[str, Any]:
    """Run a command: seconds and bytes."""
    begun = time.perf_counter()
    process = subprocess.Popen(given, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    watch = Watch(process)
    said = process.communicate()[1]
    watch.thread.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(given)}: {said.strip()}")
    return {"seconds": time.perf_counter() - begun, "own_bytes": watch.own, "all_bytes": watch.all}


def large(times: int) -> dict[str, Any]:
    """A checkpoint that is so many times as deep, and operations on it."""
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("TMPDIR")))
    try:
        plans = {
            "layers": [{"op": "layers", "order": ["0-29"] * times}],
            "key_heads": [{"op": "key_heads", "heads": 1}],
            "experts": [{"op": "experts", "experts": 2, "at": ["decoder.layers.[0-9]", "decoder.layers.??"]}],
        }
        rows, source = {}, SOURCE
        bare = watched([sys.executable, "-c", "import lamina.editing, lamina.cli.edit, lamina.source"])
        for name, plan in plans.items():
            path, out = folder / f"{name}.yaml", folder / name
            path.write_text(json.dumps(plan))
            found = watched(command("edit", source, path, "-o", out, "--no-verdict", "--json"))
            for kind in ("own_bytes", "all_bytes"):
                found[kind] = max(found[kind] - bare[kind], 0)
            rows[name] = {**found, "plan": plan, "written_bytes": sum(f.stat().st_size for f in out.iterdir())}
            print(f"{name}: {rows[name]}", file=sys.stderr)
            if name == "layers":
                source = str(out)
            else:
                shutil.rmtree(out)
        return {"times": times, "rows": rows}
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--only", nargs="*", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--large", type=int, help="how often the layers are repeated")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = json.loads(given.json.read_text()) if given.json and given.json.exists() else {"plans": {}}
    if given.large:
        found["large"] = large(given.large)
    elif given.text is None:
        parser.error("--text: a text for the verdicts; python examples/train/texts.py jargon FILE gets one")
    else:
        for name in given.only:
            if name not in found["plans"]:
                print(name, file=sys.stderr)
                found["plans"][name] = judged(*PLANS[name], given.text, given.tokens)
                _keep(given.json, found)
    _keep(given.json, found)


def _keep(path: Path | None, found: dict[str, Any]) -> None:
    found["machine"] = f"{platform.machine()}, {os.cpu_count()} processors"
    text = json.dumps(found, indent=1) + "\n"
    if path is None:
        print(text)
    else:
        path.write_text(text)


if __name__ == "__main__":
    main()
