"""A tensor on disk that grows row by row: a safetensors file whose header, written first, says how many there will be.

Until the last row is there its size is not what its header says, so that no reader takes it for a whole file: the
header is checked by the one reader of safetensors before anything is mapped.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from lamina.errors import CheckpointError
from lamina.weights.files import SafetensorsFile
from lamina.weights.headers import Entry, header_bytes
from lamina.weights.saving import FORMAT


class Growing:
    """A file NAME.safetensors with one tensor NAME of `shape`, to which rows are appended."""

    def __init__(self, directory: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...], done: int = 0) -> None:
        """`done`: rows that are there already; what follows them is cut off. Raises CheckpointError for fewer."""
        self.path, self.entry = directory / f"{name}.safetensors", Entry(name, dtype, shape)
        head = header_bytes([self.entry], FORMAT)
        self.row = self.entry.nbytes // max(shape[0], 1)
        size = len(head) + done * self.row
        self.file = open(self.path, "r+b" if done else "w+b")  # noqa: SIM115
        if not done:
            self.file.write(head)
        if self.file.seek(0, os.SEEK_END) < size or (done and not self._begins(head)):
            self.file.close()
            raise CheckpointError(f"{self.path}: is not what its writer left; remove {directory} and build anew")
        self.file.truncate(size)
        self.file.seek(size)

    def _begins(self, head: bytes) -> bool:
        self.file.seek(0)
        return self.file.read(len(head)) == head

    def append(self, rows: Tensor) -> None:
        """Rows (n, ...) after those that are there."""
        assert rows.shape[1:] == self.entry.shape[1:]
        self.file.write(rows.detach().cpu().to(self.entry.dtype).contiguous().view(-1).view(torch.uint8).numpy().data)

    def sync(self) -> None:
        """Put what was appended on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def mapped(directory: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The whole tensor of a file, mapped. Raises CheckpointError where the file is damaged or holds another one."""
    file = SafetensorsFile(directory / f"{name}.safetensors")
    found = file.entries.get(name)
    if len(file.entries) != 1 or found is None or (found.dtype, found.shape) != (dtype, shape):
        holds = ", ".join(
            f"{e.name} {str(e.dtype).removeprefix('torch.')} {list(e.shape)}" for e in file.entries.values()
        )
        right = f"{name} {str(dtype).removeprefix('torch.')} {list(shape)}"
        raise CheckpointError(f"{file.path}: holds {holds[:200] or 'nothing'}; the manifest says {right}")
    return file.read(name)
