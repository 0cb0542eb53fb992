"""Checks of each kind of attention by itself, with small random heads: the pattern, blind queries, hidden NaN."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lamina.attend import BACKENDS, Request, attend
from lamina.conformance.report import Row, gap, judged, left_out
from lamina.conformance.trial import TOKENS, SelfAttentionSpec, attentions
from lamina.errors import UnsupportedError
from lamina.model import Model
from lamina.patterns import Both, Either, Pattern
from lamina.tokens import HOLE, Tokens, plain

WIDEST = 4096  # windows beyond this are not tried: their mask has more than 16 million places
SIZE = 8  # of a head


def reach(model: Model) -> Iterator[Row]:
    """Locality and causality of one layer: a changed key reaches the queries that the pattern says, and no other."""
    for pattern, spec in {spec.pattern: spec for spec in attentions(model)}.items():
        name, recent = f"attention reaches as far as {say(pattern)} says", pattern.retained().recent
        if recent is not None and recent > WIDEST:
            yield left_out(name, f"the window is wider than {WIDEST} tokens")
            continue
        length = TOKENS if recent is None else max(TOKENS, recent + 8)
        places, wrong = sorted({0, 1, length // 3, length - 1}), 0
        request = _request(spec, plain(1, length), plain(1, length))
        mask = request.mask().expand(1, 1, length, length)[0, 0]
        request = _repeated(request, len(places))  # a row for each key that is changed
        value = request.value.clone()
        for row, at in enumerate(places):
            value[row, :, at] += 8.0
        serving = _serving(request)
        for backend, before in serving.items():
            reached = (attend(replace(request, value=value), backend) != before).any(dim=3).any(dim=1)  # (rows, T)
            for row, at in enumerate(places):
                wrong += int((reached[row] & ~mask[:, at]).sum()) + int((mask[at, at] & ~reached[row, at]).sum())
        yield judged(
            name, f"keys {', '.join(map(str, places))} of {length} changed; {', '.join(serving)}", float(wrong)
        )


def blindness(model: Model) -> Iterator[Row]:
    zeros, leaks, tried = 0.0, 0.0, set()
    here = plain(2, TOKENS)
    elsewhere = Tokens(here.position, here.document + 1)
    seen = TOKENS - 3
    holes = Tokens(torch.where(here.position < seen, here.position, HOLE), here.document)
    for spec in attentions(model):
        blind, padded = _request(spec, elsewhere, here), _request(spec, holes, holes)
        value = padded.value.clone()
        value[:, :, seen:] = math.nan
        for backend, out in _serving(blind).items():
            zeros = max(zeros, gap(out, torch.zeros_like(out)))
            before, after = attend(padded, backend), attend(replace(padded, value=value), backend)
            leaks = max(leaks, gap(before[:, :, :seen], after[:, :, :seen]))
            tried.add(backend)
    if not tried:
        yield left_out("a query that sees no key gives zeros", "the model has no attention of the usual kind")
        return
    said = f"{len(attentions(model))} kinds of attention; {', '.join(sorted(tried))}"
    yield judged("a query that sees no key gives zeros", said, zeros)
    yield judged("NaN in keys that nobody sees does not leak", said, leaks)


def say(pattern: Pattern) -> str:
    """A pattern in one word or two."""
    if isinstance(pattern, Both | Either):
        sign = "&" if isinstance(pattern, Both) else "|"
        return f"{say(pattern.first)} {sign} {say(pattern.second)}"
    fields = pattern.__dataclass_fields__.items()
    given = [f"{name}={value}" for name, field in fields if (value := getattr(pattern, name)) != field.default]
    return f"{type(pattern).__name__}({', '.join(given)})"


def _request(spec: SelfAttentionSpec, queries: Tokens, keys: Tokens) -> Request:
    generator = torch.Generator().manual_seed(0)
    batch, length = keys.position.shape
    # As many heads as share a key head, and one more key head where there are several.
    key_heads = getattr(spec, "key_heads", 1)  # of latent attention, absorbed, one
    groups = min(key_heads, 2)
    heads = groups * (spec.heads // key_heads)
    shapes = ((batch, heads, length, SIZE), (batch, groups, length, SIZE), (batch, groups, length, SIZE))
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    sink = torch.zeros(heads) if getattr(spec, "sink", False) else None
    softcap = getattr(spec, "softcap", None)
    return Request(query, key, value, queries, keys, spec.pattern, SIZE**-0.5, softcap=softcap, sink=sink)


def _repeated(request: Request, rows: int) -> Request:
    """The same row, several times."""
    query, key, value = (tensor.expand(rows, -1, -1, -1) for tensor in (request.query, request.key, request.value))
    tokens = plain(rows, request.query.shape[2])
    return replace(request, query=query, key=key, value=value, queries=tokens, keys=tokens, memo={})


def _serving(request: Request) -> dict[str, Tensor]:
    """What the backends give that do not refuse `request`."""
    serving = {}
    for backend in BACKENDS:
        try:
            serving[backend] = attend(request, backend)
        except UnsupportedError:
            continue
    return serving
