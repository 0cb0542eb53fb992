"""Pickles, which only `lamina fetch` reads, once, after their SHA-256 has been found right: torch's restricted reader
(weights_only), and plain tensors out of it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lamina.errors import CheckpointError
from lamina.weights.headers import Entry, shown
from lamina.weights.saving import write_safetensors


def to_safetensors(path: Path, target: Path) -> None:
    """Write the tensors of a pickle as a safetensors file. Raises CheckpointError for what is no plain tensor."""
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{path.name}: holds a {type(found).__name__}, not tensors by name")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise CheckpointError(f"{path.name}: {shown(str(name))} is no plain tensor")
        if value.is_quantized:
            raise CheckpointError(f"{path.name}: {shown(name)} is quantised; plain tensors are needed")
    plan = {name: Entry(name, value.dtype, tuple(value.shape)) for name, value in found.items()}
    write_safetensors(target, plan, lambda name: found[name].contiguous())
