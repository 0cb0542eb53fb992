"""Checks that ask what only a model of lamina can be asked: its spec, its documents, its compiled step."""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
from torch import Tensor

from lamina.conformance.report import Difference, Row, judged, left_out
from lamina.conformance.trial import TOKENS, random_ids, read, text_length
from lamina.layers import CrossAttention, Record
from lamina.model import Model, ModelSpec


def spec_as_json(model: Model) -> Iterator[Row]:
    text = model.spec.to_json()
    again = ModelSpec.from_json(text)
    same = again == model.spec and json.loads(again.to_json()) == json.loads(text)
    yield judged("the spec survives JSON", "the spec, and its JSON read again", float(not same))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    built = {name: tuple(p.shape) for name, p in again.build(device="meta").named_parameters()}
    yield judged("the spec says every shape", f"{len(shapes)} parameters", float(shapes != built))


def documents(model: Model) -> Iterator[Row]:
    """Packed documents, told apart by number."""
    if model.stem is not None:
        yield left_out("packed = alone", "a spectrogram is one text a row")
        return
    length = text_length(model)
    lengths = [length // 2, 3, length - length // 2 - 3]
    ids, worst, pairs = random_ids(model, 1, length), Difference(), model.spec.two_stacks
    source, sizes = random_ids(model, 1, length, seed=98), [3, length // 2, length - length // 2 - 3]
    told = {"input_ids": source, "document_ids": _documents(sizes, ids)} if pairs else None
    more = {f"{'decoder_' if pairs else ''}document_ids": _documents(lengths, ids)}
    packed = [each.split(lengths, dim=1) for each in read(model, ids, source=told, **more)]
    for i, (text, one) in enumerate(zip(ids.split(lengths, dim=1), source.split(sizes, dim=1), strict=True)):
        for ours, alone in zip(packed, read(model, text, source={"input_ids": one}), strict=True):
            worst.add(ours[i], alone)
    what = f"pairs, the sources of {sizes} and the texts of" if pairs else "documents of"
    yield worst.row("packed = alone", f"{what} {lengths} tokens in one row")


def _documents(lengths: list[int], ids: Tensor) -> Tensor:
    return torch.tensor([[i for i, n in enumerate(lengths) for _ in range(n)]], device=ids.device)


def blind_rows(model: Model) -> Iterator[Row]:
    size = min(TOKENS, model.spec.context or TOKENS)
    ids = random_ids(model, 2, size)
    mask = torch.ones_like(ids)
    mask[1] = 0
    record = Record("*.weights")
    read(model, ids, mask, record=record)
    # Of two stacks the decoder's own: what is empty here is its row, and the source is not.
    others = [part.path for part in model.modules() if isinstance(part, CrossAttention)]
    others += ["encoder."] if model.spec.two_stacks else []
    own = {name: value for name, value in record.values.items() if not name.startswith(tuple(others))}
    shares = [value[1] for value in own.values() if value.shape[-2:] == (size, size)]
    worst = max((float(share.abs().max()) for share in shares), default=0.0)
    yield judged("a row of padding attends to nothing", f"the weights of {len(shares)} layers", worst)


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
