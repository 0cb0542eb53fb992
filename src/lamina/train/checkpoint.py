"""Checkpoints of a run: written whole or not at all, checksummed, and never over one that is there.

A checkpoint is a folder `step-N` whose `manifest.json`, written last, lists every other file with its size and hash.
Saving: everything is written into `.tmp-step-N-...` and made durable, the folder is renamed, `latest` is replaced,
and only then are old checkpoints deleted. A process that is killed at any moment leaves the newest complete
checkpoint as it was, and rubbish that the next save removes. Savers of one directory take turns (flock).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lamina.durable import install, refused, remove, sync, write_file
from lamina.errors import CheckpointError, StorageError
from lamina.machine import version
from lamina.train.manifest import LONG, NAME, Manifest, as_json, check, durable, step_of, write_manifest
from lamina.train.trees import flatten, unflatten
from lamina.weights.files import Entry, SafetensorsFile, read_json, write_safetensors
from lamina.weights.saving import FORMAT

STATE, LATEST = "state.json", "latest"
TREE = "tree"  # in a file's metadata: what beside its tensors belongs to it, as JSON
RUBBISH = (".tmp-", f".{LATEST}.")  # what a killed saver leaves begins so
ROOM = 1.1  # times the estimate must be free before anything is written

Write = Callable[[Path], None]


def moment(name: str) -> None:
    """Called at the moments of saving that differ in what is on disk. Does nothing: tests put a kill in its place."""


@dataclass(frozen=True)
class Content:
    """What one process saves.

    `tensors`: by file ("model", "adapter", "ema"), tensors by name. `trees`: by file ("optimiser"), nested values with
    tensors in them. `state`: JSON. `files`: what else is put beside, such as spec.json, with which the folder is a
    source that `lamina.load` opens.
    """

    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    trees: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        for name, (tensors, metadata) in self._parts():
            plan = {key: Entry(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
            write_safetensors(folder / f"{name}.safetensors", plan, tensors.__getitem__, metadata)
            moment(f"wrote {name}")
        write_file(folder / STATE, as_json(dict(self.state)))
        for name, data in self.files.items():
            write_file(folder / name, data)

    @property
    def nbytes(self) -> int:
        tensors = [tensor for _, (part, _) in self._parts() for tensor in part.values()]
        return sum(tensor.nbytes for tensor in tensors) + sum(map(len, self.files.values())) + len(as_json(self.state))

    def _parts(self) -> Iterator[tuple[str, tuple[Mapping[str, Tensor], dict[str, str]]]]:
        for name, tensors in self.tensors.items():
            yield name, (tensors, dict(FORMAT))
        for name, tree in self.trees.items():
            tensors, rest = flatten(tree)
            yield name, (tensors, dict(FORMAT) | {TREE: as_json(rest).decode()})


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is there: its manifest and state are read, its tensors mapped."""

    path: Path
    manifest: Manifest
    state: dict[str, Any]
    files: Mapping[str, SafetensorsFile]  # by name without the ending: "model", "optimiser", ...

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file as views of it: their bytes are read when they are looked at."""
        file = self._file(name)
        return {key: file.read(key) for key in file.entries}

    def tree(self, name: str) -> Any:
        """What was given to `Content.trees`, its tensors in memory of their own."""
        file = self._file(name)
        try:
            return unflatten(file.read, json.loads(file.metadata[TREE]))
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{file.path}: its metadata has no readable {TREE!r} ({error})") from None

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self.files:
            raise CheckpointError(f"{self.path}: holds no {name}.safetensors; it holds {', '.join(self.files)}")
        return self.files[name]


def save(
    directory: str | os.PathLike[str],
    step: int,
    content: Content | Write,
    *,
    about: Mapping[str, Any] = MappingProxyType({}),
    estimate: int | None = None,
    keep: int = 2,
) -> Path:
    """Saves a checkpoint as `directory`/step-N, deletes those beyond the newest `keep`, and returns its path.

    `content` may be a function that fills a folder: so several ranks save, of which the first alone calls this; the
    function then returns when all have written, and `estimate` says how many bytes that takes. `about`: `world`,
    `mesh`, `spec` and `data` of the manifest. A checkpoint of the same step that is there is replaced by a swap of
    names. Raises StorageError, with what is needed and free, where there is no room; what was there then stays.
    """
    if keep < 2:
        raise CheckpointError(f"keep is {keep}, and must be 2 or more: the newest checkpoint may turn out damaged")
    directory = Path(os.path.realpath(directory))
    target = directory / f"step-{step}"
    write = content.write if isinstance(content, Content) else content
    needed = content.nbytes if isinstance(content, Content) else estimate or 0
    try:
        with _alone(directory):
            serials = [manifest.serial for _, manifest in _complete(directory)]
            temporary = directory / f".tmp-step-{step}-{secrets.token_hex(8)}"
            free = shutil.disk_usage(directory).free
            if free < ROOM * needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            try:
                temporary.mkdir()
                moment("began")
                write(temporary)
                moment("wrote all")
                files = durable(temporary)
                versions = {"lamina": version("lamina") or "", "torch": torch.__version__}
                manifest = Manifest(step, max(serials, default=0) + 1, files, **about, **versions)
                write_manifest(temporary, manifest)
                sync(temporary)
                moment("wrote manifest")
                install(temporary, target, force=True)
                moment("renamed")
                sync(directory)
            finally:
                remove(temporary)
            write_file(directory / LATEST, f"{target.name}\n".encode())
            moment("latest")
            _forget(directory, keep)
            moment("deleted")
    except (OSError, StorageError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        found = newest_valid(directory)[0] if directory.is_dir() else None
        state = f"the last good checkpoint, {found.name}, is kept" if found else "there is no earlier checkpoint"
        raise refused(target, int(ROOM * needed), cause, state) from error
    return target


def newest_valid(directory: str | os.PathLike[str], verify: bool = False) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that is valid, if any, and those skipped on the way to it, each with the reason.

    Valid: its manifest and state can be read, and every file has the size that it says; with `verify`, the hash too.
    """
    damaged: list[tuple[Path, str]] = []
    failed: list[tuple[Path, str]] = []
    for path, _ in _complete(Path(directory), damaged):
        try:
            read(path, verify)
        except CheckpointError as error:
            failed.append((path, str(error)))
        else:  # what has no readable manifest has no serial: its step tells whether it would have been newer
            return path, failed + [(other, why) for other, why in damaged if step_of(other) > step_of(path)]
    return None, failed + damaged


def read(path: str | os.PathLike[str], verify: bool = False) -> Saved:
    """Opens a valid checkpoint. Nothing but its manifest and state is read until it is asked for."""
    path = Path(path)
    manifest = check(path, verify)
    state = read_json(path / STATE, LONG) if STATE in manifest.files else {}
    names = [name for name in manifest.files if name.endswith(".safetensors") and "/" not in name]
    return Saved(path, manifest, state, {Path(name).stem: SafetensorsFile(path / name) for name in names})


def sweep(directory: str | os.PathLike[str]) -> None:
    """Removes what savers that were killed left behind. Every save does so too."""
    if Path(directory).is_dir():
        with _alone(Path(directory)):
            pass


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Holds the directory against other savers; what is half written in it is then a dead one's, and is removed."""
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # the system lets go of it when the holder dies
        for path in directory.iterdir():
            if path.name.startswith(RUBBISH):
                remove(path)
        yield
    finally:
        os.close(handle)


def _checkpoints(directory: Path) -> list[Path]:
    paths = directory.iterdir() if directory.is_dir() else ()
    return sorted(
        (path for path in paths if NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()),
        key=step_of,
        reverse=True,
    )


def _complete(directory: Path, damaged: list[tuple[Path, str]] | None = None) -> list[tuple[Path, Manifest]]:
    """The checkpoints whose files are there in full, newest first; the others are added to `damaged`, with reasons."""
    found = []
    for path in _checkpoints(directory):
        try:
            found.append((path, check(path)))
        except CheckpointError as error:
            if damaged is not None:
                damaged.append((path, str(error)))
    return sorted(found, key=lambda pair: pair[1].serial, reverse=True)


def _forget(directory: Path, keep: int) -> None:
    """Deletes complete checkpoints beyond the newest `keep`, by name first, so that no half of one is ever there.

    What is damaged stays, so that somebody may look; whoever resumes is told of it.
    """
    for path, _ in _complete(directory)[keep:]:
        aside = directory / f".tmp-{path.name}-{secrets.token_hex(8)}"
        os.rename(path, aside)
        sync(directory)
        moment("set aside")
        remove(aside)
