"""Checks of decoding: in whatever pieces, a text gives the numbers of the whole; what is written repeats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lamina.conformance.report import Difference, Row, judged, left_out, refused
from lamina.conformance.subject import LARGE, LONGEST, Subject, parameters, random_ids
from lamina.errors import UnsupportedError


def cached_decoding(subject: Subject) -> Iterator[Row]:
    name, facts = "cached decoding = the whole text", subject.facts
    if not facts.caches:
        yield left_out(name, "there is no cache")
        return
    length = facts.length
    ids = random_ids(subject, 2, length)
    whole = subject.read(ids)
    # Each step of a large model reads all its weights: it takes its last six tokens one by one, a small one all.
    large = parameters(subject) > LARGE
    some = ([length - 6, *[1] * 6], [length // 2, length - length // 2], [3, 1, length - 4])
    every = ([1] * length, [3, 1, length - 4], *([at, length - at] for at in range(1, length)))
    said = "the last 6 one by one, in halves, as 3 + 1 + rest" if large else "one by one, as 3 + 1 + rest, cut anywhere"
    for kind in facts.caches:
        worst = Difference()
        try:
            for split in some if large else every:
                cache = subject.new_cache(kind, 2, length)
                _compare(worst, [subject.read(part, cache=cache) for part in ids.split(split, dim=1)], whole)
        except UnsupportedError as error:
            yield refused(f"{name}, cache {kind!r}", error)
            continue
        yield worst.row(f"{name}, cache {kind!r}", f"{length} tokens {said}")
    yield _padded_decoding(subject, ids)
    yield _beyond(subject)


def _padded_decoding(subject: Subject, ids: Tensor) -> Row:
    length = ids.shape[1]
    name, mask, worst = "a padded row decodes as it does alone", torch.ones_like(ids), Difference()
    mask[1, :5] = 0
    steps = (slice(0, length - 4), *(slice(at, at + 1) for at in range(length - 4, length)))
    try:
        cache = subject.new_cache(subject.facts.caches[0], 2, length)
        parts = [[each[1:] for each in subject.read(ids[:, at], mask[:, at], cache=cache)] for at in steps]
    except UnsupportedError as error:
        return refused(name, error)
    parts[0] = [each[:, 5:] for each in parts[0]]
    _compare(worst, parts, subject.read(ids[1:, 5:]))
    return worst.row(name, "5 of padding on its left, then 4 steps")


def _beyond(subject: Subject) -> Row:
    """Where phases depend on the length of a text, keys that were kept have those of a shorter one."""
    name, context = "cached decoding = the whole text, beyond the trained length", subject.facts.context
    if context is None or context > LONGEST:
        return left_out(name, "none is known" if context is None else f"it is above {LONGEST} tokens")
    ids, worst = random_ids(subject, 1, context + 8), Difference()
    try:
        whole = subject.read(ids)
    except (IndexError, RuntimeError, ValueError) as error:
        return left_out(name, f"nothing is read beyond it: {' '.join(str(error).split())[:100]}")
    try:
        cache = subject.new_cache(subject.facts.caches[0], 1, context + 8)
        pieces = [context - 1, 4, *[1] * 5]
        _compare(worst, [subject.read(part, cache=cache) for part in ids.split(pieces, dim=1)], whole)
    except UnsupportedError as error:
        return Row(name, "refused", None, None, "holds", str(error))
    said = f"{context - 1} tokens, 4, then 5 one by one; {context} are the trained length"
    # A state that goes through all of a text (memory tokens) lets rounding grow: by how much, a text tells whose
    # embeddings are off by one unit of precision.
    grown = Difference()
    handle = subject.embedding().register_forward_hook(_one_unit_off)
    try:
        for off, reference in zip(subject.read(ids), whole, strict=True):
            grown.add(off, reference)
    finally:
        handle.remove()
    if GROWS * grown.worst > FELT * max(float(each.abs().max()) for each in whole):
        return left_out(name, f"one rounding at the start already changes numbers by {grown.worst:.0e}")
    return judged(name, said, worst.worst, max(worst.allowed, GROWS * grown.worst))


GROWS, FELT = 16, 0.01
"""How much more than one rounding at the start those of all layers and pieces may come to; and the share of the largest
number beyond which a difference of that size would say nothing."""


def _one_unit_off(module: object, given: object, out: Tensor) -> Tensor:
    signs = torch.randint(2, out.shape, generator=torch.Generator().manual_seed(0)).to(out) * 2 - 1
    return out * (1 + torch.finfo(out.dtype).eps * signs)


def _compare(worst: Difference, parts: list[list[Tensor]], whole: list[Tensor]) -> None:
    for pieces, reference in zip(zip(*parts, strict=True), whole, strict=True):
        worst.add(torch.cat(pieces, dim=1), reference)


def repeated_generation(subject: Subject) -> Iterator[Row]:
    name, facts = "generating twice gives the same", subject.facts
    if facts.generates:
        yield left_out(name, facts.generates)
        return
    try:
        yield from _generated(subject, name)
    except UnsupportedError as error:
        yield refused(name, error)


def _generated(subject: Subject, name: str) -> Iterator[Row]:
    ids = random_ids(subject, 1, 4, seed=98)
    room = min(6, (subject.facts.context or 10) - 4)
    ways: dict[str, dict[str, Any]] = {"greedy": {}, "sampled with a seed": {"seed": 7}}
    for said, options in ways.items():
        first, second = (subject.generate(ids, room, **options) for _ in range(2))
        yield judged(name, f"{room} tokens, {said}", float(not torch.equal(first, second)))
    first = subject.generate(ids, room)
    subject.generate(random_ids(subject, 3, 3, seed=5), 2, beams=2)
    again = subject.generate(ids, room)
    said = "another batch, with beams, between two"
    yield judged("what was generated before changes nothing", said, float(not torch.equal(first, again)))
    # Beams change rows at every step: a state that stays behind is another beam's.
    several = random_ids(subject, 2, 4, seed=6)
    with_cache, without = (subject.generate(several, room, beams=3, cached=cached) for cached in (True, False))
    said = f"{room} tokens, 3 beams, 2 texts"
    yield judged("beams with a cache = without", said, float(not torch.equal(with_cache, without)))
