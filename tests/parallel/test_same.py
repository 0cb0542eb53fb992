"""Two and four processes are one: loss and every gradient, for all ways of sharing and their combinations."""

from __future__ import annotations

import functools
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
PIECES = 2
"""Micro-batches of a pipeline; of some also one a row."""


def of_two(rows: dict[str, str]) -> dict[str, Case]:
    return {f"{name} {axis}": (name, {axis: 2}, PIECES) for name, axes in rows.items() for axis in axes.split()}


GROUPS: dict[str, tuple[int, dict[str, Case]]] = {
    "two": (2, of_two(TWO)),
    "two, pipelines": (2, {**of_two(PIPES), "mixtral row by row": ("mixtral", {"pipeline": 2}, 4)}),
    "two, adapters": (2, of_two(ADAPTERS)),
    "four": (
        4,
        {
            **{
                f"{name} {' x '.join(axes)}": (name, dict.fromkeys(axes, 2), PIECES)
                for name, pairs in FOUR.items()
                for axes in pairs
            },
            "llama tensor 4": ("llama", {"tensor": 4}, PIECES),
            "t5 context 4": ("t5", {"context": 4}, PIECES),
            "mixtral shard 4": ("mixtral", {"shard": 4}, PIECES),
            "gpt2 pipeline 4": ("gpt2-deep", {"pipeline": 4}, PIECES),
            "mixtral pipeline 4": ("mixtral-deep", {"pipeline": 4}, 4),
        },
    ),
}


def check(name: str, fields: dict[str, int], pieces: int, rank: int, folder: Path) -> None:
    compare(name, fields, pieces)


@pytest.mark.parametrize("group", GROUPS)
def test_ranks_are_one_process(group: str):
    world, cases = GROUPS[group]
    checks = {label: functools.partial(check, *case) for label, case in cases.items()}
    with ranks.folder() as folder:
        found = ranks.run(world, checks, Path(folder))
    assert found == {label: [""] * world for label in checks}, ranks.first(found)
