"""The residual stream: which weights of a step write to it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lamina.layers import ChunkedCrossAttentionSpec, ExpertsSpec, SumSpec
from lamina.specs import Spec

RESIDUAL = ("in", "experts.in")
"""The roles that layers declare in `SHARD` for what ends in the residual stream."""


def writers(op: Spec, width: int) -> tuple[str, ...]:
    """The modules below `op`, by name, whose results, weighed and added up, are its own: "o" of attention, "down" of a
    feed-forward network. Nothing where one of its parts has none: the table of product keys is no matrix."""
    if isinstance(op, SumSpec):
        parts = [(f"branches.{branch.name}.op", branch.op) for branch in op.branches]
    elif isinstance(op, ExpertsSpec):
        parts = [("experts", op.expert), *([] if op.shared is None else [("shared", op.shared)])]
    elif isinstance(op, ChunkedCrossAttentionSpec):
        parts = [("attention", op.attention)]
    else:
        return tuple(_own(op, width))
    found = [(path, writers(part, width)) for path, part in parts]
    if not all(names for _, names in found):
        return ()
    return tuple(f"{path}.{name}" for path, names in found for name in names)


def _own(op: Spec, width: int) -> Iterator[str]:
    with torch.device("meta"):
        module = op.build(width)  # pyright: ignore[reportAttributeAccessIssue]
    for name, role in getattr(module, "SHARD", {}).items():
        if role in RESIDUAL:
            yield name
