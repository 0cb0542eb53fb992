"""Writing a model: in the Hugging Face layout where that can say its spec, else in the native one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from lamina.errors import LaminaError, UnsupportedError
from lamina.families import FAMILIES, Family, Fields, family
from lamina.locate import Located
from lamina.model import Model, ModelSpec
from lamina.opening import NATIVE, Origin, gguf_tokenizer
from lamina.specs import diff, unknown
from lamina.weights import rules
from lamina.weights.headers import Entry
from lamina.weights.rules import Move, Rule
from lamina.weights.saving import save_checkpoint


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
    """The family whose layout says exactly this spec, and the configuration. Raises UnsupportedError naming a field."""
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


def _bare(moves: list[Move], base: str) -> list[Move]:
    """The moves with `base` taken off their names."""
    return [Move(m.ours, tuple(name.removeprefix(base) for name in m.theirs), m.op) for m in moves] if base else moves


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
    return any(chosen.spec(Fields(config, known)) == spec for known in (None, names))


COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "1_Pooling/config.json")
"""Files beside the weights that are copied as they are: tokenizers, templates, generation settings, pooling."""


def _companions(located: Located) -> dict[str, bytes]:
    directory = located.path if located.path.is_dir() else located.path.parent
    if located.kind == "gguf":
        with tempfile.TemporaryDirectory() as folder:
            gguf_tokenizer(located.path).save(folder)
            return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    found: dict[str, bytes] = {}
    for pattern in COMPANIONS:
        for path in sorted(directory.glob(pattern)):
            name = path.relative_to(directory).as_posix()
            if path.is_file() and not name.endswith(".index.json") and name not in (NATIVE, "config.json"):
                found[name] = path.read_bytes()
    return found


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
