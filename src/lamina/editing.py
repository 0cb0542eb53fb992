"""Surgery on models and on checkpoints: a plan is applied, what was kept is measured, and both are remembered."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamina.accounting import Account, account
from lamina.adapters import adapted, peft
from lamina.adapting import read_adapter
from lamina.durable import write_file
from lamina.errors import LaminaError, UnsupportedError
from lamina.exporting import save_weights
from lamina.filling import Stored
from lamina.generation import Score, measure
from lamina.generation.files import Ids
from lamina.locate import Located, locate
from lamina.model import Model, ModelSpec
from lamina.opening import HISTORY, Opened, Origin, changed_in, open_source, read_history
from lamina.source import load, tokenizer
from lamina.specs import unknown
from lamina.surgery import (
    Applied,
    Operation,
    Other,
    Others,
    Outside,
    Plan,
    SwapTokenizer,
    Verdict,
    apply,
    begun,
    build,
    compare,
    read_plan,
    said,
)
from lamina.surgery.calibration import LONGEST, TOKENS, Texts, random_texts, text_in, texts_by
from lamina.surgery.verdict import side_of
from lamina.surgery.weights import dtype_of

GENERATION = "generation_config.json"
TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "sentencepiece.bpe.model", "spiece.model")
"""Files one of which a checkpoint with a tokenizer has."""


def edit(
    model: Model,
    plan: Plan,
    *,
    texts: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    **wrong: Any,
) -> tuple[Model, Verdict]:
    """A model after a plan of operations, in evaluation mode, and the verdict on what was kept.

    plan: a YAML file, or a list of {"op": name, ...}. texts: ids that the verdict is found on; by default the packaged
    sample, in the tokens of the model, and random ids for a model without a tokenizer. seed: of weights that are new.
    `model` is left as it is; weights that no operation changes are shared with it.
    Raises LaminaError for a plan that cannot be done, naming operation and field.
    """
    if wrong:
        raise LaminaError(unknown("argument of edit", next(iter(wrong)), ("texts", "seed", "progress")))
    if model.mesh is not None or model.adapter is not None:
        raise LaminaError("edit is for a whole model: merge or detach its adapter, and gather it from its ranks first")
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    operations = read_plan(plan)
    if any(isinstance(operation, SwapTokenizer) for operation in operations):
        raise UnsupportedError(
            "a tokenizer lies beside the weights: lamina edit SOURCE PLAN.yaml -o DIRECTORY swaps it"
        )
    located = None if model.origin is None else model.origin.located
    texts_here = texts_of(model.spec, model.origin)
    done = apply(operations, model.spec, state, Outside(others(located), texts_here))
    new, _ = build(done.spec, done.weights, seed=seed)
    training = model.training
    try:
        verdict = compare(model.eval(), new, texts_here(None) if texts is None else texts, progress=progress)
    finally:
        model.train(training)
    new.origin = _origin(model, done, state, verdict)
    return new, verdict


@dataclass(frozen=True)
class Costs:
    """A model before and after."""

    before: Account
    after: Account


def costs(done: Applied, context: int | None = None) -> Costs:
    """Parameters, arithmetic and cache of both specs, by default at the end of the context of the old one."""
    context = context or done.before.context or LONGEST
    return Costs(account(done.before, context=context), account(done.spec, context=context))


def planned(source: str | os.PathLike[str], plan: Plan) -> tuple[Opened, Applied]:
    """What a plan would do to a SOURCE: files are opened, and no weight is read."""
    operations = read_plan(plan)
    located = locate(source)
    if located.kind == "published":
        raise LaminaError(f"{located.name!r} is a published architecture and has no weights here; name a checkpoint")
    opened = open_source(located)
    outside = Outside(others(located), texts_of(opened.spec, opened.origin))
    return opened, apply(_with_places(operations, located), opened.spec, Stored(opened), outside)


def others(own: Located | None) -> Others:
    """What opens the other models of a plan for a model that lies there, or nowhere."""

    def open_other(source: str) -> Other:
        located = locate(source)
        if located.kind == "published":
            raise LaminaError(f"{source!r} is a published architecture and has no weights here; name a checkpoint")
        if (located.path / peft.CONFIG).is_file():
            return _adapter(source, own)
        opened = open_source(located)
        ids = [None if one is None else _ids(one) for one in (own, located)]
        return Other(opened.spec, Stored(opened), None if None in ids else ids[0] == ids[1])

    return open_other


def _adapter(source: str, own: Located | None) -> Other:
    """The change of each layer of the model at `own`, of a LoRA that peft wrote: A, B and the scale."""
    if own is None:
        raise LaminaError(f"{source} is an adapter, and names layers as files do; this model was not read from one")
    opened = open_source(own)
    model = opened.spec.build(device="meta")
    model.origin = opened.origin
    read_adapter(model, source)
    weights: dict[str, Tensor] = {}
    for name, layer in adapted(model).items():
        scale = torch.tensor(layer.scale, dtype=torch.float64)
        weights |= {f"{name}.lora_a": layer.lora_a.detach(), f"{name}.lora_b": layer.lora_b.detach()}
        weights[f"{name}.scale"] = scale
    return Other(opened.spec, weights)


def _ids(located: Located) -> dict[str, int] | None:
    """Which id each token of a checkpoint has; None where it has no tokenizer."""
    directory = located.path if located.path.is_dir() else located.path.parent
    if located.kind != "gguf" and not any((directory / name).is_file() for name in TOKENIZERS):
        return None
    return tokenizer(located.path).tokens


def _with_places(operations: Sequence[Operation], located: Located) -> list[Operation]:
    """The operations, those on tokenizers with the place of each."""
    place, found = located, []
    for operation in operations:
        if isinstance(operation, SwapTokenizer):
            old = operation.old or str(_tokenizer_place(place))
            place = locate(operation.folder)
            operation = operation.replace(folder=str(_tokenizer_place(place)), old=old)
        found.append(operation)
    return found


def _tokenizer_place(located: Located) -> Path:
    if located.kind == "published":
        raise LaminaError(f"{located.name!r} is a published architecture and has no tokenizer here")
    whole = located.kind == "gguf" or located.path.is_dir()
    return located.path if whole else located.path.parent


def has_verdict(done: Applied) -> bool:
    """Whether both models can be compared: where a text is other ids after a plan, by what it costs each, a byte."""
    if not any(isinstance(operation, SwapTokenizer) for operation in done.operations):
        return True
    specs = done.before, done.spec
    return all(spec.decoder is not None and spec.head is not None and not spec.two_stacks for spec in specs)


def write(
    opened: Opened,
    done: Applied,
    directory: str | os.PathLike[str],
    format: str = "hf",
    *,
    seed: int = 0,
    force: bool = False,
    shard_size: int = 5_000_000_000,
) -> dict[str, Any]:
    """Write what a plan made of a checkpoint, one weight at a time, and return its line of the history."""
    weights, main = done.weights, dtype_of(done.weights, next(iter(done.weights)))
    fresh = begun(done.spec, list(done.new), seed=seed, dtype=main)
    dtypes = {weight.name: main if weight.name in fresh else dtype_of(weights, weight.name) for weight in done.table}

    def read(name: str) -> Tensor:
        return fresh[name] if name in fresh else weights[name]

    source = str(opened.origin.located.name or opened.origin.located.path)
    line = entry(done, source, digest(Stored(opened)), opened.origin.history)
    history = [*opened.origin.history, line]
    more: dict[str, bytes | None] = {HISTORY: (json.dumps(history, indent=2) + "\n").encode()}
    origin = opened.origin
    for swap in [operation for operation in done.operations if isinstance(operation, SwapTokenizer)]:
        of = swap.counterparts()
        said = of.config(origin.generation)
        origin = dataclasses.replace(origin, config=of.config(origin.config), config_text=None, generation=said)
        more |= of.files() | ({GENERATION: (json.dumps(said, indent=2) + "\n").encode()} if said else {})
    save_weights(
        done.spec,
        dtypes,
        read,
        directory,
        format,
        origin=origin,
        more=more,
        force=force,
        shard_size=shard_size,
    )
    if any(done.fits):  # known now that the weights have been made
        line["fits"] = list(done.fits)
        write_file(Path(directory) / HISTORY, (json.dumps(history, indent=2) + "\n").encode())
    return line


def entry(done: Applied, source: str, source_digest: str, history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A line more of the history of a checkpoint. What earlier lines changed is changed still, by its new name."""
    earlier = set(changed_in(history))
    names = {weight.name for weight in done.table if earlier & set(weight.sources)} | set(done.changed)
    return {
        "source": source,
        "source_sha256": source_digest,
        "others_sha256": {source: digest(other.weights) for source, other in done.others.items()},
        "plan": [said(operation) for operation in done.operations],
        "promises": [{"kept": promise.kept, "why": promise.why} for promise in done.promises],
        "undo": None if done.undo is None else [said(operation) for operation in done.undo],
        "changed": [weight.name for weight in done.table if weight.name in names],
    }


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of all weights by name, type and bytes."""
    found = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def texts_of(spec: ModelSpec, origin: Origin | None, longest: int = LONGEST) -> Texts:
    """What a model reads, as ids, by its own tokenizer; random ids where it has none."""

    def texts(path: str | None) -> Sequence[Sequence[int]]:
        words = None
        if origin is not None:
            try:
                words = tokenizer(origin.located.path)
            except LaminaError:
                if path is not None:
                    raise
        return (random_texts(spec) if words is None else texts_by(words, spec, longest))(path)

    return texts


def _origin(model: Model, done: Applied, state: Mapping[str, Tensor], verdict: Verdict) -> Any:
    """Where the new model comes from: the files of the old one, with a line more of history."""
    if model.origin is None:
        return None
    located = model.origin.located
    line = entry(done, str(located.name or located.path), digest(state), model.origin.history) | {
        "verdict": verdict.to_dict()
    }
    line |= {"fits": list(done.fits)} if any(done.fits) else {}
    return dataclasses.replace(model.origin, history=[*model.origin.history, line])


def undoing(source: str | os.PathLike[str]) -> list[Mapping[str, Any]]:
    """What leads back from the last operations on a checkpoint. Raises LaminaError where nothing does."""
    history = open_source(locate(source)).origin.history
    if not history:
        raise LaminaError(f"{source} has no {HISTORY}: nothing was done to it that could be undone")
    back = history[-1].get("undo")
    if not isinstance(back, list) or not back:
        raise LaminaError(f"the last operations on {source} cannot be undone: they were not exact")
    return back


def judge(
    before: str | os.PathLike[str],
    after: str | os.PathLike[str],
    *,
    text: Path | None = None,
    tokens: int | None = None,
    length: int = LONGEST,
    progress: Callable[[int], None] | None = None,
) -> Verdict:
    """Compare a checkpoint with what was made of it, and note the verdict in the history of that.

    text: a file; None: the packaged sample. tokens: at most so many of it. length: tokens that are read at one time, at
    most what the old model reads. After a swap of tokenizers each reads the text by its own.
    """
    old, new = load(before), load(after)
    limit, chosen = TOKENS if tokens is None else tokens, []
    path = Path(after) / HISTORY
    history = read_history(path)
    if any(one["op"] == SwapTokenizer.NAME for one in history[-1]["plan"]):
        verdict = _by_bytes(old, new, text, limit, length, progress)
    else:
        for one in texts_of(old.spec, old.origin, length)(None if text is None else str(text)):
            chosen.append(one[: max(limit - sum(map(len, chosen)), 0)])
        verdict = compare(old, new, [one for one in chosen if one], progress=progress)
    history[-1]["verdict"] = verdict.to_dict()
    write_file(path, (json.dumps(history, indent=2) + "\n").encode())
    return verdict


def _by_bytes(
    old: Model, new: Model, text: Path | None, limit: int, length: int, progress: Callable[[int], None] | None
) -> Verdict:
    """What the same text costs both, a byte, each by its own tokenizer: its beginning, about `limit` tokens of the old
    one. Nothing can be compared token by token."""
    whole = text_in(text)
    cut, sides, tokens = whole, [], 0
    for model in (old, new):
        assert model.origin is not None
        words = tokenizer(model.origin.located.path)
        ids = words.encode(cut, special=False, control=False)
        if model is old and len(ids) > limit:
            cut = whole[: len(whole) * limit // len(ids)]
            ids = words.encode(cut, special=False, control=False)
        read, found = Ids([ids], words), Score()
        window = min(length, model.spec.context or length)
        for found in measure(model, read, begin=read.begin, window=window):
            if progress is not None:
                progress(tokens + found.tokens)
        found.bytes = read.predicted(len(cut.encode()))
        if not found.tokens or found.bytes < 1:
            raise LaminaError("a verdict needs a text of at least two tokens")
        tokens += found.tokens
        figures = found.perplexity, found.tokens_per_second, found.bits_per_byte
        sides.append(side_of(model, ids[:window], *figures))
    return Verdict("changed", tokens, None, None, None, (), *sides)
