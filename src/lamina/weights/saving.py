"""Safetensors files and checkpoint directories, written tensor by tensor and put in place only when whole."""

import ctypes
import errno
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lamina.errors import CheckpointError, StorageError
from lamina.weights.headers import Entry, header_bytes, in_file_order, shown

FORMAT: Mapping[str, str] = MappingProxyType({"format": "pt"})  # what save_pretrained writes, and from_pretrained asks
SUFFIX = ".partial"  # of what is being written, beside the place where it will stand
STALE = 60.0  # seconds after which something partial that nobody holds is a dead writer's

Plan = Mapping[str, Entry]
Read = Callable[[str], Tensor]


def write_safetensors(
    path: str | os.PathLike[str], plan: Plan, read: Read, metadata: Mapping[str, str] | None = FORMAT
) -> None:
    """Writes one file, the same bytes as safetensors' own `save_file`, asking `read` for one tensor at a time.

    The file appears whole or not at all; one that was there before stays until then, and stays if anything fails.
    """
    target = Path(os.path.realpath(path))
    with _reported(target, _bytes(plan, metadata)), _locked(_partial(target), directory=False) as (partial, lock):
        with open(lock, "wb", closefd=False) as file:
            _write(file, plan, read, metadata)
        os.replace(partial, target)
        sync(target.parent)


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes one small file, which appears whole or not at all, and replaces one that was there in one step."""
    target = Path(os.path.realpath(path))
    with _reported(target, len(data)), _locked(_partial(target), directory=False) as (partial, lock):
        with open(lock, "wb", closefd=False) as file:
            file.write(data)
            _flush(file)
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
    with _reported(target, needed), _locked(_partial(target), directory=True) as (partial, _):
        for name, shard in files_of.items():
            with open(partial / name, "xb") as file:
                _write(file, shard, read, metadata)
        for name, content in files.items():
            (partial / name).parent.mkdir(exist_ok=True)
            with open(partial / name, "xb") as file:
                file.write(content)
                _flush(file)
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
    _flush(file)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync(directory: Path) -> None:
    """Makes names durable: a rename is on disk only when its directory is."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _partial(target: Path) -> Path:
    return target.parent / f".{target.name}.{secrets.token_hex(4)}{SUFFIX}"


@contextmanager
def _reported(target: Path, needed: int) -> Iterator[None]:
    """Makes the parent, checks for room, and turns what the system refuses into one line that names both numbers."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        free = shutil.disk_usage(target.parent).free
        if free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield
    except OSError as error:
        raise refused(target, needed, error) from error


def refused(target: Path, needed: int, error: OSError, state: str = "nothing was changed") -> StorageError:
    """What to raise when the system refuses to write: why, how much is needed and free, and how things stand now."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(next(folder for folder in target.absolute().parents if folder.is_dir())).free
        reason = f"{reason}: {needed:,} bytes are needed, and {free:,} are free"
    return StorageError(f"{target}: cannot be written: {reason}; {state}")


@contextmanager
def _locked(partial: Path, directory: bool) -> Iterator[tuple[Path, int]]:
    """A new file or directory, locked so that others can tell that its writer lives, and removed if still there."""
    if directory:
        partial.mkdir()
    handle = os.open(partial, os.O_RDONLY if directory else os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield partial, handle
    finally:
        os.close(handle)
        remove(partial)


def _sweep(target: Path) -> None:
    """Removes what writers of this target left behind when they were killed: old, and locked by nobody."""
    for path in target.parent.iterdir():
        if not (path.name.startswith(f".{target.name}.") and path.suffix == SUFFIX):
            continue
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError:  # it has gone meanwhile, or belongs to another user
            continue
        try:
            if time.time() - os.fstat(handle).st_mtime > STALE:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(path)
        except BlockingIOError:  # its writer lives
            pass
        finally:
            os.close(handle)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def install(partial: Path, target: Path, force: bool) -> None:
    """Gives the whole directory its name. What it replaces then bears the partial one's name, and is removed."""
    if force and target.exists() and _exchange(partial, target):
        return
    aside = partial.with_name(partial.name.removesuffix(SUFFIX) + f".old{SUFFIX}")
    replaced = force and target.exists()
    if replaced:
        os.rename(target, aside)
    try:
        os.rename(partial, target)  # onto nothing, or onto an empty directory; the system refuses all else
    except OSError as error:
        if replaced:
            os.rename(aside, target)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise CheckpointError(f"{target}: another process has written it meanwhile; nothing was changed") from None
        raise
    if replaced:
        remove(aside)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step, where the system can: Linux, renameat2 with RENAME_EXCHANGE (2)."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    here = -100  # AT_FDCWD: names are relative to the working directory, as everywhere
    return swap is not None and swap(here, os.fsencode(one), here, os.fsencode(other), 2) == 0
