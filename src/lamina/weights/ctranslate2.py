"""CTranslate2's model.bin, binary versions 4 to 6 (its python/ctranslate2/specs/model_spec.py, `_serialize`).

Layout: version; name and revision of a specification; a count of variables, each with name, rank, sizes, type, bytes
and data; a count of aliases, each with its name and that of the variable it stands for. The data lie between the
names, so the whole file is walked through, and none of it is copied: a variable is one entry, its data stay in place.
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
from lamina.weights.mapped import Header, open_map, show, tensor_at

MODEL_BIN = "model.bin"
VERSIONS = range(4, 7)
LARGEST = 1 << 17  # variables, and aliases; Whisper's largest has 1,300
RANK = 4  # dimensions of a variable; a convolution of images would have 4
DTYPES = {
    0: torch.float32,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.float16,
    5: torch.bfloat16,
}


@dataclass(frozen=True, kw_only=True)
class Variable:
    """A tensor of the file, or a single number of the specification (shape ()), before it is read."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of the first byte in the file


class CTranslate2File:
    """A model.bin, open for reading: `spec`, `revision`, `entries`, `aliases`, `read(name)`.

    `entries` has the aliases too, each with what it stands for. Tensors are views of the mapped file where they begin
    at a multiple of their item's size, else copies; those of an alias are copies, so that two parameters of a model
    are never one piece of memory. Views stay good after `close()`, and writing into one never changes the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.map: mmap.mmap | None = None
        header = Names(open_map(self.path, "CTranslate2"), self.path.name)
        self.version = header.version()
        self.spec = header.string("the name of the specification")
        self.revision = header.number("<I", "the revision of the specification")
        self.entries: dict[str, Variable] = header.variables()
        self.aliases: dict[str, str] = header.aliases(self.entries)
        if header.left:
            raise header.refuse(f"{header.left:,} bytes follow the last alias", "it is damaged: get it again")
        self.entries |= {alias: self.entries[name] for alias, name in self.aliases.items()}
        self.map = header.data

    def read(self, name: str) -> Tensor:
        """The tensor `name`, of the dtype that is stored."""
        if name not in self.entries:
            raise CheckpointError(f"{self.path.name}: no variable {show(name)}; it has {len(self.entries)}")
        if self.map is None:
            raise CheckpointError(f"{self.path.name}: closed; open it again to read {show(name)}")
        entry = self.entries[name]
        tensor = tensor_at(self.map, entry.offset, entry.dtype, entry.shape)
        return tensor.clone() if name in self.aliases else tensor

    def close(self) -> None:
        """Let go of the map. It is never unmapped by force: a tensor may still look at it."""
        self.map = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Names(Header):
    """Reads names and variables."""

    def version(self) -> int:
        if self.left < 4 or (version := self.number("<I", "the version")) > 255:
            start = ascii(bytes(self.data[:4]))[1:]
            raise self.refuse(f"starts with {start}", "a CTranslate2 file starts with a version of 4 to 6, in 4 bytes")
        if version not in VERSIONS:
            older = (
                "its variables do not say their types: convert the model again" if version < 4 else "4 to 6 are read"
            )
            raise self.refuse(f"CTranslate2 binary version {version}", older)
        return version

    def string(self, what: str) -> str:
        """A string of at most 65,534 bytes, which ends in a zero."""
        length = self.number("<H", f"the length of {what}")
        data = self.take(length, what)
        if length < 2 or data.find(0) != length - 1:
            raise self.refuse(
                f"{what} has {length} bytes and no zero at the end alone", "names are not empty, and end in a zero"
            )
        return self.text(data[:-1], what, "CTranslate2")

    def count(self, what: str, least: int) -> int:
        """A number of things, of which each takes at least so many bytes."""
        count = self.number("<I", f"the number of {what}")
        if count * least > self.left:
            raise self.refuse(
                f"claims {count:,} {what} in {self.left:,} bytes", "it is cut short or damaged: get it again"
            )
        if count > LARGEST:
            raise self.refuse(f"claims {count:,} {what}", f"the most is {LARGEST:,}")
        return count

    def variables(self) -> dict[str, Variable]:
        found: dict[str, Variable] = {}
        for i in range(self.count("variables", 11)):  # a name of one letter, and one byte of data
            entry = self.variable(f"variable {i}")
            if entry.name in found:
                raise self.refuse(f"variable {show(entry.name)} is there twice", "each stands once")
            found[entry.name] = entry
        return found

    def variable(self, what: str) -> Variable:
        name = self.string(f"the name of {what}")
        rank = self.number("<B", f"the rank of {show(name)}")
        if rank > RANK:
            raise self.refuse(f"variable {show(name)} has {rank} dimensions", f"it has 0 to {RANK}")
        shape = struct.unpack(f"<{rank}I", self.take(4 * rank, f"the shape of {show(name)}"))
        kind = self.number("<B", f"the type of {show(name)}")
        if kind not in DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())
            raise self.refuse(f"variable {show(name)} is of type {kind}", f"types are 0 to {len(DTYPES) - 1}: {known}")
        dtype, size = DTYPES[kind], self.number("<I", f"the bytes of {show(name)}")
        if 0 in shape or prod(shape) * dtype.itemsize != size:
            raise self.refuse(
                f"variable {show(name)} has shape {shape} in {size:,} bytes",
                f"sizes are positive, and {str(dtype).removeprefix('torch.')} takes {dtype.itemsize} bytes a number",
            )
        return Variable(name=name, dtype=dtype, shape=shape, offset=self.skip(size, f"variable {show(name)}"))

    def aliases(self, entries: dict[str, Variable]) -> dict[str, str]:
        """Name -> the variable that it stands for. One that stands for another alias has to come after it."""
        found: dict[str, str] = {}
        for i in range(self.count("aliases", 8)):
            alias, name = self.string(f"the name of alias {i}"), self.string(f"what alias {i} stands for")
            if alias in entries or alias in found:
                raise self.refuse(f"alias {show(alias)} has the name of another variable", "each name stands once")
            if name not in entries and name not in found:
                raise self.refuse(
                    f"alias {show(alias)} stands for {show(name)}", "no variable or alias before it is called so"
                )
            found[alias] = found.get(name, name)
        return found


def is_ctranslate2(path: Path) -> bool:
    """Whether a .bin file begins as CTranslate2's do: a version in 4 bytes, and the length of a name in 2.

    A pickle and a zip archive begin with a large number, and a short safetensors file has a length of 0 there.
    """
    if path.suffix != ".bin" or not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(6)
    return len(start) == 6 and 0 < int.from_bytes(start[:4], "little") < 256 and start[4:] != bytes(2)
