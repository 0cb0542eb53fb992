"""GGUF files, versions 2 and 3 (ggml's docs/gguf.md): every claim of a header is checked against the file's size.

Layout: magic, version, the counts of tensors and of metadata pairs, the pairs, a table of tensors, padding, the data.
Each number is read from a file that may lie, so a length is compared with the bytes that are left before anything is
allocated.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from lamina.errors import CheckpointError
from lamina.weights.gguf_blocks import LAYOUTS, UNREAD, Layout, dequantize
from lamina.weights.mapped import Header, open_map, show, tensor_at

MAGIC = b"GGUF"
ELEMENTS = (
    1 << 22
)  # values in all metadata arrays of a file; a vocabulary of 262,144 with scores and merges has 1.4 million
NAME = 1 << 16  # bytes of a key or of a tensor's name
TEXT = 1 << 26  # bytes of one metadata string
SCALARS = {
    0: ("uint8", "<B"), 1: ("int8", "<b"), 2: ("uint16", "<H"), 3: ("int16", "<h"), 4: ("uint32", "<I"),
    5: ("int32", "<i"), 6: ("float32", "<f"), 7: ("bool", "<B"), 10: ("uint64", "<Q"), 11: ("int64", "<q"),
    12: ("float64", "<d"),
}  # fmt: skip
BOOL, STRING, ARRAY = 7, 8, 9


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor of the file, before it is read."""

    name: str
    dtype: torch.dtype  # of what `read` gives
    shape: tuple[int, ...]  # outermost first, as in torch; the file has it the other way round
    stored: str  # ggml's name of the type in the file: "Q4_K"
    offset: int  # of the first byte in the file
    size: int  # in bytes


class Metadata(Header):
    """Reads the values of metadata too."""

    def __init__(self, data: mmap.mmap, name: str):
        super().__init__(data, name)
        self.elements = 0  # of arrays, so far

    def scalar(self, kind: int, what: str) -> int | float | bool:
        name, pattern = SCALARS[kind]
        value = struct.unpack(pattern, self.take(struct.calcsize(pattern), what))[0]
        if kind == BOOL and value > 1:
            raise self.refuse(f"{what} is the byte {value}, stored as {name}", "a bool is 0 or 1")
        return bool(value) if kind == BOOL else value

    def string(self, what: str, limit: int = TEXT) -> str:
        length = self.number("<Q", f"the length of {what}")
        if length > limit:
            raise self.refuse(f"{what} claims {length:,} bytes", f"the most is {limit:,}")
        return self.text(self.take(length, what), what, "GGUF")

    def value(self, key: str) -> object:
        kind = self.number("<I", f"the type of {show(key)}")
        if kind == STRING:
            return self.string(show(key))
        if kind == ARRAY:
            return self.array(key)
        if kind not in SCALARS:
            raise self.refuse(f"metadata {show(key)} is of type {kind}", "types are 0 to 12")
        return self.scalar(kind, show(key))

    def array(self, key: str) -> list:
        kind = self.number("<I", f"the type of {show(key)}")
        if kind != STRING and kind not in SCALARS:
            wrong = "arrays" if kind == ARRAY else f"type {kind}"
            raise self.refuse(f"metadata {show(key)} is an array of {wrong}", "arrays hold numbers, bools or strings")
        count = self.number("<Q", f"the length of {show(key)}")
        least = 8 if kind == STRING else struct.calcsize(SCALARS[kind][1])
        if count * least > self.left:
            found = f"metadata {show(key)} claims {count:,} elements, but the file has {self.left:,} bytes left"
            raise self.refuse(found, "it was cut short or is damaged: get it again")
        self.elements += count
        if self.elements > ELEMENTS:
            raise self.refuse(
                f"its metadata arrays hold {self.elements:,} elements by {show(key)}", f"the most is {ELEMENTS:,}"
            )
        if kind == STRING:
            return [self.string(f"{show(key)}[{i}]") for i in range(count)]
        pattern = SCALARS[kind][1]
        values = struct.unpack(f"<{count}{pattern[1]}", self.take(count * least, show(key)))
        if kind == BOOL and any(value > 1 for value in values):
            raise self.refuse(f"metadata {show(key)} holds a bool that is neither 0 nor 1", "a bool is 0 or 1")
        return [bool(value) for value in values] if kind == BOOL else list(values)


class GGUFFile:
    """A GGUF file, open for reading: `metadata`, `entries`, `read(name)`. A context manager.

    Tensors of plain numbers are views of the mapped file, without a copy; they stay good after `close()`, because the
    map lives as long as the last of them. Writing into one changes memory only, never the file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.map: mmap.mmap | None = None
        header = Metadata(open_map(self.path, "GGUF"), self.path.name)
        check_magic(header)
        tensors, pairs = (
            header.number("<Q", "the number of tensors"),
            header.number("<Q", "the number of metadata pairs"),
        )
        # The shortest tensor record has 8 + 4 + 8 + 4 + 8 bytes, the shortest pair 8 + 4 + 1.
        for count, least, what in ((tensors, 32, "tensors"), (pairs, 13, "metadata pairs")):
            if count * least > header.left:
                raise header.refuse(
                    f"claims {count:,} {what} in {header.left:,} bytes", "it is cut short or damaged: get it again"
                )
        self.metadata: dict[str, object] = read_metadata(header, pairs)
        self.entries: dict[str, Entry] = read_entries(header, tensors, alignment(header, self.metadata))
        self.map = header.data

    def read(self, name: str) -> Tensor:
        """The tensor `name`: a view of the file where it holds plain numbers, else unpacked to float32."""
        if name not in self.entries:
            raise CheckpointError(
                f"{self.path.name}: no tensor {show(name)}; it has {len(self.entries)}, see `entries`"
            )
        if self.map is None:
            raise CheckpointError(f"{self.path.name}: closed; open it again to read {show(name)}")
        entry = self.entries[name]
        layout = by_name(entry.stored)
        if layout.unpack is None:
            return tensor_at(self.map, entry.offset, layout.dtype, entry.shape)
        data = torch.frombuffer(self.map, dtype=torch.uint8, count=entry.size, offset=entry.offset)
        return dequantize(data, layout).view(entry.shape)

    def close(self) -> None:
        """Let go of the map. It is never unmapped by force: a tensor may still look at it."""
        self.map = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def by_name(stored: str) -> Layout:
    return next(layout for layout in LAYOUTS.values() if layout.name == stored)


def check_magic(header: Metadata) -> None:
    magic = header.take(min(4, header.left), "the magic")
    if magic != MAGIC:
        raise header.refuse(f"starts with {ascii(magic)[1:]}", "a GGUF file starts with the letters GGUF")
    version = header.number("<I", "the version")
    if version in (2, 3):
        return
    if version & 0xFFFF == 0 and version:
        raise header.refuse("its numbers are big-endian", "only little-endian files are read")
    raise header.refuse(f"GGUF version {version}", "versions 2 and 3 are read")


def read_metadata(header: Metadata, pairs: int) -> dict[str, object]:
    metadata: dict[str, object] = {}
    for i in range(pairs):
        key = header.string(f"the name of metadata pair {i}", NAME)
        if not key:
            raise header.refuse(f"metadata pair {i} has no name", "it is damaged: get it again")
        if key in metadata:
            raise header.refuse(f"metadata {show(key)} is there twice", "each key stands once")
        metadata[key] = header.value(key)
    return metadata


def alignment(header: Metadata, metadata: dict[str, object]) -> int:
    value = metadata.get("general.alignment", 32)
    if not isinstance(value, int) or isinstance(value, bool) or value < 8 or value & (value - 1):
        raise header.refuse(f"general.alignment is {value!r}", "it is a power of two from 8 up")
    return value


def read_entries(header: Metadata, tensors: int, step: int) -> dict[str, Entry]:
    records = {}
    for i in range(tensors):
        name, record = read_record(header, i)
        if name in records:
            raise header.refuse(f"tensor {show(name)} is there twice", "each tensor stands once")
        records[name] = record
    start = -(-header.at // step) * step  # data begin at the next multiple
    entries = {}
    for name, (shape, layout, offset) in records.items():
        size = prod(shape) // layout.weights * layout.size
        if offset % step:
            raise header.refuse(f"tensor {show(name)} begins at {offset:,}", f"offsets are multiples of {step}")
        if start + offset + size > len(header.data):
            raise header.refuse(
                f"tensor {show(name)} ends at byte {start + offset + size:,}, but the file has {len(header.data):,}",
                "it was cut short or is damaged: get it again",
            )
        entries[name] = Entry(
            name=name, dtype=layout.dtype, shape=shape, stored=layout.name, offset=start + offset, size=size
        )
    last = None
    for entry in sorted(entries.values(), key=lambda entry: entry.offset):
        if last is not None and last.offset + last.size > entry.offset:
            raise header.refuse(f"tensors {show(last.name)} and {show(entry.name)} overlap", "each has its own bytes")
        last = entry
    return entries


def read_record(header: Metadata, i: int) -> tuple[str, tuple[tuple[int, ...], Layout, int]]:
    name = header.string(f"the name of tensor {i}", NAME)
    count = header.number("<I", f"the dimensions of {show(name)}")
    if not 1 <= count <= 4:
        raise header.refuse(f"tensor {show(name)} has {count:,} dimensions", "it has 1 to 4")
    dims = struct.unpack(f"<{count}Q", header.take(8 * count, f"the shape of {show(name)}"))
    if min(dims) < 1 or prod(dims) >= 1 << 63:
        raise header.refuse(
            f"tensor {show(name)} has shape {dims[::-1]}", "sizes are positive and their product below 2^63"
        )
    kind = header.number("<I", f"the type of {show(name)}")
    if kind not in LAYOUTS:
        known = ", ".join(layout.name for layout in LAYOUTS.values())
        raise header.refuse(
            f"tensor {show(name)} is stored as {UNREAD.get(kind, f'type {kind}')}", f"lamina reads {known}"
        )
    layout = LAYOUTS[kind]
    if dims[0] % layout.weights:
        raise header.refuse(
            f"tensor {show(name)} has rows of {dims[0]:,}", f"{layout.name} needs a multiple of {layout.weights}"
        )
    return name, (dims[::-1], layout, header.number("<Q", f"the offset of {show(name)}"))
