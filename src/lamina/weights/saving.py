"""Safetensors files and checkpoint directories, written tensor by tensor and put in place only when whole."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lamina.durable import flush, install, locked, partial_name, reported, sync
from lamina.errors import CheckpointError
from lamina.weights.headers import Entry, header_bytes, in_file_order, shown

FORMAT: Mapping[str, str] = MappingProxyType({"format": "pt"})  # what save_pretrained writes, and from_pretrained asks

Plan = Mapping[str, Entry]
Read = Callable[[str], Tensor]


def write_safetensors(
    path: str | os.PathLike[str], plan: Plan, read: Read, metadata: Mapping[str, str] | None = FORMAT
) -> None:
    """Writes one file, the same bytes as safetensors' own `save_file`, asking `read` for one tensor at a time.

    The file appears whole or not at all; one that was there before stays until then, and stays if anything fails.
    """
    target = Path(os.path.realpath(path))
    with reported(target, _bytes(plan, metadata)), locked(partial_name(target), directory=False) as (partial, lock):
        with open(lock, "wb", closefd=False) as file:
            _write(file, plan, read, metadata)
        os.replace(partial, target)
        sync(target.parent)


def save_checkpoint(
    directory: str | os.PathLike[str],
    plan: Plan,
    read: Read,
    *,
    shard_size: int = 5_000_000_000,
    shards: Mapping[str, Iterable[str]] | None = None,
    extra_files: Mapping[str, bytes] = MappingProxyType({}),
    metadata: Mapping[str, str] | None = FORMAT,
    index: Mapping[str, Any] | None = None,
    single: str = "model.safetensors",
    force: bool = False,
) -> None:
    """Writes a directory as transformers' `save_pretrained` would: one file, or shards of `shard_size` and an index.

    Tensors go to shards in the order of `plan`, or as `shards` (names by file) says where that lists exactly the plan
    and keeps to `shard_size`. `extra_files` (config.json, 1_Pooling/config.json, ...) go beside them. `index` is
    what the index says beside the places: by default, bytes and items of all tensors. `single` is the name of the file
    where there is only one. The directory appears whole or not at all. One that is there and not empty is refused, or,
    with `force`, replaced if it is a checkpoint.
    """
    target = Path(os.path.realpath(directory))
    files_of = _told(plan, shards or {}, shard_size) or _split(plan, shard_size)
    if len(files_of) == 1:
        files_of = {single: next(iter(files_of.values()))}
    _check_names(extra_files, files_of)
    _check_target(target, force)
    files = dict(extra_files)
    if len(files_of) > 1:
        files["model.safetensors.index.json"] = _index(plan, files_of, index)
    needed = sum(_bytes(shard, metadata) for shard in files_of.values()) + sum(map(len, files.values()))
    with reported(target, needed), locked(partial_name(target), directory=True) as (partial, _):
        for name, shard in files_of.items():
            with open(partial / name, "xb") as file:
                _write(file, shard, read, metadata)
        for name, content in files.items():
            (partial / name).parent.mkdir(exist_ok=True)
            with open(partial / name, "xb") as file:
                file.write(content)
                flush(file)
            sync((partial / name).parent)
        sync(partial)
        install(partial, target, force)
        sync(target.parent)


def _told(plan: Plan, shards: Mapping[str, Iterable[str]], shard_size: int) -> dict[str, Plan] | None:
    """The plan divided as `shards` says; None where that is not the same tensors, or a file would be too large."""
    names = [name for part in shards.values() for name in part]
    if sorted(names) != sorted(plan) or (len(shards) == 1 and "model.safetensors" not in shards):
        return None
    divided: dict[str, Plan] = {file: {name: plan[name] for name in part} for file, part in shards.items()}
    sizes = {file: sum(entry.nbytes for entry in part.values()) for file, part in divided.items()}
    fits = all(part and (len(part) == 1 or sizes[file] <= shard_size) for file, part in divided.items())
    return divided if fits else None


def _split(plan: Plan, shard_size: int) -> dict[str, Plan]:
    """Shards by file name, filled in the order of the plan as huggingface_hub fills them.

    With room for 10: sizes 6, 12, 2, 6 give [12], [6, 2], [6]: what is too large stands alone, before the shard that
    was being filled.
    """
    if not plan:
        raise CheckpointError("there are no tensors to save")
    if shard_size <= 0:
        raise CheckpointError(f"shard_size is {shard_size}, and must be a positive number of bytes")
    shards: list[dict[str, Entry]] = []
    current: dict[str, Entry] = {}
    filled = 0
    for name, entry in plan.items():
        if entry.nbytes > shard_size:
            shards.append({name: entry})
            continue
        if filled + entry.nbytes > shard_size:
            shards.append(current)
            current, filled = {}, 0
        current[name] = entry
        filled += entry.nbytes
    if current:
        shards.append(current)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{place:05d}-of-{len(shards):05d}.safetensors": shard for place, shard in enumerate(shards, 1)}


def _index(plan: Plan, shards: Mapping[str, Plan], said: Mapping[str, Any] | None) -> bytes:
    if said is None:
        parameters = sum(entry.nbytes // entry.dtype.itemsize for entry in plan.values())
        said = {"total_parameters": parameters, "total_size": sum(entry.nbytes for entry in plan.values())}
    homes = {name: file for file, shard in shards.items() for name in shard}
    index = {"metadata": said, "weight_map": homes}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode("utf-8")


def _check_names(extra_files: Iterable[str], shards: Mapping[str, Plan]) -> None:
    for name in extra_files:
        parts = name.split("/")
        if len(parts) > 2 or any(part in ("", ".", "..") or "\0" in part or os.sep in part for part in parts):
            raise CheckpointError(f"extra file {shown(name)}: must be a plain file name, in one folder at most")
        if name in shards or name == "model.safetensors.index.json":
            raise CheckpointError(f"extra file {shown(name)}: the weights are written under that name")


def _check_target(target: Path, force: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target}: is a file, and a directory is to be written")
    names = os.listdir(target)
    if names and not force:
        raise CheckpointError(f"{target}: exists and is not empty; name another directory, or replace it with --force")
    if names and not any(name in ("config.json", "spec.json") or name.endswith(".safetensors") for name in names):
        raise CheckpointError(f"{target}: is not a checkpoint, so it is not replaced; name another directory")


def _bytes(plan: Plan, metadata: Mapping[str, str] | None) -> int:
    return len(header_bytes(plan.values(), metadata)) + sum(entry.nbytes for entry in plan.values())


def _write(file: BinaryIO, plan: Plan, read: Read, metadata: Mapping[str, str] | None) -> None:
    entries = in_file_order(plan.values())
    assert plan.keys() == {entry.name for entry in entries}
    file.write(header_bytes(entries, metadata))
    for entry in entries:
        tensor = read(entry.name).detach()
        if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
            raise CheckpointError(
                f"tensor {shown(entry.name)} was to be written as {entry.dtype} {list(entry.shape)}, "
                f"and is {tensor.dtype} {list(tensor.shape)}"
            )
        if entry.nbytes:
            plain = tensor.resolve_conj().resolve_neg().cpu().contiguous()
            plain = plain.as_strided((plain.numel(),), (1,))  # one item may have any stride and count as contiguous
            file.write(plain.view(torch.uint8).numpy().data)
    flush(file)
