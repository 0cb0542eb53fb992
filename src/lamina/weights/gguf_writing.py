"""Writing GGUF files, version 3 (ggml's docs/gguf.md): metadata, a table of tensors, then the tensors one at a time."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from lamina.durable import flush, locked, partial_name, reported, sync
from lamina.errors import CheckpointError
from lamina.weights.gguf import ARRAY, BOOL, MAGIC, STRING, by_name
from lamina.weights.gguf_blocks import LAYOUTS, pack
from lamina.weights.mapped import show

STEP = 32
"""Tensors begin at multiples of it: the default of the format."""
INT32, UINT32, FLOAT32 = 5, 4, 6


@dataclass(frozen=True)
class Stored:
    """A tensor as the file is to hold it."""

    shape: tuple[int, ...]  # outermost first, as in torch
    kind: str  # ggml's name of the type: F32, F16, BF16 or Q8_0

    @property
    def size(self) -> int:
        """In bytes."""
        layout = by_name(self.kind)
        return prod(self.shape) // layout.weights * layout.size


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, object],
    plan: Mapping[str, Stored],
    read: Callable[[str], Tensor],
    check: Callable[[Path], None] = lambda path: None,
) -> None:
    """Write a file, asking `read` for one tensor at a time. `check` sees it before it is put in place.

    The file appears whole or not at all; one that was there before stays until then, and stays if anything fails.
    Raises CheckpointError for a tensor that is not what the plan says, or that its type cannot hold.
    """
    target = Path(os.path.realpath(path))
    header = header_bytes(metadata, plan)
    needed = len(header) + sum(_whole(stored.size) for stored in plan.values())
    with reported(target, needed), locked(partial_name(target), directory=False) as (partial, lock):
        with open(lock, "wb", closefd=False) as file:
            file.write(header)
            for name, stored in plan.items():
                _write(file, name, stored, read(name).detach())
            flush(file)
        check(partial)
        os.replace(partial, target)
        sync(target.parent)


def header_bytes(metadata: Mapping[str, object], plan: Mapping[str, Stored]) -> bytes:
    """All that comes before the first tensor, with the padding."""
    parts = [MAGIC, struct.pack("<IQQ", 3, len(plan), len(metadata))]
    parts += [_text(key) + _value(key, value) for key, value in metadata.items()]
    kinds = {layout.name: kind for kind, layout in LAYOUTS.items()}
    offset = 0
    for name, stored in plan.items():
        dims = stored.shape[::-1]
        parts.append(_text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kinds[stored.kind], offset))
        offset += _whole(stored.size)
    header = b"".join(parts)
    return header + bytes(_whole(len(header)) - len(header))


def _write(file: BinaryIO, name: str, stored: Stored, tensor: Tensor) -> None:
    if tuple(tensor.shape) != stored.shape:
        raise CheckpointError(
            f"tensor {show(name)} was to be written as {list(stored.shape)}, and is {list(tensor.shape)}"
        )
    packed = pack(tensor.cpu(), stored.kind)
    if packed is None:
        raise CheckpointError(f"tensor {show(name)} has values that {stored.kind} cannot hold; choose another type")
    file.write(packed.numpy().data)
    file.write(bytes(_whole(stored.size) - stored.size))


def _whole(size: int) -> int:
    return -(-size // STEP) * STEP


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: object) -> bytes:
    if isinstance(value, list):
        if not value:
            raise CheckpointError(f"metadata {show(key)} is an empty list")
        if isinstance(value[0], str):
            return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
        kind, letter = (FLOAT32, "f") if isinstance(value[0], float) else (INT32, "i")
        return struct.pack(f"<IIQ{len(value)}{letter}", ARRAY, kind, len(value), *value)
    if isinstance(value, bool):
        return struct.pack("<IB", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    raise CheckpointError(f"metadata {show(key)} is a {type(value).__name__}; numbers, bools, texts and lists are kept")
