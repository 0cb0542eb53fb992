"""Checks of a whole model: what it was built from, what it repeats, and what backends make of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lamina.attend import BACKENDS
from lamina.conformance.report import Difference, Row, gap, judged, left_out
from lamina.conformance.trial import random_ids, random_sources, read, text_length
from lamina.errors import LaminaError, UnsupportedError
from lamina.generation import generate
from lamina.layers import Record
from lamina.model import Model, ModelSpec


def finite_weights(model: Model) -> Iterator[Row]:
    bad: dict[str, int] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        # The sum is finite unless a number is not, or it overflows: only then is every number looked at.
        suspect = tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum(dtype=torch.float64)))
        if suspect and (count := int((~torch.isfinite(tensor)).sum())):
            bad[name] = count
    said = f"every number of {sum(1 for _ in model.parameters())} tensors"
    note = ", ".join(f"{name} has {count} that are NaN or infinite" for name, count in list(bad.items())[:3])
    yield judged("weights are finite", said, float(sum(bad.values())), note=note)


def spec_as_json(model: Model) -> Iterator[Row]:
    text = model.spec.to_json()
    again = ModelSpec.from_json(text)
    same = again == model.spec and json.loads(again.to_json()) == json.loads(text)
    yield judged("the spec survives JSON", "the spec, and its JSON read again", float(not same))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    built = {name: tuple(p.shape) for name, p in again.build(device="meta").named_parameters()}
    yield judged("the spec says every shape", f"{len(shapes)} parameters", float(shapes != built))


def repeated_forward(model: Model) -> Iterator[Row]:
    ids = random_ids(model, 2, text_length(model))
    first, second = read(model, ids), read(model, ids)
    worst = max(gap(a, b) for a, b in zip(first, second, strict=True))
    yield judged("the same input gives the same bits", "two forwards", worst)
    recorded = read(model, ids, record=Record("*"))
    worst = max(gap(a, b) for a, b in zip(first, recorded, strict=True))
    yield judged("recording changes no bit", "a forward that records everything, and one that records nothing", worst)


def repeated_generation(model: Model) -> Iterator[Row]:
    name = "generating twice gives the same"
    if model.decoder is None or model.head is None:
        yield left_out(name, "the model does not generate")
        return
    reads = {model.reads: random_sources(model, [4])}
    room = min(6, (model.spec.context or 10) - 4)
    ways: dict[str, dict[str, Any]] = {"greedy": {}, "sampled with a seed": {"temperature": 1.0, "seed": 7}}
    for said, options in ways.items():
        first, second = (generate(model, **reads, max_new_tokens=room, **options) for _ in range(2))
        yield judged(name, f"{room} tokens, {said}", float(not torch.equal(first, second)))


def backends(model: Model) -> Iterator[Row]:
    ids = random_ids(model, 2, text_length(model))
    oracle = read(model, ids, backend="dense")
    for backend in (None, *(name for name in BACKENDS if name != "dense")):
        try:
            out = read(model, ids, backend=backend)
        except UnsupportedError as error:
            verdict = "holds" if repr(backend) in str(error) else "fails"
            yield Row("a backend that cannot refuses by name", str(backend), None, None, verdict, str(error))
            continue
        worst = Difference()
        for ours, reference in zip(out, oracle, strict=True):
            worst.add(ours, reference)
        yield worst.row("backends agree", f"{backend or 'what is chosen by itself'} and dense")


def compiled_step(model: Model) -> Iterator[Row]:
    """The compiled step against the model as it is, token by token, and after a prompt that is read on."""
    name = "the compiled step = the model"
    if model.engine is None:
        yield left_out(name, "there is none: load with compile=True")
        return
    length = min(20, model.spec.context or 20)
    ids, worst, at = random_ids(model, 1, length), Difference(), length // 2
    logits = read(model, ids)[1]
    for parts in ([at, *[1] * (length - at)], [at - 2, 2, *[1] * (length - at)]):
        reader, start = model.engine.start(length), 0
        for part in ids.split(parts, dim=1):
            start += part.shape[1]
            worst.add(reader.read(part), logits[:, start - 1])
    yield worst.row(name, f"{length} tokens, the last {length - at} one by one")


def refusals(model: Model) -> Iterator[Row]:
    ids = random_ids(model, 1, 4)
    tries: tuple[tuple[str, str, Callable[[], Any]], ...] = (
        ("an unknown backend is refused by name", "dens", lambda: read(model, ids, backend="dens")),
        ("an unknown argument is refused by name", "atention_mask", lambda: read(model, ids, atention_mask=None)),
    )
    for name, wrong, attempt in tries:
        try:
            attempt()
        except LaminaError as error:
            yield Row(name, wrong, None, None, "holds" if repr(wrong) in str(error) else "fails", str(error))
        else:
            yield Row(name, wrong, None, None, "fails", "it was accepted")
