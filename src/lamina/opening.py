"""Opening a checkpoint: which family it is, what its spec is, and its tensors under the names of the weight table."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamina.errors import CheckpointError, LaminaError
from lamina.families import FAMILIES, Family, Fields, family
from lamina.locate import Located
from lamina.model import ModelSpec
from lamina.specs import unknown
from lamina.weights.files import Checkpoint, Entry, read_json
from lamina.weights.rules import Rule

NATIVE = "spec.json"
"""The file that makes a directory one of the native layout."""
HISTORY = "history.json"
"""What was done to a checkpoint, a line an operation, the first one first."""


@dataclass
class Origin:
    """Where a model was loaded from, and what is needed to write it back as it was."""

    located: Located
    family: Family | None  # None: native layout
    config: dict[str, Any] = field(default_factory=dict)
    config_text: bytes | None = None  # config.json as it stands on disk; None for GGUF and CTranslate2 files
    spec: ModelSpec | None = None  # what the file holds, of which config.json may say less: heads are in the tensors
    bare: bool = False  # the tensors lack the family's prefix
    stored: dict[str, Entry] = field(default_factory=dict)  # what the file calls each tensor, and its dtype
    twins: tuple[str, ...] = ()  # tensors that the file stores a second time
    extras: dict[str, Tensor] = field(default_factory=dict)  # what is not used, kept to be written back
    shards: dict[str, list[str]] | None = None  # which tensors shared a file
    metadata: dict[str, str] | None = None  # of the safetensors files
    index: dict[str, Any] | None = None  # and of the index of shards
    generation: dict[str, Any] = field(default_factory=dict)  # generation_config.json
    history: list[dict[str, Any]] = field(default_factory=list)  # what operations made of it
    initialised: list[str] = field(default_factory=list)  # parameters the file lacked, with allow_missing


@dataclass
class Opened:
    """A checkpoint that has been opened and understood, but not read."""

    spec: ModelSpec
    checkpoint: Any  # entries: dict[str, Entry]; read(name) -> Tensor
    rules: tuple[Rule, ...]
    origin: Origin


def open_source(located: Located) -> Opened:
    """Open a SOURCE that has weights."""
    opened = _open(located)
    directory = located.path if located.path.is_dir() else located.path.parent
    if (directory / HISTORY).is_file():
        opened.origin.history = read_history(directory / HISTORY)
    return opened


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of a history, the first operation first. Raises CheckpointError for what is none."""
    found = read_json(path, kind=list)
    if not all(isinstance(line, dict) for line in found):
        raise CheckpointError(f"{path}: a list of operations was expected")
    return found


def changed_in(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """The weights that are not those of the first model any more, as the last line of its history says."""
    return list(history[-1].get("changed", ())) if history else []


def _open(located: Located) -> Opened:
    if located.kind == "gguf":
        from lamina.families.gguf import GGUFCheckpoint

        checkpoint: Any = GGUFCheckpoint(located.path)
        return _understand(located, checkpoint, checkpoint.config, None)
    if located.kind == "ctranslate2":
        return _converted(located)
    directory = located.path if located.path.is_dir() else located.path.parent
    if (directory / NATIVE).is_file():
        try:
            spec = ModelSpec.from_json((directory / NATIVE).read_text(encoding="utf-8"))
        except (LaminaError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{directory / NATIVE}: {error}") from None
        checkpoint = Checkpoint(located.path)
        origin = Origin(located, None, generation=_generation(directory))
        names = tuple(Rule(name, name) for name, _ in spec.build(device="meta").named_parameters())
        return Opened(spec, checkpoint, names, origin)
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} holds neither config.json (Hugging Face layout) nor spec.json (native layout)"
        )
    config = read_json(directory / "config.json")
    opened = _understand(located, Checkpoint(located.path), config, (directory / "config.json").read_bytes())
    opened.origin.generation = _generation(directory, config)
    return opened


def _converted(located: Located) -> Opened:
    """A model.bin of CTranslate2, whose names have a table of their own."""
    from lamina.families.ctranslate2 import RULES, CTranslate2Checkpoint

    checkpoint = CTranslate2Checkpoint(located.path)
    chosen = family(checkpoint.config["model_type"])
    spec = _spec(chosen, Fields(checkpoint.config, where=str(located.path)))
    origin = Origin(located, chosen, checkpoint.config, generation=checkpoint.generation)
    return Opened(spec, checkpoint, RULES, origin)


def _spec(chosen: Family, fields: Fields) -> ModelSpec:
    try:
        return chosen.spec(fields)
    except CheckpointError:
        raise
    except ValueError as error:
        where = fields.where
        raise CheckpointError(f"{where}: {error}" if where not in str(error) else str(error)) from None


def _understand(located: Located, checkpoint: Any, config: dict[str, Any], text: bytes | None) -> Opened:
    """Choose the family, and bring the names of the file to those that its weight table has."""
    model_type = config.get("model_type")
    where = str(located.path if located.path.is_file() else located.path / "config.json")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        remote = "; its own code (auto_map) is never run" if "auto_map" in config else ""
        raise CheckpointError(f"{where}: {unknown('model_type', str(model_type), FAMILIES)}{remote}")
    chosen = family(model_type)
    if chosen.config is None:
        raise CheckpointError(
            f"{where}: model_type is {model_type!r}, whose weights were never published in this layout"
        )
    names = _renamed(checkpoint.entries, chosen, where)
    bare = bool(chosen.base) and not any(name.startswith(chosen.base) for name in names)
    if bare:
        heads = {rule.theirs for rule in chosen.weights if isinstance(rule.theirs, str)}
        names = {name if name in heads else chosen.base + name: stored for name, stored in names.items()}
    spec = _spec(chosen, Fields(config, frozenset(names), where, lambda name: checkpoint.read(names[name])))
    tied = spec.head is not None and spec.head.tied
    own = {rule.theirs for rule in chosen.heads(spec)}  # a decoder alone may call the embedding what others call a copy
    twins = [pair for pair in chosen.copies.items() if pair[0] not in own]
    for twin, original in twins + (list(chosen.aliases.items()) if tied else []):
        if twin in names and original not in names:  # its writer kept the other one of the two
            names[original] = names.pop(twin)
    origin = Origin(located, chosen, config, text, bare=bare)
    if isinstance(checkpoint, Checkpoint):
        origin.stored = {name: checkpoint.entries[stored] for name, stored in names.items()}
        origin.shards = {file: list(shard.entries) for file, shard in checkpoint.shards.items()}
        origin.metadata, origin.index = checkpoint.metadata, checkpoint.index
    view = _Renamed(checkpoint, names)
    origin.extras = {name: view.read(name) for name in names if chosen.unread(name)}
    spec = origin.spec = _settle_twins(spec, chosen, view, origin)
    return Opened(spec, view, chosen.rules(spec), origin)


class _Renamed:
    """A checkpoint under the names of the weight table."""

    def __init__(self, checkpoint: Any, names: Mapping[str, str]) -> None:
        self.checkpoint, self.names = checkpoint, names
        self.entries = {name: checkpoint.entries[stored] for name, stored in names.items()}

    def read(self, name: str) -> Tensor:
        return self.checkpoint.read(self.names[name])


def _settle_twins(spec: ModelSpec, chosen: Family, view: _Renamed, origin: Origin) -> ModelSpec:
    """Tensors that the file stores twice: equal ones are noted. A head that the configuration calls tied, and that
    differs from the embedding, is untied; embeddings that differ are refused."""
    where = origin.located.path
    for twin, original in chosen.copies.items():
        if twin in view.entries and original in view.entries:
            if not _same(view, twin, original):
                raise CheckpointError(f"{where}: {twin} differs from {original}; both stacks share one embedding here")
            origin.twins += (twin,)
    for twin, original in chosen.aliases.items():
        if twin not in view.entries or original not in view.entries or spec.head is None or not spec.head.tied:
            continue
        if _same(view, twin, original):
            origin.twins += (twin,)
        else:
            warnings.warn(
                f"{where}: the configuration ties {twin} to {original}, but the file holds different"
                " values; they are kept apart (tied=False)",
                stacklevel=4,
            )
            return spec.replace(head=spec.head.replace(tied=False))
    return spec


def _same(view: _Renamed, one: str, other: str) -> bool:
    return view.entries[one].shape == view.entries[other].shape and torch.equal(view.read(one), view.read(other))


def _renamed(entries: Iterable[str], chosen: Family, where: str) -> dict[str, str]:
    """The names that the weight table has -> those of the file."""
    names: dict[str, str] = {}
    for stored in entries:
        name = stored
        for old, new in chosen.renamed:
            name = re.sub(old, new, name)
        if name in names:
            raise CheckpointError(f"{where}: {stored} and {names[name]} are the same tensor, {name}")
        names[name] = stored
    return names


def _generation(directory: Path, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """generation_config.json; of older files what config.json forces, the rest is in the spec."""
    path = directory / "generation_config.json"
    forced = ("forced_bos_token_id", "forced_eos_token_id")
    return read_json(path) if path.is_file() else {n: v for n, v in (config or {}).items() if n in forced}


def gguf_tokenizer(path: Path) -> Any:
    """The tokenizer inside a GGUF file."""
    from lamina.text import from_gguf
    from lamina.weights.gguf import GGUFFile

    with GGUFFile(path) as file:
        return from_gguf(file.metadata)
