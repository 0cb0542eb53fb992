"""The manifest of a checkpoint: what its files are, by size and hash, so that damage is found and named."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lamina.durable import sync, write_file
from lamina.errors import CheckpointError
from lamina.weights.files import read_json
from lamina.weights.headers import shown

VERSION = 1  # of the format of a checkpoint
MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{1,18})")  # of a checkpoint's folder
LONG = 100_000_000  # bytes that the JSON of a checkpoint may have


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    serial: int  # one more than any other in the directory had: the newest has the highest, whatever the clock said
    files: Mapping[str, tuple[int, str]]  # size in bytes and sha256, by path below the folder
    world: int = 1  # processes that saved it
    mesh: Mapping[str, int] = field(default_factory=dict)  # size by axis
    spec: str = ""  # hash of the model's spec
    data: str = ""  # hash of the prepared data
    lamina: str = ""  # versions that wrote it
    torch: str = ""


def check(path: str | os.PathLike[str], verify: bool = False) -> Manifest:
    """The manifest of a valid checkpoint. Raises CheckpointError naming what is damaged and both numbers."""
    path = Path(path)
    manifest = _manifest(path)
    for name, (size, digest) in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing, and {MANIFEST} lists it with {size:,} bytes")
        found = file.stat().st_size
        if found != size:
            raise CheckpointError(f"{file}: has {found:,} bytes, and {MANIFEST} says {size:,}")
        if verify and (hashed := _sha256(file)) != digest:
            raise CheckpointError(
                f"{file}: its sha256 is {hashed[:12]}..., and {MANIFEST} says {digest[:12]}...: it was damaged"
            )
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json, the last file of a checkpoint."""
    said = {"format": VERSION, **asdict(manifest)}
    write_file(folder / MANIFEST, as_json(said | {"sha256": hashlib.sha256(as_json(said)).hexdigest()}))


def durable(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and sha256 of every file below a folder, once their bytes and names are on disk."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        sync(path.parent)
        found[path.relative_to(folder).as_posix()] = (path.stat().st_size, _sha256(path))
    return found


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder is named for."""
    return int(path.name.removeprefix("step-"))


def as_json(value: Any) -> bytes:
    """One line of JSON, keys in the order in which they are."""
    return (json.dumps(value, allow_nan=False) + "\n").encode()


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None


def _manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    said = read_json(file, LONG)
    found, version = said.pop("sha256", None), said.pop("format", None)
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(f"{file}: its format is {version}, and this lamina reads up to {VERSION}; upgrade lamina")
    if version != VERSION or found != hashlib.sha256(as_json({"format": version, **said})).hexdigest():
        raise CheckpointError(f"{file}: does not match its own sha256: it was damaged or edited")
    try:
        files = {name: (int(size), str(digest)) for name, (size, digest) in said.pop("files").items()}
        manifest = Manifest(files=files, **said)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: is no manifest of a checkpoint ({error})") from None
    for name in files:
        if name.startswith("/") or any(part in ("", ".", "..") or "\\" in part for part in name.split("/")):
            raise CheckpointError(f"{file}: lists {shown(name)}, and may only list files below its folder")
    if manifest.step != step_of(path):
        raise CheckpointError(f"{file}: is of step {manifest.step}, and its folder is named {path.name}")
    return manifest
