"""Sources: one grammar for everything that can be loaded, and the loading, saving and reading of specs behind it.

SOURCE is a local directory (Hugging Face or native layout), a `.gguf` or `.safetensors` file, `hf:owner/name[@revision]`
(an unprefixed owner/name that is no local path means that), a packaged model, or, for specs only, `family/size`.
"""

from __future__ import annotations

import fnmatch
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lamina.errors import CheckpointError, LaminaError, UnsupportedError
from lamina.families import FAMILIES, Family, Fields, family, sizes
from lamina.locate import Located, locate
from lamina.model import Model, ModelSpec
from lamina.specs import diff, unknown
from lamina.weights import rules
from lamina.weights.files import Checkpoint, read_json
from lamina.weights.headers import Entry
from lamina.weights.rules import Move, Rule
from lamina.weights.saving import save_checkpoint

NATIVE = "spec.json"


@dataclass
class Origin:
    """Where a model was loaded from, and what is needed to write it back as it was."""

    located: Located
    family: Family | None  # None: native layout
    config: dict[str, Any] = field(default_factory=dict)
    config_text: bytes | None = None  # config.json as it stands on disk; None for GGUF files
    bare: bool = False  # the tensors lack the family's prefix
    twins: tuple[str, ...] = ()  # tied tensors that the file stores a second time
    extras: dict[str, Tensor] = field(default_factory=dict)  # buffers without weights, kept to be written back
    shards: dict[str, list[str]] | None = None  # which tensors shared a file
    metadata: dict[str, str] | None = None  # of the safetensors files
    generation: dict[str, Any] = field(default_factory=dict)  # generation_config.json
    initialised: list[str] = field(default_factory=list)  # parameters the file lacked, with allow_missing


def spec(source: str | os.PathLike[str]) -> ModelSpec:
    """The architecture of a published `family/size` or of any SOURCE, without reading weights."""
    located = locate(source)
    if located.kind == "published":
        model_type = sizes()[located.name]
        said = {"model_type": model_type, **family(model_type).sizes[located.name]}
        return family(model_type).spec(Fields(said, where=located.name))
    return _open(located).spec


def load(
    source: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    compile: bool = False,
    *,
    quantize: str | None = None,
    allow_missing: bool = False,
    allow_unexpected: bool = False,
    strict: bool = False,
    **wrong: Any,
) -> Model:
    """A model in evaluation mode, its weights mapped from the file where nothing has to be converted.

    dtype: None keeps what is stored. Tensors that are missing or unexpected are refused unless allowed, and then listed
    in `model.origin.initialised` or warned of. strict: non-finite weights are refused, not only warned of.
    compile: decoding uses a step compiled once per machine. quantize="int8": 8-bit weights for decoding.
    Raises CheckpointError for damaged files, LaminaError for a SOURCE that does not exist or has no weights.
    """
    if wrong:
        known = ["dtype", "device", "compile", "quantize", "allow_missing", "allow_unexpected", "strict"]
        raise LaminaError(unknown("argument of load", next(iter(wrong)), known))
    located = locate(source)
    if located.kind == "published":
        raise LaminaError(
            f"{located.name!r} is a published architecture and has no weights here;"
            f" load hf:owner/name or a directory, or build random weights with lamina.spec({located.name!r}).build()"
        )
    opened = _open(located)
    model = opened.spec.build(device="meta").eval()
    _fill(model, opened, _dtype(dtype), allow_missing, allow_unexpected, strict)
    model.origin = opened.origin
    if torch.device(device).type != "cpu":
        model = model.to(device)
    if compile or quantize is not None:
        from lamina.generation.compiled import prepare

        prepare(model, compile=compile, quantize=quantize)
    return model


def save(
    model: Model,
    directory: str | os.PathLike[str],
    format: str = "hf",
    *,
    force: bool = False,
    shard_size: int = 5_000_000_000,
) -> None:
    """Write a model. "hf": transformers' from_pretrained opens it as is; "native": spec.json and our own names.

    Raises UnsupportedError naming the field of the spec that the Hugging Face layout cannot say; LaminaError where
    `directory` exists (unless `force`). What was there stays whole until the new one is.
    """
    if format not in ("hf", "native"):
        raise LaminaError(unknown("format", format, ("hf", "native")))
    origin: Origin | None = model.origin
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    files = {} if origin is None else _companions(origin.located)
    shards = None
    if format == "native":
        moves = rules.bind([Rule(name, name) for name in shapes], shapes)
        files = {name: data for name, data in files.items() if name != "config.json"}
        files[NATIVE] = model.spec.to_json().encode()
    else:
        chosen, config = exportable(model.spec, None if origin is None else origin.family)
        bare = (
            origin.bare
            if origin is not None and origin.family is chosen
            else model.spec.head is None and bool(chosen.base)
        )
        moves = _bare(rules.bind(chosen.weights, shapes), chosen.base if bare else "")
        files["config.json"] = _config_text(model, chosen, config)
        shards = None if origin is None else origin.shards
    read = rules.saver(moves, lambda name: parameters[name].detach())
    dtypes = {theirs: parameters[move.ours[0]].dtype for move in moves for theirs in move.theirs}
    plan = {n: Entry(n, dtypes[n], shape) for n, shape in rules.their_shapes(moves, shapes).items()}
    read = _with_extras(model, format, plan, read)
    more: dict[str, Any] = {} if origin is None or origin.metadata is None else {"metadata": origin.metadata}
    save_checkpoint(directory, plan, read, shard_size=shard_size, shards=shards, extra_files=files, force=force, **more)


def exportable(spec: ModelSpec, preferred: Family | None = None) -> tuple[Family, dict[str, Any]]:
    """The family whose layout says exactly this spec, and the configuration. Raises UnsupportedError naming the field."""
    reasons: list[str] = []
    candidates = [preferred] if preferred is not None else []
    candidates += [family(name) for name in FAMILIES if preferred is None or name != preferred.model_type]
    for one in candidates:
        try:
            config = one.config(spec)
            back = one.spec(Fields(config, where=f"{one.model_type} config"))
        except (LaminaError, AttributeError, ValueError) as error:
            reasons.append(str(error))
            continue
        if back == spec:
            return one, config
        path, said, meant = diff(back, spec)[0]
        reasons.append(f"{path} is {_brief(meant)}, and {one.model_type}'s config.json can only say {_brief(said)}")
    raise UnsupportedError(f"not exportable to the Hugging Face layout: {reasons[0]}; save with format='native'")


@dataclass
class _Opened:
    """A checkpoint that has been opened and understood, but not read."""

    spec: ModelSpec
    checkpoint: Any  # entries: dict[str, Entry]; read(name) -> Tensor
    rules: tuple[Rule, ...]
    origin: Origin


def _open(located: Located) -> _Opened:
    if located.kind == "gguf":
        from lamina.families.gguf import GGUFCheckpoint

        checkpoint: Any = GGUFCheckpoint(located.path)
        return _understand(located, checkpoint, checkpoint.config, None)
    directory = located.path if located.path.is_dir() else located.path.parent
    if (directory / NATIVE).is_file():
        try:
            spec = ModelSpec.from_json((directory / NATIVE).read_text(encoding="utf-8"))
        except (LaminaError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{directory / NATIVE}: {error}") from None
        checkpoint = Checkpoint(located.path)
        origin = Origin(located, None, generation=_generation(directory))
        names = tuple(Rule(name, name) for name, _ in spec.build(device="meta").named_parameters())
        return _Opened(spec, checkpoint, names, origin)
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} holds neither config.json (Hugging Face layout) nor spec.json (native layout)"
        )
    config = read_json(directory / "config.json")
    opened = _understand(located, Checkpoint(located.path), config, (directory / "config.json").read_bytes())
    opened.origin.generation = _generation(directory)
    return opened


def _understand(located: Located, checkpoint: Any, config: dict[str, Any], text: bytes | None) -> _Opened:
    """Choose the family, and bring the names of the file to those that its weight table has."""
    model_type = config.get("model_type")
    where = str(located.path if located.path.is_file() else located.path / "config.json")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        remote = "; its own code (auto_map) is never run" if "auto_map" in config else ""
        raise CheckpointError(f"{where}: {unknown('model_type', str(model_type), FAMILIES)}{remote}")
    chosen = family(model_type)
    names = {_renamed(name, chosen.renamed): name for name in checkpoint.entries}
    bare = bool(chosen.base) and not any(name.startswith(chosen.base) for name in names)
    if bare:
        heads = {rule.theirs for rule in chosen.weights if isinstance(rule.theirs, str)}
        names = {name if name in heads else chosen.base + name: stored for name, stored in names.items()}
    try:
        spec = chosen.spec(Fields(config, frozenset(names), where))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}" if where not in str(error) else str(error)) from None
    origin = Origin(located, chosen, config, text, bare)
    if isinstance(checkpoint, Checkpoint):
        origin.shards = {file: list(shard.entries) for file, shard in checkpoint.shards.items()}
        origin.metadata = checkpoint.metadata
    view = _Renamed(checkpoint, names)
    origin.extras = {
        name: view.read(name) for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in chosen.ignored)
    }
    spec = _settle_twins(spec, chosen, view, origin)
    return _Opened(spec, view, chosen.weights, origin)


class _Renamed:
    """A checkpoint under the names of the weight table."""

    def __init__(self, checkpoint: Any, names: Mapping[str, str]) -> None:
        self.checkpoint, self.names = checkpoint, names
        self.entries = {name: checkpoint.entries[stored] for name, stored in names.items()}

    def read(self, name: str) -> Tensor:
        return self.checkpoint.read(self.names[name])


def _settle_twins(spec: ModelSpec, chosen: Family, view: _Renamed, origin: Origin) -> ModelSpec:
    """Tensors that the configuration calls tied but the file stores twice: equal ones are noted, others are untied."""
    if spec.head is None or not spec.head.tied:
        return spec
    for twin, original in chosen.aliases.items():
        if twin not in view.entries or original not in view.entries:
            continue
        if view.entries[twin].shape == view.entries[original].shape and torch.equal(
            view.read(twin), view.read(original)
        ):
            origin.twins += (twin,)
        else:
            warnings.warn(
                f"{origin.located.path}: the configuration ties {twin} to {original}, but the file holds different"
                " values; they are kept apart (tied=False)",
                stacklevel=4,
            )
            return spec.replace(head=spec.head.replace(tied=False))
    return spec


def _fill(
    model: Model, opened: _Opened, dtype: torch.dtype | None, allow_missing: bool, allow_unexpected: bool, strict: bool
) -> None:
    """Give every parameter its tensor, one rule at a time, after the names and shapes have been checked as a whole."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    moves = rules.bind(opened.rules, shapes)
    wanted = rules.their_shapes(moves, shapes)
    entries = opened.checkpoint.entries
    where = opened.origin.located.path
    missing = [name for name in wanted if name not in entries]
    known = {*wanted, *opened.origin.extras, *opened.origin.twins}
    unexpected = [name for name in entries if name not in known]
    if missing and not allow_missing:
        raise CheckpointError(f"{where}: {_listed('missing', missing, entries)}")
    if unexpected and not allow_unexpected:
        raise CheckpointError(f"{where}: {_listed('unexpected', unexpected, wanted)}")
    if unexpected:
        warnings.warn(f"{where}: left out {len(unexpected)} unexpected tensors: {_some(unexpected)}", stacklevel=3)
    for move in moves:
        for name in move.theirs:
            if name in entries and tuple(entries[name].shape) != wanted[name]:
                raise CheckpointError(
                    f"{where}: {name} has shape {list(entries[name].shape)}; {move.ours[0]} needs {list(wanted[name])}"
                    f"{_cause(name, entries[name].shape, wanted[name])}"
                )
    _refuse_integers(entries, wanted, where)
    bad: list[str] = []

    def put(name: str, tensor: Tensor) -> None:
        tensor = tensor if dtype is None else tensor.to(dtype)
        if not bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
            count = int((~torch.isfinite(tensor)).sum())
            bad.extend([f"{name} ({count} of {tensor.numel()})"] if count else [])
        place(model, name, tensor)

    present = [move for move in moves if not any(name in missing for name in move.theirs)]
    rules.load(present, shapes, opened.checkpoint.read, put)
    if bad:
        message = f"{where}: weights that are not finite: {_some(bad)}"
        if strict:
            raise CheckpointError(message)
        warnings.warn(message, stacklevel=3)
    if missing:
        opened.origin.initialised = _initialise_missing(model, dtype)


def place(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the parameter called `name`."""
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._parameters[leaf] = nn.Parameter(tensor)


def _initialise_missing(model: Model, dtype: torch.dtype | None) -> list[str]:
    fresh = model.spec.build(device="cpu", dtype=dtype)
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    for name in absent:
        place(model, name, fresh.get_parameter(name).detach())
    return absent


def _refuse_integers(entries: Mapping[str, Entry], wanted: Mapping[str, Any], where: Path) -> None:
    for name in wanted:
        if name in entries and not entries[name].dtype.is_floating_point:
            raise CheckpointError(f"{where}: {name} is {entries[name].dtype}; weights must be of a float type")


def _listed(what: str, names: list[str], others: Mapping[str, Any]) -> str:
    import difflib

    near = difflib.get_close_matches(names[0], list(others), n=3, cutoff=0.6)
    hint = f"; nearest there: {', '.join(near)}" if near else ""
    return f"{len(names)} {what} tensor{'s' if len(names) > 1 else ''}: {_some(names)}{hint}"


def _some(names: list[str]) -> str:
    shown = [name if len(name) <= 120 else name[:117] + "..." for name in names[:6]]
    return ", ".join(repr(n)[1:-1] for n in shown) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _cause(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    if len(found) == len(wanted) and found[1:] == wanted[1:]:
        if "embed" in name or "lm_head" in name or "wte" in name:
            return " (was the vocabulary resized without changing vocab_size?)"
        if ".k_proj" in name or ".v_proj" in name:
            return " (does num_key_value_heads or head_dim in config.json fit this file?)"
    return " (config.json does not describe this file)"


def _bare(moves: list[Move], base: str) -> list[Move]:
    """The moves with `base` taken off their names."""
    return [Move(m.ours, tuple(name.removeprefix(base) for name in m.theirs), m.op) for m in moves] if base else moves


def _renamed(name: str, endings: Mapping[str, str]) -> str:
    for old, new in endings.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _with_extras(
    model: Model, format: str, plan: dict[str, Entry], read: Callable[[str], Tensor]
) -> Callable[[str], Tensor]:
    """Add to `plan` what the source stored beside the weights: buffers, and second copies of tied tensors."""
    origin: Origin | None = model.origin
    if origin is None or format != "hf" or origin.family is None:
        return read
    base = origin.family.base if origin.bare else ""
    extra = {name.removeprefix(base): tensor for name, tensor in origin.extras.items()}
    if model.spec.head is not None and model.spec.head.tied:
        for twin in origin.twins:
            extra[twin.removeprefix(base)] = read(origin.family.aliases[twin].removeprefix(base))
    for name, tensor in extra.items():
        plan[name] = Entry(name, tensor.dtype, tuple(tensor.shape))
    return lambda name: extra[name] if name in extra else read(name)


def _config_text(model: Model, chosen: Family, config: dict[str, Any]) -> bytes:
    """config.json: as it was where it still says the truth, else ours with what we do not interpret carried over."""
    origin: Origin | None = model.origin
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    carried: dict[str, Any] = {}
    if origin is not None and origin.family is chosen:
        said = origin.config.get("dtype", origin.config.get("torch_dtype"))
        names = frozenset(
            name for rule in chosen.weights for name in ([rule.theirs] if isinstance(rule.theirs, str) else ())
        )
        if origin.config_text is not None and said in (None, dtype) and _says(chosen, origin.config, names, model.spec):
            return origin.config_text
        old = ("rope_theta", "rope_scaling", "rope_local_base_freq", "torch_dtype", "quantization_config")
        carried = {name: value for name, value in origin.config.items() if name not in old}
    return (json.dumps({**carried, **config, "dtype": dtype}, indent=2) + "\n").encode()


def _says(chosen: Family, config: dict[str, Any], names: frozenset[str], spec: ModelSpec) -> bool:
    for known in (None, names):
        if chosen.spec(Fields(config, known)) == spec:
            return True
    return False


COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "1_Pooling/config.json")
"""Files beside the weights that are copied as they are: tokenizers, templates, generation settings, pooling."""


def _companions(located: Located) -> dict[str, bytes]:
    directory = located.path if located.path.is_dir() else located.path.parent
    if located.kind == "gguf":
        from lamina.text import from_gguf_file

        return from_gguf_file(located.path).files()
    found: dict[str, bytes] = {}
    for pattern in COMPANIONS:
        for path in sorted(directory.glob(pattern)):
            name = path.relative_to(directory).as_posix()
            if path.is_file() and not name.endswith(".index.json") and name not in (NATIVE, "config.json"):
                found[name] = path.read_bytes()
    return found


def _generation(directory: Path) -> dict[str, Any]:
    path = directory / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if dtype not in named:
        raise LaminaError(unknown("dtype", dtype, named))
    return named[dtype]


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
