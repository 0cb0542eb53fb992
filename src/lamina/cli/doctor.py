"""`lamina doctor`: what this machine and installation are, to paste into a report; status 1 where one is broken."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

import click

from lamina.cli.output import Output, heading
from lamina.cli.program import command
from lamina.figures import size
from lamina.machine import cores, memory, version

EXAMPLES = """
lamina doctor
lamina doctor --json
"""
PACKAGES = ("torch", "numpy", "tokenizers", "huggingface_hub", "click", "rich", "jinja2", "pyyaml")
OPTIONAL = ("transformers", "safetensors", "gguf", "pyarrow", "lancedb", "faiss-cpu")


@command(EXAMPLES)
@click.pass_context
def doctor(ctx: click.Context, out: Output) -> None:
    """This machine and installation: versions, threads, memory, devices, packaged models.

    The exit status is 1 where something that lamina needs is missing or broken; that is listed under problems.
    """
    import lamina

    versions = {name: version(name) for name in (*PACKAGES, *OPTIONAL)}
    problems = [f"{name} is not installed" for name in PACKAGES if versions[name] is None]
    devices: dict[str, Any] = {}
    if versions["torch"] is not None:
        try:
            devices = _devices()
        except (ImportError, OSError, RuntimeError) as error:
            problems.append(f"torch does not work: {error}")
    document: dict[str, Any] = {
        "lamina": lamina.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "cores": cores(),
        **devices,
        **memory(),
        **_models(problems),
        "hub_offline": _flag("HF_HUB_OFFLINE") or _flag("TRANSFORMERS_OFFLINE"),
        "problems": problems,
    }
    out.result(document, _lines(document))
    if problems:
        ctx.exit(1)


def _devices() -> dict[str, Any]:
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "devices": ["cpu", *names, *(["mps"] if torch.backends.mps.is_available() else [])],
    }


def _models(problems: list[str]) -> dict[str, Any]:
    from lamina.packaged import PACKAGED, data_directory, packaged_path

    directory = data_directory()
    nearest = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not os.access(nearest, os.W_OK):
        problems.append(f"{nearest} cannot be written to, so nothing can be fetched; LAMINA_DATA chooses another")
    found = {name: packaged_path(name) for name in PACKAGED}
    return {
        "data_directory": str(directory),
        "models": {name: None if path is None else str(path) for name, path in found.items()},
    }


def _flag(name: str) -> bool:
    return os.environ.get(name, "").strip().upper() in ("1", "ON", "YES", "TRUE")


def _lines(found: dict[str, Any]) -> list[str]:
    packages = [f"{name} {version}" for name, version in found["packages"].items() if version is not None]
    memory = [size(found[name]) for name in ("memory_bytes", "memory_available_bytes") if found[name] is not None]
    facts = [
        ("lamina", found["lamina"]),
        ("python", f"{found['python']} ({sys.executable})"),
        ("platform", found["platform"]),
        ("packages", ", ".join(packages)),
        ("cores", f"{found['cores']}, {found.get('threads', 'no')} threads of torch, {found.get('cpu', '-')}"),
        ("memory", " in all, ".join(memory) + " available" if len(memory) == 2 else "unknown"),
        ("devices", ", ".join(found.get("devices", [])) or "none"),
        (
            "hub",
            "offline, as HF_HUB_OFFLINE says" if found["hub_offline"] else "used for sources that are repositories",
        ),
        ("data", found["data_directory"]),
    ]
    lines = [f"{heading(name.ljust(9))} {value}" for name, value in facts]
    for name, path in found["models"].items():
        lines.append(f"{'':9} {name}: {path or f'not here; get it with: lamina fetch {name}'}")
    return lines + [f"{heading('problem'.ljust(9))} {problem}" for problem in found["problems"]]


command = doctor
