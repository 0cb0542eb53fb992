"""Kills and readers during builds (with both engines, where lancedb is installed)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lamina.retrieve import Embedder, build
from tests.retrieve import made

HERE = Path(__file__).parent
without_lance = pytest.mark.skipif(
    importlib.util.find_spec("lancedb") is None, reason="lancedb is not installed: it is in the extra lamina[retrieval]"
)
ENGINES = ["exact", pytest.param("lance", marks=without_lance)]


def run(script: str, *words: object) -> str:
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parent.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_twenty_kills_lose_nothing(tmp_path: Path, engine: str):
    text = made.prepared(tmp_path / "text", made.rows(tmp_path / "t.jsonl", made.texts(60)))
    bert = Embedder(made.embedder_at(tmp_path / "bert"))
    build(text, tmp_path / "killed", bert, chunk=11)
    kills, same, generations = run("killed_builder.py", tmp_path, engine, 0).split()
    assert (kills, same, generations) == ("20", "True", "2")  # the newest, and the one before it, which is held


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_readers_of_a_database_that_is_rebuilt(tmp_path: Path, engine: str):
    made.prepared(tmp_path / "text", made.rows(tmp_path / "t.jsonl", made.texts(30)))
    made.embedder_at(tmp_path / "bert")
    times, generations, failed = map(int, run("rebuilt.py", tmp_path, engine).split())
    assert failed == 0 and times >= 24 and generations >= 2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the system does not say what a process holds")
@pytest.mark.parametrize("dtype, at_once", [("float32", 64), ("bfloat16", 4)])
def test_memory_does_not_grow_with_rows(tmp_path: Path, dtype: str, at_once: int):
    """What the C library keeps of tensors that are gone is given back: else 110 MB more here, and ever more. In 16 bits
    texts are read at few lengths: else 160 MB more, 2 for each length."""
    early, most = map(int, run("growing.py", tmp_path, dtype, at_once).split())
    assert most < early + 64
