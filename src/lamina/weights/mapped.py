"""Files that are mapped and not read, and headers that may lie: what the readers of binary formats share."""

from __future__ import annotations

import mmap
import platform
import stat
import struct
import sys
from pathlib import Path

import torch
from torch import Tensor

from lamina.errors import CheckpointError

# Pages that are never written to then need no room in memory or swap, so files may exceed both. Python names the flag
# from 3.13 on; this is its value on the common processors, and 0 does without it elsewhere.
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if platform.machine() in ("x86_64", "aarch64") else 0)
NORESERVE = NORESERVE if sys.platform == "linux" else 0


class Header:
    """Reads numbers from the front of a file, and never past its end."""

    def __init__(self, data: mmap.mmap, name: str) -> None:
        self.data, self.name, self.at = data, name, 0

    def refuse(self, found: str, right: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: {found}; {right}")

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def skip(self, length: int, what: str) -> int:
        """Go on behind `length` bytes that have to be there; returns where they begin."""
        if length > self.left:
            raise self.refuse(f"{what} needs {length:,} bytes at byte {self.at:,}, but the file has {self.left:,} left",
                              "it was cut short or is damaged: get it again")  # fmt: skip
        self.at += length
        return self.at - length

    def take(self, length: int, what: str) -> bytes:
        begin = self.skip(length, what)
        return self.data[begin : self.at]

    def number(self, pattern: str, what: str) -> int:
        return struct.unpack(pattern, self.take(struct.calcsize(pattern), what))[0]

    def text(self, data: bytes, what: str, kind: str) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.refuse(f"{what} is not UTF-8 ({error.reason} at its byte {error.start})",
                              f"text in {kind} files is UTF-8") from None  # fmt: skip


def open_map(path: Path, kind: str) -> mmap.mmap:
    """The file, mapped. Writing to what is mapped changes memory only, never the file.

    `kind` is what the file should be: "GGUF". Raises CheckpointError for what is empty, no file, or cannot be read.
    """
    try:
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise CheckpointError(f"{path}: not a file; a {kind} file is needed")
        with path.open("rb") as file:
            size = path.stat().st_size
            if size == 0:
                raise CheckpointError(f"{path.name}: an empty file; a {kind} file is needed")
            return map_privately(file.fileno(), size)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}; a readable {kind} file is needed") from error


def map_privately(number: int, size: int) -> mmap.mmap:
    """Private and writable, as torch wants its buffers, without reserving memory that is never written."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(number, size, access=mmap.ACCESS_COPY)
    flags = mmap.MAP_PRIVATE | NORESERVE
    return mmap.mmap(number, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def tensor_at(data: mmap.mmap, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A view of the bytes from `offset` on, or a copy where they do not begin at a multiple of the item's size."""
    count = dtype.itemsize
    for size in shape:
        count *= size
    if not count:
        return torch.empty(shape, dtype=dtype)
    raw = torch.frombuffer(data, dtype=torch.uint8, count=count, offset=offset)
    return (raw.clone() if offset % dtype.itemsize else raw).view(dtype).reshape(shape)


def show(name: str) -> str:
    """A name from a file, fit for one line of a terminal."""
    return ascii(name if len(name) <= 80 else name[:77] + "...")
