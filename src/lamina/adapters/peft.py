"""peft's files of a LoRA: adapter_config.json and adapter_model.safetensors, read and written.

A tensor there is called base_model.model.<path of the module>.lora_A.weight, (rank, in), or ...lora_B.weight, (out,
rank), whatever way round the module keeps its own matrix. Where the layout packs several of our matrices into one
(GPT-2's c_attn), they share its A, and B is cut as the matrix is.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lamina.adapters.attach import Attached, adapted, refuse, wrap
from lamina.adapters.places import Place
from lamina.adapters.spec import LoRASpec, scale
from lamina.errors import CheckpointError, LaminaError
from lamina.layers.lowrank import LowRank
from lamina.model import Model
from lamina.specs import unknown
from lamina.weights.files import Entry, SafetensorsFile, read_json, save_checkpoint
from lamina.weights.headers import shown

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")

READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias")
READ += ("base_model_name_or_path", "init_lora_weights", "target_modules")
SILENT = ("auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out")
SILENT += ("inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_core")
SILENT += ("megatron_config", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type")
"""What says how an adapter was made, or what its tensors say as well. All else changes what it computes."""

KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")
"""Ways of initialising that leave the base as it is. The others (pissa, olora, loftq, ...) take something out of it."""


@dataclass(frozen=True)
class PeftFile:
    """What an adapter was read from: enough to write it back as it was."""

    text: bytes  # of adapter_config.json
    modules: Mapping[str, str]  # what the file calls each place
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def read(
    model: Model,
    directory: Path,
    table: Iterable[Place],
    *,
    named: Callable[[str], str] = lambda name: name,
    source: str | None = None,
) -> list[tuple[str, nn.Parameter]]:
    """Attach the adapter in `directory`, and return its parameters, as `attach` does.

    table: what the layout calls each linear layer; named: what the table calls a tensor of this name. source: where the
    model is from; a warning says so where the adapter was made for another. Raises CheckpointError naming the file and
    what in it is damaged, is for other modules or other shapes, or is more than a LoRA.
    """
    refuse(model)
    where = directory / CONFIG
    config = read_json(where)
    spec = _spec(config, where)
    said = config.get("base_model_name_or_path")
    if isinstance(said, str) and said and source is not None and not _same_source(said, source):
        warnings.warn(f"{where}: this adapter was made for {said!r}, and the model is {source!r}", stacklevel=3)
    if not (directory / WEIGHTS).is_file() and (directory / PICKLE).is_file():
        raise CheckpointError(f"{directory / PICKLE}: a pickle can run code when it is read: save it as {WEIGHTS}")
    file = SafetensorsFile(directory / WEIGHTS)
    pairs = _pairs(file)
    by_name = {place.theirs: place for place in table}
    factors: dict[str, tuple[Tensor, Tensor, float]] = {}
    modules: dict[str, str] = {}
    for module in pairs:
        name = named(f"{module}.weight").removesuffix(".weight")
        if name not in by_name:
            reason = unknown("linear layer", module, by_name)
            raise CheckpointError(f"{file.path}: this model has no layer for it: {reason}")
        if name in modules:
            raise CheckpointError(f"{file.path}: {module} and {modules[name]} are the same layer")
        modules[name] = module
        factors |= _factors(model, file, module, by_name[name], _rank_and_alpha(config, spec, module, where), spec)
    text = where.read_bytes()
    attached = Attached(spec, file=PeftFile(text, modules, dict(file.entries), dict(file.metadata)))
    return wrap(model, attached, factors)


def write(
    model: Model,
    directory: str | os.PathLike[str],
    table: Iterable[Place],
    *,
    called: Callable[[str], str] = lambda name: name,
    source: str | None = None,
    task: str | None = None,
    values: Mapping[str, Tensor] | None = None,
    force: bool = False,
) -> None:
    """Write the adapter of `model` so that peft opens it; one that was read and not changed, byte for byte.

    called: what the model's class in transformers calls a module of the table. values: what stands for the adapter's
    own parameters. Layers that the layout packs into one matrix need one A: where theirs differ, A holds all of them,
    and B has zeros where they do not meet, so that the rank is their sum and the function the same. Raises LaminaError
    where no adapter is attached, and for layers that the layout does not name.
    """
    if model.adapter is None:
        raise LaminaError("no adapter is attached")
    attached: Attached = model.adapter
    file: PeftFile | None = attached.file
    layers, given, rest = adapted(model), values or {}, set(adapted(model))
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    table = tuple(table)
    for place in table:
        parts = [(name, layers.get(name)) for name in place.ours]
        if all(layer is None for _, layer in parts):
            continue
        rest -= set(place.ours)
        first, second = _packed(model, place, parts, given)
        module = called(place.theirs) if file is None else file.modules.get(place.theirs, called(place.theirs))
        tensors[f"{PREFIX}{module}.lora_A.weight"] = first
        tensors[f"{PREFIX}{module}.lora_B.weight"] = second
        ranks[module] = first.shape[0]
    if rest:
        raise LaminaError(f"the Hugging Face layout of this model has no linear layer for {min(rest)}")
    plan = {name: Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if file is not None and plan == dict(file.entries):
        text, metadata = file.text, file.metadata
    else:
        turned = any(place.turned for place in table if any(name in layers for name in place.ours))
        config = _config(attached.spec, ranks, [called(place.theirs) for place in table], turned, source, task)
        text, metadata = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(), {"format": "pt"}
    save_checkpoint(
        directory,
        plan,
        lambda name: tensors[name],
        shard_size=1 << 62,
        extra_files={CONFIG: text},
        metadata=metadata,
        single=WEIGHTS,
        force=force,
    )


def _spec(config: Mapping[str, Any], where: Path) -> LoRASpec:
    """What the configuration says, as a spec. Raises CheckpointError for what is not plain LoRA."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{where}: peft_type is {kind!r}; only 'LORA' is read")
    for name, value in config.items():
        if name not in READ + SILENT and value not in (None, False, [], {}):
            raise CheckpointError(f"{where}: {name} is {_short(value)}; only plain LoRA is read, without it")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{where}: bias is {config['bias']!r}; only 'none' is read")
    way = config.get("init_lora_weights", True)
    if way not in KEEPS_BASE:
        raise CheckpointError(
            f"{where}: init_lora_weights is {way!r}, which changes the base; convert it to plain LoRA"
        )
    fields = {"rank": config.get("r"), "alpha": config.get("lora_alpha"), "dropout": config.get("lora_dropout", 0.0)}
    for name, value in zip(("r", "lora_alpha", "lora_dropout"), fields.values(), strict=True):
        if type(value) not in (int, float) or (name == "r" and type(value) is not int):
            raise CheckpointError(f"{where}: {name} is {_short(value)}; a number was expected")
    rslora = config.get("use_rslora", False)
    if type(rslora) is not bool:
        raise CheckpointError(f"{where}: use_rslora is {_short(rslora)}; true or false was expected")
    named = config.get("target_modules")
    targets = tuple(named) if isinstance(named, list) and named and all(isinstance(one, str) for one in named) else None
    try:
        return LoRASpec(**fields, rslora=rslora, targets=targets)
    except LaminaError as error:
        raise CheckpointError(f"{where}: {error}") from None


def _rank_and_alpha(config: Mapping[str, Any], spec: LoRASpec, module: str, where: Path) -> tuple[int, float]:
    """Of one module: as its entry in a pattern says, or as the adapter has them."""
    found: list[float] = []
    for name, usual in (("rank_pattern", spec.rank), ("alpha_pattern", spec.alpha)):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{where}: {name} is {_short(patterns)}; an object was expected")
        value: Any = usual
        for key, one in reversed(patterns.items()):
            if not re.fullmatch(r"\^?[\w.\-]+\$?", key):
                raise CheckpointError(f"{where}: {name} has {_short(key)}, an expression; only names are read")
            plain = key.removeprefix("^").removesuffix("$")
            if module == plain or (not key.startswith("^") and module.endswith(f".{plain}")):
                value = one
        if type(value) not in (int, float) or not math.isfinite(value) or (name == "rank_pattern" and value < 1):
            raise CheckpointError(f"{where}: {name} has {_short(value)} for {module}; a number was expected")
        found.append(value)
    return int(found[0]), float(found[1])


def _pairs(file: SafetensorsFile) -> list[str]:
    """The modules of the file, each of which has an A and a B."""
    halves: dict[str, set[str]] = {}
    for key in file.entries:
        match = KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(
                f"{file.path}: {shown(key)} is no part of a LoRA of linear layers; nothing else is read"
            )
        halves.setdefault(match[1], set()).add(match[2])
    for module, found in halves.items():
        if found != {"A", "B"}:
            raise CheckpointError(f"{file.path}: {module} has lora_{min(found)} alone; both factors are needed")
    if not halves:
        raise CheckpointError(f"{file.path}: holds no tensors")
    return list(halves)


def _factors(
    model: Model, file: SafetensorsFile, module: str, place: Place, sizes: tuple[int, float], spec: LoRASpec
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A, B and the scale for each of our layers that the module holds."""
    rank, alpha = sizes
    shapes = [tuple(model.get_submodule(name).weight.shape) for name in place.ours]  # pyright: ignore
    wanted = {"A": (rank, shapes[0][1]), "B": (sum(shape[0] for shape in shapes), rank)}
    factors: dict[str, Tensor] = {}
    for letter, shape in wanted.items():
        key = f"{PREFIX}{module}.lora_{letter}.weight"
        found = file.entries[key]
        if tuple(found.shape) != shape:
            raise CheckpointError(
                f"{file.path}: {key} has shape {list(found.shape)}; {module} with rank {rank} needs {list(shape)}"
            )
        if not found.dtype.is_floating_point:
            raise CheckpointError(f"{file.path}: {key} is {found.dtype}; weights must be of a float type")
        factors[letter] = file.read(key).clone()
        if not bool(torch.isfinite(factors[letter]).all()):
            raise CheckpointError(f"{file.path}: {key} holds values that are not finite")
    device = model.embedding.weight.device
    device = torch.device("cpu") if device.type == "meta" else device  # of a model without weights, to be merged later
    parts = place.outputs.load([factors["B"]], [(shape[0], rank) for shape in shapes])
    size = scale(alpha, rank, spec.rslora)
    return {
        name: (factors["A"].clone().to(device), part.to(device), size)
        for name, part in zip(place.ours, parts, strict=True)
    }


def _packed(
    model: Model, place: Place, parts: list[tuple[str, LowRank | None]], given: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The one A and the one B of the layers that a module holds, of which some may have no adapter."""
    firsts, seconds = [], []
    for name, layer in parts:
        if layer is not None:
            firsts.append(given.get(f"{name}.lora_a", layer.lora_a).detach().cpu())
            seconds.append(given.get(f"{name}.lora_b", layer.lora_b).detach().cpu())
    shared = len(firsts) == len(parts) and all(torch.equal(firsts[0], one) for one in firsts)
    if shared:
        return firsts[0], place.outputs.save(seconds)[0]
    rank = sum(one.shape[0] for one in firsts)
    columns, whole, start = iter(seconds), [], 0
    for name, layer in parts:
        rows: int = model.get_submodule(name).weight.shape[0]  # pyright: ignore
        block = seconds[0].new_zeros(rows, rank)
        if layer is not None:
            second = next(columns)
            block[:, start : start + second.shape[1]] = second
            start += second.shape[1]
        whole.append(block)
    return torch.cat(firsts), place.outputs.save(whole)[0]


def _config(
    spec: LoRASpec, ranks: Mapping[str, int], modules: list[str], turned: bool, source: str | None, task: str | None
) -> dict[str, Any]:
    """adapter_config.json, as peft documents it, for modules of these ranks among all that there are."""
    others = {name: rank for name, rank in _short_names(ranks, modules).items() if rank != spec.rank}
    return {
        "alpha_pattern": {
            name: _whole(spec.scale * (math.sqrt(rank) if spec.rslora else rank)) for name, rank in others.items()
        },
        "base_model_name_or_path": source,
        "bias": "none",
        "fan_in_fan_out": turned,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _whole(spec.alpha),
        "lora_dropout": spec.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": others,
        "target_modules": sorted(_short_names(ranks, modules)),
        "task_type": task,
        "use_dora": False,
        "use_rslora": spec.rslora,
    }


def _short_names(ranks: Mapping[str, int], modules: list[str]) -> dict[str, int]:
    """Last parts of names ("q_proj") where every module that ends so is one, of the same rank; else whole names."""
    found: dict[str, int] = {}
    for name, rank in ranks.items():
        last = name.rpartition(".")[2]
        alike = {ranks.get(one) for one in modules if one.rpartition(".")[2] == last}
        found[last if alike == {rank} else name] = rank
    return found


def _whole(number: float) -> float:
    return int(number) if float(number).is_integer() else number


def _same_source(one: str, other: str) -> bool:
    """Whether two names may mean the same model: the same directory, or the same last part."""
    if os.path.exists(one) and os.path.exists(other):
        return os.path.realpath(one) == os.path.realpath(other)
    ends = {Path(name.removeprefix("hf:").partition("@")[0]).name for name in (one, other)}
    return len(ends) == 1


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
