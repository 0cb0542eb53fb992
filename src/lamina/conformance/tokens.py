"""Checks of how tokens see each other: padded, packed, in another order or alone, a text gives the same numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lamina.conformance.report import Difference, Row, gap, judged, left_out, refused
from lamina.conformance.subject import Source, Subject, positions, random_ids
from lamina.errors import UnsupportedError


def padding(subject: Subject) -> Iterator[Row]:
    facts = subject.facts
    lengths = [facts.length, facts.length - 5, 3]
    ids = random_ids(subject, 3, facts.length)
    for side in ("right", "left"):
        mask, spans = _padded(ids, lengths, side)
        worst, together = Difference(), subject.read(ids, mask)
        for row, span in enumerate(spans):
            for ours, alone in zip(together, subject.read(ids[row : row + 1, span]), strict=True):
                worst.add(ours[row : row + 1, span], alone)
        yield worst.row(f"padded on the {side} = alone", f"rows of {lengths} tokens in one batch")
        if facts.two_stacks and (not facts.hears or side == "right"):
            yield _padded_sources(subject, lengths, side)


def _padded(ids: Tensor, lengths: list[int], side: str) -> tuple[Tensor, list[slice]]:
    length = ids.shape[-1]
    spans = [slice(0, n) if side == "right" else slice(length - n, length) for n in lengths]
    mask = torch.zeros((len(lengths), length), dtype=torch.int64, device=ids.device)
    for row, span in enumerate(spans):
        mask[row, span] = 1
    return mask, spans


def _padded_sources(subject: Subject, lengths: list[int], side: str) -> Row:
    texts, content, worst = random_ids(subject, len(lengths), 7, seed=1), subject.sources(lengths), Difference()
    mask, spans = _padded(content, lengths, side)
    together = subject.read(texts, source=Source(content, mask))
    for row, span in enumerate(spans):
        one = Source(content[row : row + 1, ..., span])
        for ours, alone in zip(together, subject.read(texts[row : row + 1], source=one), strict=True):
            worst.add(ours[row : row + 1], alone)
    what = "frames" if subject.facts.hears else "tokens"
    return worst.row(f"sources padded on the {side} = alone", f"sources of {lengths} {what} in one batch")


def order(subject: Subject) -> Iterator[Row]:
    ids, index = random_ids(subject, 4, subject.facts.length), torch.tensor([2, 0, 3, 1])
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    before, after = subject.read(ids, mask), subject.read(ids[index], mask[index])
    worst = Difference()
    real = mask[index].bool()
    for ours, reference in zip(after, before, strict=True):
        worst.add(ours[real], reference[index][real])
    yield worst.row("the order of rows changes nothing", "4 rows in another order, one of them padded")


def packing(subject: Subject) -> Iterator[Row]:
    """Documents in one row, told apart by positions that restart, and by nothing else."""
    name, facts = "packed = alone", subject.facts
    if facts.hears or facts.first is None:
        why = "a spectrogram is one text a row" if facts.hears else "the model takes no positions"
        yield left_out(f"{name}, told by positions", why)
        return
    length = facts.length
    lengths, sizes = [length // 2, 3, length - length // 2 - 3], [3, length // 2, length - length // 2 - 3]
    ids, content = random_ids(subject, 1, length), subject.sources([length]) if facts.two_stacks else None
    told = positions(subject, *lengths)
    source = None if content is None else Source(content, positions=positions(subject, *sizes))
    texts = ids.split(lengths, dim=1)
    sources = [None] * 3 if content is None else [Source(one) for one in content.split(sizes, dim=1)]
    alone = [subject.read(text, source=one) for text, one in zip(texts, sources, strict=True)]
    what = f"pairs, the sources of {sizes} and the texts of" if facts.two_stacks else "documents of"
    ways: list[tuple[str, Tensor | None, str]] = [("", None, ""), (" and a mask of ones", torch.ones_like(ids), "")]
    ways += [(" with a cache", None, kind) for kind in facts.caches[:1]]
    for said, mask, kind in ways:
        try:
            cache = subject.new_cache(kind, 1, length) if kind else None
            whole = subject.read(ids, mask, positions=told, source=source, cache=cache)
        except UnsupportedError as error:
            yield refused(f"{name}, told by positions{said}", error)
            continue
        worst = Difference()
        for at, one in enumerate(alone):
            for ours, reference in zip(whole, one, strict=True):
                worst.add(ours.split(lengths, dim=1)[at], reference)
        yield worst.row(f"{name}, told by positions{said}", f"{what} {lengths} tokens in one row")


def placing(subject: Subject) -> Iterator[Row]:
    """Positions that are handed over are heeded or refused: ignored in silence they are a text that was never asked.

    A model without any way of telling positions heeds a restart, which begins a document, and no gap.
    """
    name, ids = "positions are heeded or refused", random_ids(subject, 1, 8)
    if not subject.facts.placed:
        yield left_out(name, "no part of the model knows positions")
        return
    try:
        moved = [subject.read(ids, positions=positions(subject, 4, 4, gap=gap)) for gap in (3, 0)]
    except (TypeError, ValueError) as error:
        yield Row(name, "refused", None, None, "holds", " ".join(str(error).split())[:200])
        return
    plain = subject.read(ids)
    ignored = all(torch.equal(a, b) for one in moved for a, b in zip(one, plain, strict=True))
    note = "neither changes a bit" if ignored else ""
    yield judged(name, "a gap of 3 after the fourth token, and a restart there", float(ignored), note=note)


def empty_rows(subject: Subject) -> Iterator[Row]:
    ids = random_ids(subject, 2, subject.facts.length)
    mask = torch.ones_like(ids)
    mask[1] = 0
    bad = sum(int((~torch.isfinite(each)).sum()) for each in subject.read(ids, mask))
    yield judged("a row of padding gives no NaN", "a row of text and one of padding", float(bad))


def hidden_nan(subject: Subject) -> Iterator[Row]:
    """What padding holds, even NaN, reaches nothing: kernels that multiply it by a zero hand it on."""
    ids, worst = random_ids(subject, 2, subject.facts.length), Difference()
    for side in ("right", "left"):
        mask, spans = _padded(ids, [ids.shape[1], ids.shape[1] - 5], side)

        def poison(module: object, given: tuple[Tensor, ...], out: Tensor, mask: Tensor = mask) -> Tensor:
            here = given[0].shape == ids.shape and torch.equal(given[0], ids)  # and not what an encoder reads
            return out.masked_fill(~mask.bool()[..., None], math.nan) if here else out

        before = subject.read(ids, mask)
        handle = subject.embedding().register_forward_hook(poison)
        try:
            after = subject.read(ids, mask)
        finally:
            handle.remove()
        for ours, reference in zip(after, before, strict=True):
            worst.add(ours[:1], reference[:1])
            worst.add(ours[1, spans[1]], reference[1, spans[1]])
    yield worst.row("NaN in padding reaches no token", "5 embeddings on either side")


def causality(subject: Subject) -> Iterator[Row]:
    name, facts = "later tokens change no earlier bit", subject.facts
    if facts.causal:
        yield left_out(name, facts.causal)
        return
    ids = random_ids(subject, 1, facts.length)
    before, worst, moved = subject.read(ids), Difference(), math.inf
    places = sorted({1, facts.length // 2, facts.length - 1})
    for at in places:
        changed = ids.clone()
        changed[0, at] = facts.choices[(int((facts.choices == ids[0, at]).nonzero()) + 1) % len(facts.choices)]
        after = subject.read(changed)
        for ours, reference in zip(after, before, strict=True):
            worst.add(ours[:, :at], reference[:, :at])
        moved = min(moved, gap(before[0][:, at:], after[0][:, at:]))
    allow, note = (worst.allowed, f"to rounding: {facts.exact}") if facts.exact else (0.0, "")
    said = f"token {', '.join(map(str, places))} of {facts.length} changed"
    row = judged(name, said, worst.worst, allow, note)
    yield row if moved > 0 else replace(row, verdict="fails", note="a changed token changed nothing at all")
