"""What `verify` finds of every kind of layer and every family: the grid of docs/conformance.md.

    python -m benchmarks.conformance [--json FILE] [NAME ...]

Small models with random weights (tests/grid.py), in float32. With names, only those are tried anew, and the others stay
as the file has them. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

from tests.grid import found, models

RESULTS = Path(__file__).parent / "results/conformance.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="the beginning of a row's name")
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    every = models()
    before = json.loads(given.json.read_text()) if given.names and given.json.is_file() else {}
    chosen = [name for name in every if not given.names or name.startswith(tuple(given.names))]
    failed = 0
    for name in chosen:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transformers, as it writes the files of a family
            before[name] = found(every[name]())
        wrong = [row for row, said in before[name].items() if said["verdict"] == "fails"]
        failed += len(wrong)
        print(f"{name}: {', '.join(wrong) or 'all holds'}", flush=True)
    rows = [f"{json.dumps(name)}: {json.dumps(before[name])}" for name in every if name in before]
    given.json.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
