"""All benchmarks, one after the other: python -m benchmarks. Figures go to benchmarks/results/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

for name in ("startup", "decode", "encoder_decoder", "sparse", "experts"):
    print(f"== {name}", flush=True)
    subprocess.run(
        [sys.executable, str(HERE / f"{name}.py"), "--json", str(HERE / "results" / f"{name}.json")], check=True
    )
