"""Nested values with tensors in them, such as the state of an optimiser: tensors by name, and the rest as JSON.

>>> tensors, rest = flatten({"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.95)}]})
>>> list(tensors)
['state.0.step']
>>> unflatten(tensors.__getitem__, rest)
{'state': {0: {'step': tensor(3.)}}, 'param_groups': [{'betas': (0.9, 0.95)}]}
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PLAIN = (str, bool, int, float, type(None))


def flatten(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a tree by their paths, and the tree without them, which JSON can say.

    What JSON lacks stands as a mapping of one entry: {"$tensor": name}, {"$tuple": [...]}, {"$float": "inf"}, and
    {"$items": [[key, value], ...]} for a mapping whose keys are not all text. Raises TypeError for any other value.
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            name = path
            while name in tensors:  # two paths that read the same: {"a.b": ..., "a": {"b": ...}}
                name += "'"
            tensors[name] = value.detach()
            return {"$tensor": name}
        below = f"{path}." if path else ""
        if isinstance(value, dict):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: plain(item, f"{below}{key}") for key, item in value.items()}
            return {"$items": [[plain(key, path), plain(item, f"{below}{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            items = [plain(item, f"{below}{place}") for place, item in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        if type(value) not in PLAIN:
            raise TypeError(f"{path or 'the tree'}: {type(value).__name__} is neither a tensor nor what JSON can say")
        return {"$float": repr(value)} if isinstance(value, float) and not math.isfinite(value) else value

    return tensors, plain(tree, "")


def unflatten(read: Callable[[str], Tensor], rest: Any) -> Any:
    """The tree again. Its tensors are copies, since what `read` gives may be views of a file."""
    if isinstance(rest, list):
        return [unflatten(read, item) for item in rest]
    if not isinstance(rest, dict):
        return rest
    if rest.keys() == {"$tensor"}:
        return torch.clone(read(rest["$tensor"]))
    if rest.keys() == {"$tuple"}:
        return tuple(unflatten(read, item) for item in rest["$tuple"])
    if rest.keys() == {"$float"}:
        return float(rest["$float"])
    if rest.keys() == {"$items"}:
        return {unflatten(read, key): unflatten(read, item) for key, item in rest["$items"]}
    return {key: unflatten(read, item) for key, item in rest.items()}
