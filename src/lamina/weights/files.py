"""Checkpoints on disk: one safetensors file, or a directory in the layout of Hugging Face, read without copying.

>>> checkpoint = Checkpoint("SmolLM2-135M")
>>> checkpoint.entries["model.norm.weight"]
Entry(name='model.norm.weight', dtype=torch.bfloat16, shape=(576,))
>>> checkpoint.read("model.norm.weight")     # a view of the file: its bytes are read when they are looked at
"""

import difflib
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamina.errors import CheckpointError
from lamina.weights.headers import Entry, listed, read_header, shown, strict_json
from lamina.weights.mapped import map_privately, tensor_at
from lamina.weights.saving import save_checkpoint, write_safetensors

__all__ = ["Checkpoint", "Entry", "SafetensorsFile", "read_json", "save_checkpoint", "write_safetensors"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LONG = 100_000_000  # bytes that an index may have
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLE_REMEDY = (
    "a pickle can run code when it is read, so only safetensors are read: look for a revision of the model with "
    "safetensors, or convert it with transformers (from_pretrained, then save_pretrained) where it is trusted"
)


def read_json(path: str | os.PathLike[str], limit: int = 16_000_000, kind: type = dict) -> Any:
    """A JSON object, or another `kind` of value, from a file of at most `limit` bytes.

    Duplicate keys, NaN and infinities are refused.
    """
    try:
        with open(_regular(path), "rb") as file:
            raw = file.read(limit + 1)
        if len(raw) > limit:
            raise CheckpointError(f"has {os.path.getsize(path):,} bytes, and {limit:,} are allowed")
        return strict_json(raw, kind)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _regular(path: str | os.PathLike[str]) -> Path:
    """The path, if it is a plain file: opening a pipe would wait for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise CheckpointError("is not a file")
    return Path(path)


class SafetensorsFile:
    """One safetensors file. Its header is checked when it is opened; its tensors are views of the mapped file.

    The mapping is private: writing to a tensor changes memory, never the file. Tensors stay valid when the file is
    deleted or replaced by another. A tensor that does not begin at a multiple of its item size is copied.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            with open(_regular(path), "rb") as file:
                header = read_header(file, os.fstat(file.fileno()).st_size)
                self._mapping = map_privately(file.fileno(), 0)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from None
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        self.entries = header.entries
        self.metadata = header.metadata
        self._offsets = header.offsets

    def read(self, name: str) -> Tensor:
        entry = _found(name, self.entries, self.path)
        tensor = tensor_at(self._mapping, self._offsets[name], entry.dtype, entry.shape)
        if entry.dtype == torch.bool and entry.nbytes and int(tensor.view(torch.uint8).max()) > 1:
            raise CheckpointError(f"{self.path}: tensor {shown(name)} is BOOL and holds bytes other than 0 and 1")
        return tensor


class Checkpoint:
    """A safetensors file, or a directory with `model.safetensors` or with shards and their index.

    `files` are the files that hold the weights; `shards` the same, opened, by name; `ignored` names what else in the
    directory could be taken for weights. Where a directory holds both kinds, `model.safetensors` is read and the
    index ignored, as transformers does.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.exists():
            raise CheckpointError(f"{path}: no such file or directory")
        if self.path.suffix in PICKLES and self.path.is_file():
            raise CheckpointError(f"{path}: is a pickle by its name; {PICKLE_REMEDY}")
        if self.path.is_dir():
            self.shards = _open_directory(self.path)
            weights = {name for name in os.listdir(path) if Path(name).suffix in (*PICKLES, ".safetensors", ".gguf")}
            self.ignored = tuple(sorted(weights - self.shards.keys()))
        else:
            self.shards = {self.path.name: SafetensorsFile(self.path)}
            self.ignored = ()
        self.files = tuple(shard.path for shard in self.shards.values())
        self.entries = {name: entry for shard in self.shards.values() for name, entry in shard.entries.items()}
        sharded = self.path.is_dir() and SINGLE not in self.shards
        said = read_json(self.path / INDEX, limit=LONG).get("metadata") if sharded else None
        self.index: dict[str, Any] | None = said if isinstance(said, dict) else None  # what it says beside the places
        self.metadata: dict[str, str] = {}
        for shard in self.shards.values():  # shards agree, as a rule; if not, the first one that says a thing counts
            self.metadata = shard.metadata | self.metadata
        self._homes = {name: shard for shard in self.shards.values() for name in shard.entries}

    def read(self, name: str) -> Tensor:
        _found(name, self.entries, self.path)
        return self._homes[name].read(name)


def _found(name: str, entries: dict[str, Entry], path: Path) -> Entry:
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=3)
        hint = f"; the nearest are {listed(near)}" if near else ""
        raise CheckpointError(f"{path}: holds no tensor {shown(name)}{hint}")
    return entries[name]


def _open_directory(directory: Path) -> dict[str, SafetensorsFile]:
    if (directory / SINGLE).is_file():
        return {SINGLE: SafetensorsFile(directory / SINGLE)}
    if (directory / INDEX).is_file():
        return _open_shards(directory)
    names = sorted(os.listdir(directory))
    safetensors = [name for name in names if name.endswith(".safetensors")]
    if any(SHARD.fullmatch(name) for name in safetensors):
        raise CheckpointError(f"{directory}: holds shards ({listed(safetensors)}) but not their index, {INDEX}")
    if safetensors:
        raise CheckpointError(f"{directory}: holds no {SINGLE}; name the file itself: {directory / safetensors[0]}")
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        raise CheckpointError(f"{directory}: holds no {SINGLE}; name the file itself: {directory / ggufs[0]}")
    if pickles := [name for name in names if Path(name).suffix in PICKLES]:
        raise CheckpointError(f"{directory}: holds its weights as pickles only ({listed(pickles)}); {PICKLE_REMEDY}")
    raise CheckpointError(f"{directory}: holds no weights: neither {SINGLE} nor {INDEX}")


def _open_shards(directory: Path) -> dict[str, SafetensorsFile]:
    """Every shard that the index names, after checking that index and shards tell the same story."""
    index = directory / INDEX
    homes = read_json(index, limit=LONG).get("weight_map")
    if not isinstance(homes, dict) or not homes or not all(isinstance(home, str) for home in homes.values()):
        raise CheckpointError(f"{index}: `weight_map` must map names of tensors to names of files")
    names = sorted(set(homes.values()))
    for name in names:
        _refuse_outside(directory, name, index)
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise CheckpointError(f"{index}: names shards that are missing: {listed(missing)}")
    if stray := [name for name in os.listdir(directory) if SHARD.fullmatch(name) and name not in names]:
        raise CheckpointError(f"{index}: does not name shards that are in the directory: {listed(stray)}")
    shards = {name: SafetensorsFile(directory / name) for name in names}
    promised = {name: {tensor for tensor, home in homes.items() if home == name} for name in names}
    for name, shard in shards.items():
        if absent := promised[name] - shard.entries.keys():
            first = min(absent)
            real = [other for other in names if first in shards[other].entries]
            where = f"it is in {listed(real)}" if real else "it is in none"
            raise CheckpointError(
                f"{index}: says that {name} holds {listed(absent)}; {shown(first)} is not there: {where}"
            )
    for name, shard in shards.items():
        if extra := shard.entries.keys() - promised[name]:
            raise CheckpointError(f"{index}: does not place in {name} what that file holds: {listed(extra)}")
    return shards


def _refuse_outside(directory: Path, name: str, index: Path) -> None:
    """An index may only name plain files inside the directory; the blobs of the hub's cache count as inside."""
    plain = re.fullmatch(r"[^/\\:\x00-\x1f\x7f]+\.safetensors", name)
    if not plain or name.startswith("."):
        raise CheckpointError(f"{index}: names {shown(name)}, and may only name .safetensors files beside itself")
    home, real = directory.resolve(), (directory / name).resolve()
    inside: Iterable[Path] = (home, home.parent.parent / "blobs") if home.parent.name == "snapshots" else (home,)
    if real.parent not in inside:
        raise CheckpointError(f"{index}: names {shown(name)}, which is a link out of the directory, to {real}")
