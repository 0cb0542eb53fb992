"""Two and four processes are one: loss and every gradient, for all ways of sharing and their combinations."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.parallel import ranks
from tests.parallel.same import compare

TWO = {
    "gpt2": "replicate shard tensor context",
    "gpt2-odd": "tensor",
    "llama": "shard tensor context",
    "llama-mqa": "tensor",
    "t5": "shard tensor context",
    "bart": "tensor context",
    "mixtral": "shard tensor context expert",
    "experts": "tensor expert",
    "bert": "tensor context",
    "albert": "shard tensor context",
    "longformer": "tensor",
    "latent": "tensor context",
    "differential": "tensor context",
    "qk-norm": "tensor context",
    "retro": "shard tensor",
    "alibi": "tensor context",
    "shaw": "tensor context",
    "transformer-xl": "tensor context",
}
FOUR = {
    "gpt2": [("replicate", "shard"), ("shard", "tensor"), ("replicate", "context")],
    "llama": [("tensor", "context"), ("shard", "context")],
    "t5": [("shard", "tensor"), ("tensor", "context")],
    "mixtral": [("shard", "expert"), ("tensor", "expert"), ("expert", "context"), ("replicate", "expert")],
    "experts": [("shard", "tensor"), ("tensor", "expert")],
    "differential": [("shard", "tensor")],
}
WORLDS = {
    2: {f"{name} {axis}": (name, {axis: 2}) for name, axes in TWO.items() for axis in axes.split()},
    4: {
        **{
            f"{name} {' x '.join(axes)}": (name, dict.fromkeys(axes, 2))
            for name, pairs in FOUR.items()
            for axes in pairs
        },
        "llama tensor 4": ("llama", {"tensor": 4}),
        "t5 context 4": ("t5", {"context": 4}),
        "mixtral shard 4": ("mixtral", {"shard": 4}),
    },
}


def check(name: str, fields: dict[str, int], rank: int, folder: Path) -> None:
    compare(name, fields)


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_are_one_process(world: int):
    checks = {label: functools.partial(check, *case) for label, case in WORLDS[world].items()}
    with ranks.folder() as folder:
        found = ranks.run(world, checks, Path(folder))
    assert found == {label: [""] * world for label in checks}, ranks.first(found)
