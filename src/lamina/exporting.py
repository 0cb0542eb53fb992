"""Writing a model: in the Hugging Face layout where that can say its spec, else in the native one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lamina.errors import CheckpointError, LaminaError, UnsupportedError
from lamina.families import FAMILIES, Family, Fields, family
from lamina.model import Model, ModelSpec
from lamina.opening import HISTORY, NATIVE, Origin, gguf_tokenizer
from lamina.specs import diff, unknown
from lamina.weights import rules
from lamina.weights.headers import Entry
from lamina.weights.rules import Move, Rule
from lamina.weights.saving import save_checkpoint

FORMATS = ("hf", "auto_map", "native", "gguf")


def save(
    model: Model,
    directory: str | os.PathLike[str],
    format: str = "hf",
    *,
    force: bool = False,
    shard_size: int = 5_000_000_000,
) -> None:
    """Write a model. "hf": transformers' from_pretrained opens it as is; "auto_map": with trust_remote_code=True, by
    code that lies beside the weights; "native": spec.json and our own names; "gguf": see `write_gguf`.

    Raises UnsupportedError naming the field of the spec that the layout cannot say; LaminaError where
    `directory` exists (unless `force`). What was there stays whole until the new one is. Where the model lies on
    several ranks all of them call it, and rank 0 writes.
    """
    if format == "gguf":
        return write_gguf(model, directory, force=force)
    if format not in FORMATS:
        raise LaminaError(unknown("format", format, FORMATS))
    if any(not weight.dtype.is_floating_point for weight in model.buffers()):
        raise UnsupportedError("an int8 model is for decoding only; save the model that it was made from")
    if model.adapter is not None:
        raise LaminaError("an adapter is attached: merge it or detach it first, or write it alone with write_adapter")
    if model.mesh is not None:
        model.mesh.reshard(model)
    parameters = dict(model.named_parameters())

    @lru_cache(maxsize=0 if model.mesh is None else 3)  # files have matrices expert by expert, of three tensors in turn
    def whole(name: str) -> Tensor:
        parameter = parameters[name].detach()
        return parameter if model.mesh is None else model.mesh.whole(parameter)

    dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
    plan, read, write = _planned(
        model.spec, dtypes, whole, model.origin, directory, format, force=force, shard_size=shard_size
    )
    if model.mesh is None:
        write(read)
    else:
        model.mesh.together(plan, read, write)


def write_gguf(model: Model, path: str | os.PathLike[str], stored: str | None = None, *, force: bool = False) -> None:
    """Write a LLaMA, Mistral, Qwen 2 or Qwen 3 and its tokenizer as one GGUF file, for llama.cpp and its like.

    stored: F32, F16, BF16 or Q8_0, of the matrices; by default what the weights are. Vectors are float32, as llama.cpp
    needs them. Raises UnsupportedError for a model or a tokenizer that a GGUF file cannot say; the file appears whole
    or not at all.
    """
    from lamina.families import gguf_writing
    from lamina.weights.gguf_blocks import PLAIN
    from lamina.weights.gguf_writing import Stored
    from lamina.weights.gguf_writing import write_gguf as write

    if Path(path).exists() and not force:
        raise LaminaError(f"{path} is there already; choose another file, or replace it with force")
    if model.mesh is not None or model.adapter is not None:
        raise LaminaError("a GGUF file is of a whole model: merge or detach its adapter, and gather it from its ranks")
    spec, parameters = model.spec, dict(model.named_parameters())
    kinds = {dtype: name for name, dtype in PLAIN.items()}
    kind = stored or kinds.get(model.embedding.weight.dtype, "F32")
    if kind not in gguf_writing.TYPES:
        raise LaminaError(unknown("type of GGUF", kind, gguf_writing.TYPES))
    chosen, config = _sayable(spec, tuple(gguf_writing.ARCHITECTURES))
    metadata = gguf_writing.metadata(config, kind) | _gguf_tokenizer(model.origin, spec)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    moves = rules.bind(chosen.rules(spec), shapes)
    theirs = rules.saver(moves, lambda name: parameters[name].detach())
    called = gguf_writing.names(config)
    source = {called[name]: name for name in rules.their_shapes(moves, shapes)}
    plan = {
        called[name]: Stored(shape, "F32" if len(shape) < 2 else "F16" if kind == "Q8_0" and shape[-1] % 32 else kind)
        for name, shape in rules.their_shapes(moves, shapes).items()
    }
    divisors = gguf_writing.frequencies(config)
    if divisors is not None:
        plan[gguf_writing.FREQUENCIES] = Stored(tuple(divisors.shape), "F32")

    def read(name: str) -> Tensor:
        if name == gguf_writing.FREQUENCIES and divisors is not None:
            return divisors
        return gguf_writing.turned(config, name, theirs(source[name]))

    write(path, metadata, plan, read, lambda written: gguf_writing.check(written, spec))


def _sayable(spec: ModelSpec, model_types: tuple[str, ...]) -> tuple[Family, dict[str, Any]]:
    """The first of some families that says the spec. Raises UnsupportedError with the reason of the first."""
    reasons = []
    for name in model_types:
        try:
            return exportable(spec, only=family(name))
        except UnsupportedError as error:
            reasons.append(str(error).partition(": ")[2].partition("; save with")[0])
    raise UnsupportedError(f"a GGUF file here says {', '.join(model_types)}, and this model is none: {reasons[0]}")


def _gguf_tokenizer(origin: Origin | None, spec: ModelSpec) -> dict[str, object]:
    """The metadata of the tokenizer beside the weights, those of a GGUF file as they are; of a model without one, that
    it has none. Ids that begin, end and pad a text are those of the spec."""
    from lamina.text import from_directory
    from lamina.text.gguf_writing import to_gguf
    from lamina.weights.gguf import GGUFFile

    said: dict[str, object] = {"tokenizer.ggml.model": "no_vocab"}
    if origin is not None and origin.located.kind == "gguf":
        with GGUFFile(origin.located.path) as file:
            said = {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
    elif origin is not None:
        directory = origin.located.path if origin.located.path.is_dir() else origin.located.path.parent
        if (directory / "tokenizer.json").is_file() or any(directory.glob("tokenizer.model")):
            said = to_gguf(from_directory(directory), spec.embedding.vocabulary)
    special = spec.special
    ids = {"bos": special.start, "eos": next(iter(special.end), None), "padding": special.pad}
    keys = {f"tokenizer.ggml.{role}_token_id": number for role, number in ids.items()}
    said = {key: value for key, value in said.items() if key not in keys}
    return said | {key: number for key, number in keys.items() if number is not None}


def save_weights(
    spec: ModelSpec,
    dtypes: Mapping[str, torch.dtype],
    read: Callable[[str], Tensor],
    directory: str | os.PathLike[str],
    format: str = "hf",
    *,
    origin: Origin | None = None,
    more: Mapping[str, bytes | None] = MappingProxyType({}),
    force: bool = False,
    shard_size: int = 5_000_000_000,
) -> None:
    """Write a model of which there is only the spec, and what reads one weight at a time.

    `dtypes` has every parameter of the spec. `more`: files that go beside those of `save`; None: this one does not.
    Raises as that does.
    """
    _, known, write = _planned(
        spec, dtypes, read, origin, directory, format, force=force, shard_size=shard_size, more=more
    )
    write(known)


Read = Callable[[str], Tensor]


def _planned(
    spec: ModelSpec,
    dtypes: Mapping[str, torch.dtype],
    whole: Read,
    origin: Origin | None,
    directory: str | os.PathLike[str],
    format: str,
    *,
    force: bool,
    shard_size: int,
    more: Mapping[str, bytes | None] = MappingProxyType({}),
) -> tuple[dict[str, Entry], Read, Callable[[Read], None]]:
    """The tensors of the files, what reads one of them, and what writes the directory with such a reader."""
    shapes = {name: tuple(p.shape) for name, p in spec.build(device="meta").named_parameters()}
    files = {} if origin is None else _companions(origin)
    if origin is not None and origin.history:
        files[HISTORY] = (json.dumps(origin.history, indent=2) + "\n").encode()
    shards = None
    if format == "native":
        moves = rules.bind([Rule(name, name) for name in shapes], shapes)
        files = {name: data for name, data in files.items() if name != "config.json"}
        files[NATIVE] = spec.to_json().encode()
    else:
        said_by = family("lamina") if format == "auto_map" else None
        chosen, config = exportable(spec, None if origin is None else origin.family, said_by)
        origin = origin if origin is not None and origin.family is chosen else None
        moves = rules.bind(chosen.rules(spec), shapes)
        written = {name: dtypes[move.ours[0]] for move in moves for name in move.theirs}
        files["config.json"] = _config_text(spec, next(iter(dtypes.values())), chosen, config, written, origin)
        called = _called(spec, chosen, origin, written)
        moves = [Move(move.ours, tuple(map(called, move.theirs)), move.op) for move in moves]
        files |= {} if chosen.code is None else chosen.code(spec)
        shards = None if origin is None else origin.shards
    read = rules.saver(moves, whole)
    theirs = {name: dtypes[move.ours[0]] for move in moves for name in move.theirs}
    plan = {n: Entry(n, theirs[n], shape) for n, shape in rules.their_shapes(moves, shapes).items()}
    if format != "native":
        read = _with_extras(spec, chosen, origin, called, plan, read)
    said: dict[str, Any] = {} if origin is None or origin.metadata is None else {"metadata": origin.metadata}
    if format != "native" and origin is not None and plan == {entry.name: entry for entry in origin.stored.values()}:
        said["index"] = origin.index

    def write(read: Read) -> None:
        beside = {name: data for name, data in {**files, **more}.items() if data is not None}
        save_checkpoint(
            directory, plan, read, shard_size=shard_size, shards=shards, extra_files=beside, force=force, **said
        )

    return plan, read, write


def exportable(
    spec: ModelSpec, preferred: Family | None = None, only: Family | None = None
) -> tuple[Family, dict[str, Any]]:
    """The family whose layout says exactly this spec, and the configuration. Raises UnsupportedError naming a field.

    Families that bring their own code are not asked, but where one is `preferred` or the `only` one."""
    reasons: list[tuple[int, str]] = []  # how far a family is from saying it, and why it cannot
    shapes = {name: tuple(p.shape) for name, p in spec.build(device="meta").named_parameters()}
    candidates = [preferred] if preferred is not None else []
    others = [family(name) for name in FAMILIES if preferred is None or name != preferred.model_type]
    candidates += [one for one in others if one.code is None]
    for one in [only] if only is not None else candidates:
        if one.config is None:
            continue
        uncovered = None
        try:
            config = one.config(spec)
            try:
                names = frozenset(name for move in rules.bind(one.rules(spec), shapes) for name in move.theirs)
            except CheckpointError as error:  # a field of the spec says it better, where one differs
                names, uncovered = None, str(error)
            back = one.spec(Fields(config, names, f"{one.model_type} config"))
        except (LaminaError, AttributeError, ValueError) as error:
            far = isinstance(error, AttributeError) or str(error).startswith(("encoder is None", "decoder is None"))
            reasons.append((20_000 if far else 10_000, str(error)))
            continue
        back = back.replace(initial=spec.initial)  # written where it can be; no weight of a file depends on it
        if back == spec and uncovered is None:
            return one, config
        if uncovered is not None and back == spec:
            reasons.append((1, uncovered))
            continue
        differing = diff(back, spec)
        path, said, meant = differing[0]
        reason = f"{path} is {_brief(meant)}, and {one.model_type}'s config.json can only say {_brief(said)}"
        reasons.append((len(differing), f"{reason}; save with format='native'"))
    raise UnsupportedError(
        f"not exportable to the Hugging Face layout: {min(reasons, key=lambda reason: reason[0])[1]}"
    )


def layout(spec: ModelSpec, preferred: Family | None = None) -> str:
    """The first of FORMATS that can say the spec."""
    for format, only in (("hf", None), ("auto_map", family("lamina"))):
        try:
            exportable(spec, preferred, only)
        except UnsupportedError:
            continue
        return format
    return "native"


def _called(spec: ModelSpec, chosen: Family, origin: Origin | None, written: Mapping[str, Any]) -> Callable[[str], str]:
    """What the new file calls each tensor: what the old one did where it had them all, else today's names."""
    if origin is not None and written.keys() <= origin.stored.keys():
        return lambda name: origin.stored[name].name
    if origin is not None and origin.spec == spec:
        bare = origin.bare
    else:  # transformers takes a file with a head and without the prefix for one whose head is missing
        bare = spec.head is None and spec.labels is None
    return lambda name: name.removeprefix(chosen.base) if bare else name


def _with_extras(
    spec: ModelSpec,
    chosen: Family,
    origin: Origin | None,
    called: Callable[[str], str],
    plan: dict[str, Entry],
    read: Callable[[str], Tensor],
) -> Callable[[str], Tensor]:
    """Add to `plan` what the source stored beside the weights: unused tensors, and second copies of tied ones."""
    extra: dict[str, Tensor] = {}
    if origin is None:  # transformers asks for both of two names, also where one is not used
        twins = {twin: one for twin, one in chosen.aliases.items() if twin in plan and chosen.unread(one)}
        extra = {one: read(twin) for twin, one in twins.items() if one not in plan}
        if spec.head is not None and not spec.head.tied:  # transformers then keeps the tables of the stacks apart too
            extra |= {one: read(first) for one, first in chosen.copies.items() if first in plan and one not in plan}
        dtype = next(iter(plan.values())).dtype
        extra |= {called(name): torch.zeros(shape, dtype=dtype) for name, shape in chosen.zeros(spec).items()}
    else:
        extra = {called(name): tensor for name, tensor in origin.extras.items()}
        tied = spec.head is not None and spec.head.tied
        same = {**chosen.copies, **(chosen.aliases if tied else {})}
        extra |= {called(twin): read(called(same[twin])) for twin in origin.twins if twin in same}
    for name, tensor in extra.items():
        plan[name] = Entry(name, tensor.dtype, tuple(tensor.shape))
    return lambda name: extra[name] if name in extra else read(name)


def _config_text(
    spec: ModelSpec,
    main: torch.dtype,
    chosen: Family,
    config: dict[str, Any],
    written: Mapping[str, torch.dtype],
    origin: Origin | None,
) -> bytes:
    """config.json: as it was where it still says the truth, else ours with what we do not interpret carried over.

    A model that gained a head is not what its old text says, though the text and the new tensors together would be.
    """
    dtype = str(main).removeprefix("torch.")
    carried: dict[str, Any] = {}
    if origin is not None:
        kept = all(n in origin.stored and origin.stored[n].dtype == dtype for n, dtype in written.items())
        said = origin.config.get("dtype", origin.config.get("torch_dtype"))
        fields = Fields(origin.config, frozenset(written))
        same = origin.spec == spec == chosen.spec(fields)
        if origin.config_text is not None and (kept or said in (None, dtype)) and same:
            return origin.config_text
        old = ("rope_theta", "rope_scaling", "rope_local_base_freq", "torch_dtype", "quantization_config")
        if origin.spec is not None and origin.spec.labels != spec.labels:  # names of other labels
            old += ("id2label", "label2id", "problem_type")
        carried = {name: value for name, value in origin.config.items() if name not in old}
    return (json.dumps({**carried, **config, "dtype": dtype}, indent=2) + "\n").encode()


COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "1_Pooling/config.json")
"""Files beside the weights that are copied as they are: tokenizers, templates, generation settings, pooling."""


def _companions(origin: Origin) -> dict[str, bytes]:
    located = origin.located
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
    if located.kind == "ctranslate2":  # its own lists of tokens, which tokenizer.json says too
        found = {name: data for name, data in found.items() if not name.startswith("vocabulary.")}
        found["generation_config.json"] = (json.dumps(origin.generation, indent=2) + "\n").encode()
    return found


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
