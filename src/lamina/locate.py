"""Where a SOURCE lies: a path, a packaged model, a published size, or a repository of the Hugging Face hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lamina.errors import LaminaError, UnsupportedError
from lamina.packaged import PACKAGED, packaged_path
from lamina.specs import nearest
from lamina.weights.ctranslate2 import MODEL_BIN, is_ctranslate2
from lamina.weights.files import INDEX, SINGLE

HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "1_Pooling/*", MODEL_BIN]


@dataclass(frozen=True)
class Located:
    """What a SOURCE turned out to be."""

    name: str  # as the user wrote it
    kind: str  # "directory", "safetensors", "gguf", "ctranslate2" or "published"
    path: Path  # empty for "published"


def locate(source: str | os.PathLike[str]) -> Located:
    """Find a SOURCE. Raises LaminaError saying what was looked for, and the nearest known name."""
    name = os.fspath(source)
    if not name or "\0" in name:
        raise LaminaError(f"{name!r} is no source; give a directory, a file, hf:owner/name, or family/size")
    if name.startswith("hf:"):
        return _in_directory(name, _hub(name[3:]))
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_directory(name, path)
    if path.is_file():
        kind = "ctranslate2" if is_ctranslate2(path) else path.suffix.lstrip(".")
        if kind not in ("gguf", "safetensors", "ctranslate2"):
            raise LaminaError(
                f"{name} is a file of another kind; a directory, a .safetensors or a .gguf file, or a model.bin of"
                " CTranslate2 is needed"
            )
        return Located(name, kind, path)
    if name in PACKAGED:
        found = packaged_path(name)
        if found is None:
            raise LaminaError(f"{name!r} is a packaged model that is not here yet; get it with: lamina fetch {name}")
        return Located(name, "gguf", found) if found.suffix == ".gguf" else _in_directory(name, found)
    from lamina.families import sizes
    from lamina.families.undisclosed import GPT4, undisclosed

    if name in sizes():
        return Located(name, "published", Path())
    if (closed := undisclosed(name)) is not None:
        raise UnsupportedError(closed.refusal)
    near = nearest(name, [*sizes(), *PACKAGED, GPT4.name])
    hint = f"; did you mean {near!r}?" if near else ""
    families = {size.split("/")[0] for size in sizes()}
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and name.split("/")[0] not in families:
        return _in_directory(name, _hub(name))
    if path.suffix in (".gguf", ".safetensors"):
        hint = ""
    raise LaminaError(f"no source {name!r}: it is no local path, packaged model or published size{hint}")


def _in_directory(name: str, path: Path) -> Located:
    """A directory, or the model.bin of CTranslate2 that it holds in place of the layouts that go before it."""
    if not any((path / one).exists() for one in ("spec.json", SINGLE, INDEX)) and is_ctranslate2(path / MODEL_BIN):
        return Located(name, "ctranslate2", path / MODEL_BIN)
    return Located(name, "directory", path)


def _hub(name: str) -> Path:
    """The directory of a repository's snapshot. Only weights, configuration and text files are taken, never code."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=HUB_FILES))
    except HFValidationError as error:
        raise LaminaError(f"hf:{name}: {str(error).splitlines()[0]}") from None
    except LocalEntryNotFoundError:
        raise LaminaError(
            f"hf:{name} is not in the cache and the hub cannot be reached; give a local directory, or a packaged model"
            f" ({', '.join(PACKAGED)})"
        ) from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise LaminaError(f"hf:{name}: the hub answered {status}; check the name, the revision and HF_TOKEN") from None
