"""From a configuration to what a run needs: the model, the data, and the model that comes out at the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lamina.accounting import account
from lamina.adapters import FACTORS, attach
from lamina.adapting import table_of
from lamina.data import Prepared, open_prepared
from lamina.errors import LaminaError, UnsupportedError
from lamina.families import FAMILIES, Fields, family, sizes
from lamina.locate import locate
from lamina.model import Model, ModelSpec
from lamina.objectives import Neighbours, Task, Taught
from lamina.opening import Origin, changed_in, open_source
from lamina.retrieve import open_database
from lamina.retrieve.neighbours import of_text
from lamina.source import load, save, tokenizer
from lamina.specs import Spec, unknown
from lamina.specs import diff as differences
from lamina.train.roles import freeze
from lamina.train.specs import DataChoice, ModelChoice, TrainSpec

LATER = (
    "evaluation",
    "checkpoints",
    "log",
    "mesh",
    "data.workers",
    "loop.micro",
    "loop.max_skips",
    "loop.recompute",
    "adapter.merge",
)
"""What may differ when a run goes on: how it is watched, and in what pieces it is read."""

NOTHING = "the source has no history.json: nothing was done to it with lamina edit; name paths with model.train"

ROOM = 1 << 20
"""A vocabulary that has all ids of any published one."""


def data_of(choice: DataChoice) -> tuple[Prepared, Prepared | None]:
    """What is trained on, and what is held out. Raises LaminaError where the two have different tokenizers."""
    train = open_prepared(choice.train)
    if choice.validation is None:
        return train, None
    held = open_prepared(choice.validation)
    if held.tokenizer_hash != train.tokenizer_hash:
        raise LaminaError(f"{choice.validation} was prepared with another tokenizer than {choice.train}")
    return train, held


def spec_of(choice: ModelChoice, data: Prepared) -> ModelSpec | None:
    """The architecture of a model that begins from its initial values; None where a checkpoint says it."""
    if choice.source is not None:
        return None
    if choice.spec is not None:
        try:
            return ModelSpec.from_json(Path(choice.spec).read_text(encoding="utf-8"))
        except OSError as error:
            raise LaminaError(f"model.spec: {choice.spec}: {error.strerror}") from None
        except LaminaError as error:
            raise LaminaError(f"model.spec: {choice.spec}: {error}") from None
    published: dict[str, Any] = {}
    if choice.size is not None:
        if choice.size not in sizes():
            raise LaminaError(f"model.size: {unknown('published size', choice.size, sizes())}")
        model_type = sizes()[choice.size]
        published = family(model_type).sizes[choice.size]
    else:
        assert choice.family is not None
        model_type = choice.family
        if model_type not in FAMILIES:
            raise LaminaError(f"model.family: {unknown('model_type', model_type, FAMILIES)}")
    # The second name is that of families without files of their own: PaLM, GLaM, RETRO.
    ids = {"vocab_size": data.vocabulary, "vocabulary": data.vocabulary, **_special(data)}
    config = {**published, **ids, **choice.config, "model_type": model_type}
    return family(model_type).spec(Fields(_begun(config), where="model.config"))


def _special(data: Prepared) -> dict[str, Any]:
    """The ids of the data's tokenizer under the names of config.json, where the user says none."""
    words = data.tokenizer()
    return {
        "bos_token_id": words.bos if words.bos is not None else words.eos,
        "eos_token_id": words.eos,
        "pad_token_id": words.pad,
    }


def _begun(config: dict[str, Any]) -> dict[str, Any]:
    """With the id that a decoder of two stacks begins with, where the user says none: that of the token which has this
    part in the ids that the family is published with. T5's begins with its padding, BART's with its end."""
    ids = ("pad_token_id", "eos_token_id", "bos_token_id")
    plain = {name: value for name, value in config.items() if name not in ids}
    plain |= {"vocab_size": ROOM, "vocabulary": ROOM}
    published = family(config["model_type"]).spec(Fields(plain, where="model.config")).special
    parts = zip(ids, (published.pad, next(iter(published.end), None), published.start), strict=True)
    part = next((name for name, number in parts if number == published.decoder_start), None)
    if published.decoder_start is None or "decoder_start_token_id" in config or part is None:
        return config
    said = config[part]
    return config | {"decoder_start_token_id": said[0] if isinstance(said, list) else said}


def model_of(choice: ModelChoice, data: Prepared, *, seed: int, device: torch.device | str = "cpu") -> Model:
    """The model that is trained, in float32 and in training mode."""
    spec = spec_of(choice, data)
    if spec is None:
        assert choice.source is not None
        data.check_tokenizer(tokenizer(choice.source))
        model = load(choice.source, dtype="float32", device=device)
        for name, weight in list(model.named_parameters()):  # mapped from a file, which must not change
            weight.data = weight.data.clone()
            weight.requires_grad_(not name.endswith("router.correction"))
    else:
        model = spec.build(device=device, seed=seed)
    if data.vocabulary > model.spec.embedding.vocabulary:
        raise LaminaError(
            f"the data has {data.vocabulary:,} tokens and the model an embedding of"
            f" {model.spec.embedding.vocabulary:,}: prepare the data with the model's tokenizer"
        )
    return model.train()


@dataclass(frozen=True)
class Beside:
    """Opens what an objective needs beside the data (`lamina.objectives.Opening`)."""

    data: Prepared
    dtype: str | None  # of a teacher; None: as it is stored
    device: torch.device | str = "cpu"

    def model(self, source: str) -> Model:
        """A teacher. Raises LaminaError where its tokenizer is not that of the data."""
        self.data.check_tokenizer(tokenizer(source))
        return load(source, dtype=self.dtype, device=self.device)

    def neighbours(self, index: str, directories: Sequence[str]) -> tuple[Callable[[Prepared], Neighbours], int]:
        database = open_database(index)
        database.check_tokenizer(self.data.tokenizer())
        return partial(of_text, directories, database), database.spec.chunk


def trained(spec: TrainSpec, model: Model) -> list[tuple[str, nn.Parameter]]:
    """Attach the adapter where there is one, stop the gradients of what is frozen, and return what is trained.

    An adapter needs the names of the Hugging Face layout for its files: where that cannot say the model, this raises
    UnsupportedError before anything is trained.
    """
    if spec.adapter is not None:
        attach(model, spec.adapter, spec.seed, table_of(model))
    return freeze(model, spec.model.freeze, spec.model.train if spec.model.unfreeze is None else _changed(model))


def _changed(model: Model) -> tuple[str, ...]:
    """The weights that operations changed, as the history of its checkpoint says."""
    history = [] if model.origin is None else model.origin.history
    if not history:
        raise LaminaError(f"model.unfreeze: {NOTHING}")
    changed = changed_in(history)
    if not changed:
        raise LaminaError("model.unfreeze: the history of the source names no weight that was changed")
    return tuple(changed)


def fingerprint(model: Model) -> str:
    """The sha256 of the weights that an adapter does not change, by which a run knows its model again."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if name.rpartition(".")[2] not in FACTORS:
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def flops(spec: TrainSpec, architecture: ModelSpec, origin: Origin | None, task: Task) -> int:
    """Arithmetic of a token in training: forward, the gradients of what is trained, and a teacher's forward. With an
    adapter the matrices have no gradients, which a third of it is for; the adapter's own products, rank / width of the
    others, are not counted."""
    length = min(spec.data.length, architecture.context or spec.data.length)
    if spec.adapter is None:
        whole = architecture.build(device="meta")
        whole.origin = origin
        names = [name for name, _ in trained(spec, whole)]
        total = account(architecture, 1, length, trained=names).flops_train_per_token
    else:
        total = 2 * account(architecture, 1, length).flops_prefill // length
    if isinstance(task, Taught):
        total += account(task.teacher.spec, 1, length).flops_prefill // length
    return total // 2 if architecture.two_stacks else total  # what is read and what is written both count as tokens


def fits(spec: TrainSpec, model: Model) -> None:
    """Raise LaminaError where the objective, the length or the prompts are not for this model."""
    spec.objective.fits(model.spec)
    if spec.evaluation.prompts and (model.decoder is None or model.head is None or not model.spec.reads_ids):
        raise UnsupportedError("evaluation.prompts are for models that read ids and write a text")
    context, learned = model.spec.context, spec.data.length
    if context is not None and learned > context:
        raise LaminaError(f"data.length is {learned}; this model reads at most {context} tokens")


def unlike(before: TrainSpec, now: TrainSpec) -> list[str]:
    """The fields that differ between a run and the configuration that it is to go on with, and may not."""
    rows = differences(before, now)
    return [
        f"{path}: {_short(old)} -> {_short(new)}"
        for path, old, new in rows
        if not any(path == name or path.startswith(f"{name}.") for name in LATER)
    ]


def _short(value: Any) -> str:
    text = value.to_json() if isinstance(value, Spec) else json.dumps(value, default=str)
    return text if len(text) < 60 else f"{text[:57]}..."


def filled(model: Model, tensors: Mapping[str, Tensor]) -> Model:
    """The same model with these weights, on the CPU and in evaluation mode."""
    made = model.spec.build(device="meta").eval()
    made.load_state_dict({name: tensors[name].detach().cpu() for name in tensors}, assign=True)
    made.origin = None if model.origin is None else replace(model.origin, history=_trained(model.origin.history))
    return made


def _trained(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The history of a model that has been trained since: what operations changed cannot be undone any more."""
    if not history:
        return []
    line = {"plan": [], "promises": [{"kept": "lossy", "why": "trained"}], "undo": None}
    return [*history, line | {"changed": changed_in(history)}]


def write(model: Model, tensors: Mapping[str, Tensor], directory: Path, data: Prepared) -> str:
    """The model with these weights, as a source that `lamina.load` opens, with its tokenizer beside: "hf" where the
    Hugging Face layout can say it, else "native"."""
    from lamina.exporting import exportable

    made = filled(model, tensors)
    try:
        exportable(model.spec, None if model.origin is None else model.origin.family)
        layout = "hf"
    except UnsupportedError:
        layout = "native"
    save(made, directory, layout, force=True)
    if model.origin is None:
        data.tokenizer().save(directory)
    return layout


def plan(spec: TrainSpec) -> dict[str, Any]:
    """What a run would read, compute and hold, without building it."""
    data, held = data_of(spec.data)
    architecture = spec_of(spec.model, data)
    opened = None
    if architecture is None:
        assert spec.model.source is not None
        opened = open_source(locate(spec.model.source))
        architecture = opened.spec
    made = architecture.build(device="meta")
    made.origin = None if opened is None else opened.origin
    fits(spec, made)
    learning = trained(spec, made)
    task = spec.objective.ready(Beside(data, None))
    task.fits(architecture)
    examples = len(task.examples(data, spec.data.length))
    if held is not None:
        task.examples(held, spec.data.length)
    if not examples:
        raise LaminaError(f"{spec.data.train}: holds no example of {spec.data.length} tokens")
    tokens = spec.loop.steps * spec.loop.batch * spec.data.length * (2 if architecture.two_stacks else 1)
    counts = sum(weight.numel() for weight in made.parameters()), sum(weight.numel() for _, weight in learning)
    half = 2 if spec.loop.precision != "float32" else 0
    return {
        "parameters": counts[0],
        "trained": counts[1],
        "examples": examples,
        "steps": spec.loop.steps,
        "tokens": tokens,
        "epochs": spec.loop.steps * spec.loop.batch / examples,
        "flops": tokens * flops(spec, architecture, made.origin, task),
        "bytes": counts[0] * (half or 4) + counts[1] * (12 + (4 if half else 0)),
    }
