"""Checks of how tokens see each other: cached, padded, packed or alone, a text gives the same numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lamina.cache import KINDS
from lamina.conformance.report import Difference, Row, gap, judged, left_out
from lamina.conformance.trial import TOKENS, SelfAttentionSpec, random_ids, random_sources, read, text_length
from lamina.errors import UnsupportedError
from lamina.layers import CrossAttention, ExpertsSpec, Record
from lamina.model import Model, of_text
from lamina.patterns import allowed
from lamina.tokens import plain

LARGE = 50_000_000  # parameters


def cached_decoding(model: Model) -> Iterator[Row]:
    name = "cached decoding = the whole text"
    if model.decoder is None:
        yield left_out(name, "there is no decoder")
        return
    length = text_length(model)
    ids = random_ids(model, 2, length)
    whole = read(model, ids)
    # Each step of a large model reads all its weights: it takes its last six tokens one by one, a small one all.
    large = sum(p.numel() for p in model.parameters()) > LARGE
    single = [length - 6, *[1] * 6] if large else [1] * length
    splits = (single, [length // 2, length - length // 2], [3, 1, length - 4])
    said = f"{length} tokens{', the last 6' if large else ''} one by one, in halves, as 3 + 1 + rest"
    for kind in KINDS:
        worst = Difference()
        try:
            for split in splits:
                cache = model.new_cache(kind, 2, length)
                _compare(worst, [read(model, part, cache=cache) for part in ids.split(split, dim=1)], whole)
        except UnsupportedError as error:
            yield left_out(f"{name}, cache {kind!r}", f"refused: {error}")
            continue
        yield worst.row(f"{name}, cache {kind!r}", said)
    yield _padded_decoding(model, ids)


def _padded_decoding(model: Model, ids: Tensor) -> Row:
    length = ids.shape[1]
    mask, worst = torch.ones_like(ids), Difference()
    mask[1, :5] = 0
    cache = model.new_cache("auto", 2, length)
    steps = (slice(0, length - 4), *(slice(at, at + 1) for at in range(length - 4, length)))
    parts = [[each[1:] for each in read(model, ids[:, at], mask[:, at], cache=cache)] for at in steps]
    parts[0] = [each[:, 5:] for each in parts[0]]
    _compare(worst, parts, read(model, ids[1:, 5:]))
    return worst.row("a padded row decodes as it does alone", "5 of padding on its left, then 4 steps")


def _compare(worst: Difference, parts: list[list[Tensor]], whole: list[Tensor]) -> None:
    for pieces, reference in zip(zip(*parts, strict=True), whole, strict=True):
        worst.add(torch.cat(pieces, dim=1), reference)


def padding(model: Model) -> Iterator[Row]:
    length = text_length(model)
    lengths = [length, length - 5, 3]
    ids = random_ids(model, 3, length)
    for side in ("right", "left"):
        spans = [slice(0, n) if side == "right" else slice(length - n, length) for n in lengths]
        mask, worst = torch.zeros_like(ids), Difference()
        for row, span in enumerate(spans):
            mask[row, span] = 1
        together = read(model, ids, mask)
        for row, span in enumerate(spans):
            for ours, alone in zip(together, read(model, ids[row : row + 1, span]), strict=True):
                worst.add(ours[row : row + 1, span], alone)
        yield worst.row(f"padded on the {side} = alone", f"rows of {lengths} tokens in one batch")
        if model.spec.two_stacks and (model.spec.reads_ids or side == "right"):
            yield _padded_sources(model, lengths, side)


def _padded_sources(model: Model, lengths: list[int], side: str) -> Row:
    texts, sources, worst = random_ids(model, len(lengths), 7, seed=1), random_sources(model, lengths), Difference()
    mask = torch.zeros((len(lengths), sources.shape[-1]), dtype=torch.int64, device=sources.device)
    spans = [slice(0, n) if side == "right" else slice(mask.shape[1] - n, mask.shape[1]) for n in lengths]
    for row, span in enumerate(spans):
        mask[row, span] = 1
    together = read(model, texts, source={model.reads: sources, "attention_mask": mask})
    for row, span in enumerate(spans):
        one = {model.reads: sources[row : row + 1, ..., span]}
        for ours, alone in zip(together, read(model, texts[row : row + 1], source=one), strict=True):
            worst.add(ours[row : row + 1], alone)
    what = "tokens" if model.spec.reads_ids else "frames"
    return worst.row(f"sources padded on the {side} = alone", f"sources of {lengths} {what} in one batch")


def packing(model: Model) -> Iterator[Row]:
    if not model.spec.reads_ids:
        yield left_out("packed = alone", "a spectrogram is one text a row")
        return
    length = text_length(model)
    lengths = [length // 2, 3, length - length // 2 - 3]
    ids, worst, pairs = random_ids(model, 1, length), Difference(), model.spec.two_stacks
    source, sizes = random_sources(model, [length]), [3, length // 2, length - length // 2 - 3]
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


def empty_rows(model: Model) -> Iterator[Row]:
    ids = random_ids(model, 2, min(TOKENS, model.spec.context or TOKENS))
    mask = torch.ones_like(ids)
    mask[1] = 0
    record = Record("*.weights")
    out = read(model, ids, mask, record=record)
    bad = sum(int((~torch.isfinite(each)).sum()) for each in out)
    yield judged("a row of padding gives no NaN", "hidden states and logits", float(bad))
    size = ids.shape[1]
    # Of two stacks the decoder's own: what is empty here is its row, and the source is not.
    others = [part.path for part in model.modules() if isinstance(part, CrossAttention)]
    others += ["encoder."] if model.spec.two_stacks else []
    own = {name: value for name, value in record.values.items() if not name.startswith(tuple(others))}
    shares = [value[1] for value in own.values() if value.shape[-2:] == (size, size)]
    worst = max((float(share.abs().max()) for share in shares), default=0.0)
    yield judged("a row of padding attends to nothing", f"the weights of {len(shares)} layers", worst)


def causality(model: Model) -> Iterator[Row]:
    name = "later tokens change no earlier bit"
    if model.spec.decoder is None:
        yield left_out(name, "there is no decoder")
        return
    length = text_length(model)
    tokens = plain(1, length)
    for part in of_text(model.spec.decoder):
        if isinstance(part, SelfAttentionSpec):
            mask = allowed(part.pattern, tokens.query(), tokens.key()).expand(1, length, length)
            if bool(mask.triu(1).any()):
                yield left_out(name, f"{type(part.pattern).__name__} looks ahead")
                return
    ids = random_ids(model, 1, length)
    before, worst, moved = read(model, ids), Difference(), math.inf
    places = sorted({1, length // 2, length - 1})
    for at in places:
        changed = ids.clone()
        changed[0, at] = (changed[0, at] + 1) % model.spec.embedding.vocabulary
        after = read(model, changed)
        for ours, reference in zip(after, before, strict=True):
            worst.add(ours[:, :at], reference[:, :at])
        moved = min(moved, gap(before[0][:, at:], after[0][:, at:]))
    experts = any(isinstance(part, ExpertsSpec) for _, part in model.spec.decoder.walk())
    allow, note = (worst.allowed, "to rounding: an expert's product has other rows beside it") if experts else (0.0, "")
    row = judged(name, f"token {', '.join(map(str, places))} of {length} changed", worst.worst, allow, note)
    yield row if moved > 0 else replace(row, verdict="fails", note="a changed token changed nothing at all")
