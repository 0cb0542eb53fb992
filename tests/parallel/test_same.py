"""Two and four processes are one: loss and every gradient, for all ways of sharing and their combinations."""

from __future__ import annotations

import functools
from math import prod
from pathlib import Path

import pytest

from tests.parallel import ranks
from tests.parallel.same import compare

Case = tuple[str, dict[str, int], int]
"""A model, how many ranks each axis has, and the micro-batches of a pipeline."""
TWO = {
    "gpt2": "replicate shard tensor context",
    "gpt2-odd": "tensor",
    "llama": "shard tensor context",
    "llama-mqa": "tensor",
    "t5": "shard tensor context",
    "bart": "tensor context",
    "mixtral": "shard tensor context expert",
    "mixtral-deep": "shard",
    "experts": "tensor expert",
    "product-keys": "shard tensor context",
    "memory-tokens": "tensor",
    "bert": "tensor context",
    "albert": "shard tensor context",
    "longformer": "tensor",
    "latent": "tensor context",
    "differential": "tensor context",
    "compressive": "tensor",
    "infini": "tensor",
    "recurrence": "tensor context",
    "memorizing": "tensor context",
    "qk-norm": "tensor context",
    "retro": "shard tensor",
    "alibi": "tensor context",
    "shaw": "tensor context",
    "transformer-xl": "tensor context",
}
PIPES = dict.fromkeys(("gpt2", "llama", "mixtral", "mixtral-deep", "experts", "bert", "alibi"), "pipeline")
ADAPTERS = {
    "gpt2 + adapter": "shard tensor context pipeline",
    "llama-mqa + adapter": "tensor",
    "mixtral + adapter": "tensor expert",
    "t5 + adapter": "tensor",
    "differential + adapter": "tensor",
}
FOUR = {
    "gpt2": [("replicate", "shard"), ("shard", "tensor"), ("replicate", "context"), ("shard", "pipeline")],
    "llama": [("tensor", "context"), ("shard", "context")],
    "t5": [("shard", "tensor"), ("tensor", "context")],
    "mixtral": [("shard", "expert"), ("tensor", "expert"), ("expert", "context"), ("replicate", "expert")],
    "experts": [("shard", "tensor"), ("tensor", "expert")],
    "differential": [("shard", "tensor")],
    "mixtral-deep": [("replicate", "pipeline")],
    "llama + adapter": [("shard", "tensor")],
}
MORE = {
    "mixtral row by row": ("mixtral", {"pipeline": 2}, 4),
    "llama tensor 4": ("llama", {"tensor": 4}, 2),
    "t5 context 4": ("t5", {"context": 4}, 2),
    "mixtral shard 4": ("mixtral", {"shard": 4}, 2),
    "gpt2 pipeline 4": ("gpt2-deep", {"pipeline": 4}, 2),
    "mixtral pipeline 4": ("mixtral-deep", {"pipeline": 4}, 4),
}


def cases() -> dict[str, Case]:
    """All of the above, with two micro-batches on a pipeline where nothing else is said."""
    pairs = [(name, (axis,)) for rows in (TWO, PIPES, ADAPTERS) for name in rows for axis in rows[name].split()]
    pairs += [(name, axes) for name, rows in FOUR.items() for axes in rows]
    found: dict[str, Case] = {f"{name} {' x '.join(axes)}": (name, dict.fromkeys(axes, 2), 2) for name, axes in pairs}
    assert len(found) == len(pairs)
    return found | MORE


def meshes() -> dict[str, dict[str, Case]]:
    """The cases of each mesh. They share a start of processes, and those of other meshes not: a group of ranks has a
    thread that wakes up a hundred times a second, and many of them slow everything down."""
    found: dict[str, dict[str, Case]] = {}
    for label, case in cases().items():
        mesh = " x ".join(f"{axis} {size}" for axis, size in case[1].items())
        found.setdefault(mesh, {})[label] = case
    return found


MESHES = meshes()


def check(name: str, fields: dict[str, int], pieces: int, rank: int, folder: Path) -> None:
    compare(name, fields, pieces)


@pytest.mark.parametrize("mesh", MESHES)
def test_ranks_are_one_process(mesh: str):
    checks = {label: functools.partial(check, *case) for label, case in MESHES[mesh].items()}
    world = prod(next(iter(MESHES[mesh].values()))[1].values())
    with ranks.folder() as folder:
        found = ranks.run(world, checks, Path(folder), again=True)
    assert found == {label: [""] * world for label in checks}, ranks.first(found)
