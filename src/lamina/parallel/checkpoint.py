"""Model and optimiser on disk in parts, one file a rank, read again by any other number of ranks
(torch.distributed.checkpoint).

The directory's `.metadata` is a pickle. It is read by an unpickler that knows a handful of classes and no more, and a
checkpoint of ours holds tensors alone, so that nothing in it is ever run.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from lamina.errors import CheckpointError, StorageError
from lamina.model import Model
from lamina.parallel.mesh import Mesh
from lamina.parallel.state import agree

METADATA = "torch.distributed.checkpoint.metadata"
ALLOWED = {
    *((METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((METADATA, name) for name in ("TensorStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
}
"""What `.metadata` is made of, beside dtypes. Not among it: BytesStorageMetadata, whose bytes torch would unpickle."""

METADATA_FILE = ".metadata"
PART = re.compile(r"__\d+_\d+\.distcp")
LIMIT = 1_000_000_000
"""Bytes of a `.metadata` that is read."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
        if (module, name) in ALLOWED or isinstance(found, torch.dtype):
            return super().find_class(module, name)
        raise CheckpointError(f"asks for {module}.{name}, which has no place in a checkpoint; nothing was run")


class _Writer(FileSystemWriter):
    """torch's writer, which would write down where the directory lay on this machine."""

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(save_id=self.save_id)


class _Reader(FileSystemReader):
    """torch's reader, with `.metadata` read as said above and files named in it within the directory only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(os.fspath(self.path)) / METADATA_FILE
        metadata = read_metadata(path)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_metadata(path: Path) -> Metadata:
    """`.metadata`, checked. Raises CheckpointError for what is not one, and runs nothing of it."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: holds no {METADATA_FILE}, which is written last: it was never finished")
    if path.stat().st_size > LIMIT:
        raise CheckpointError(f"{path}: is larger than {LIMIT:,} bytes")
    try:
        with open(path, "rb") as file:
            metadata = _Unpickler(file).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, ImportError, IndexError) as error:
        raise CheckpointError(f"{path}: is not the metadata of a checkpoint: {error}") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{path}: is not the metadata of a checkpoint")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{path}: {str(name)[:100]} is not a tensor")
    for place in metadata.storage_data.values():
        where = str(getattr(place, "relative_path", None))
        if not PART.fullmatch(where) or getattr(place, "transform_descriptors", None):
            raise CheckpointError(
                f"{path}: names the file {where[:100]!r}; files of a checkpoint are like __0_0.distcp"
            )
    return metadata


def save_parts(
    directory: str | os.PathLike[str],
    model: Model,
    optimizer: torch.optim.Optimizer | None = None,
    more: Mapping[str, Tensor] | None = None,
) -> None:
    """Write each rank's part of the model, of the optimiser's state, and of `more` tensors. All ranks must call it.

    `directory` must be new, or empty: a checkpoint that is written over another one is none if it is interrupted.
    `.metadata` is written last, so what was never finished is known as such.
    """
    target, mesh = Path(directory), model.mesh

    def check() -> None:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise CheckpointError(f"{target}: exists and is not empty; name another directory")

    agree(mesh, check)
    state = _state(model, optimizer) | {f"more.{name}": tensor for name, tensor in (more or {}).items()}
    write_tensors(target, state, mesh)


def load_parts(
    directory: str | os.PathLike[str], model: Model, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Tensor]:
    """Fill the model, and the optimiser's state, from `save_parts` by any mesh; returns what was given as `more`.

    Each rank reads what it needs. An optimiser that has not stepped gets its state as the checkpoint has it. Raises
    CheckpointError, before anything is changed, for a damaged or foreign directory, and for names, shapes or dtypes
    that are not those of the model.
    """
    target = Path(directory)
    metadata = read_metadata(target / METADATA_FILE)
    entries: dict[str, Any] = metadata.state_dict_metadata
    if optimizer is not None:
        _prepare(model, optimizer, entries)
    state = _state(model, optimizer)
    more = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items() if _more(name)
    }
    _fits(target, state | more, entries)
    if stray := [name for name in entries if name.startswith("model.") and name not in state]:
        raise CheckpointError(f"{target}: holds {stray[0]}, and the model has none of that name")
    read_tensors(target, state | more, model.mesh)
    return {name.removeprefix("more."): tensor for name, tensor in more.items()}


def write_tensors(directory: Path, tensors: Mapping[str, Tensor], mesh: Mesh | None) -> None:
    """Write each rank's part of these tensors; all ranks must call it, or one process without a mesh. What lies on
    other ranks alone, on "meta", is theirs to write. Raises StorageError where a rank could not."""
    here = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}
    try:
        with _alone():
            save(here, storage_writer=_Writer(directory, sync_files=True), **_over(mesh))
    except (CheckpointException, OSError) as error:
        raise StorageError(f"{directory}: cannot be written: {_first(error)}") from error


def read_tensors(directory: Path, tensors: Mapping[str, Tensor], mesh: Mesh | None) -> None:
    """Fill these tensors, or this rank's part of each, by name; those on "meta" are left out. All ranks must call it.

    Raises CheckpointError, before anything is changed, for a damaged or foreign directory, and for names, shapes or
    dtypes that it does not have.
    """
    _fits(directory, tensors, read_metadata(directory / METADATA_FILE).state_dict_metadata)
    here = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}
    try:
        with _alone():
            load(here, storage_reader=_Reader(directory), **_over(mesh))
    except (CheckpointException, RuntimeError, OSError) as error:
        raise CheckpointError(f"{directory}: cannot be read: {_first(error)}") from error


@contextmanager
def _alone() -> Iterator[None]:
    """One process by itself is meant to be so, of which torch warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _over(mesh: Mesh | None) -> dict[str, Any]:
    return {"no_dist": True} if mesh is None else {"process_group": mesh.control}


def _more(name: str) -> bool:
    return name.startswith("more.")


def _first(error: BaseException) -> str:
    """The reason in one line: that of the first rank that failed."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _state(model: Model, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    model.mesh.reshard(model)
    state: dict[str, Any] = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, Tensor):
                    raise CheckpointError(f"the optimiser keeps {key} of {name} as a {type(value).__name__}, no tensor")
                state[f"optimizer.{name}.{key}"] = value
    return state


def _prepare(model: Model, optimizer: torch.optim.Optimizer, entries: Mapping[str, Any]) -> None:
    """Give an optimiser that has not stepped the tensors that will be filled."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        if id(parameter) not in held or optimizer.state.get(parameter):
            continue
        for key, entry in entries.items():
            if key.startswith(prefix) and "." not in key[len(prefix) :]:
                like = tuple(entry.size) == tuple(parameter.shape)
                dtype = entry.properties.dtype
                made = (
                    torch.zeros_like(parameter.detach(), dtype=dtype) if like else torch.zeros(entry.size, dtype=dtype)
                )
                optimizer.state[parameter][key[len(prefix) :]] = made


def _fits(target: Path, state: Mapping[str, Tensor], entries: Mapping[str, Any]) -> None:
    for name, tensor in state.items():
        entry = entries.get(name)
        if entry is None:
            raise CheckpointError(f"{target}: lacks {name}")
        if tuple(entry.size) != tuple(tensor.shape) or entry.properties.dtype != tensor.dtype:
            raise CheckpointError(
                f"{target}: {name} is {entry.properties.dtype} {list(entry.size)}; "
                f"{tensor.dtype} {list(tensor.shape)} is needed"
            )
