"""Checks of a model that reads what was retrieved: with none it is the model without, nothing comes too early, and
decoding brings the neighbours of each chunk when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lamina.conformance.report import Difference, Row, gap, judged, left_out
from lamina.conformance.trial import random_ids, read
from lamina.model import Model

COUNT = 2  # neighbours of a chunk


def retrieval(model: Model) -> Iterator[Row]:
    said = model.spec.retrieval
    length = 0 if said is None else min(2 * said.chunk + max(said.chunk // 2, 1), model.spec.context or 2**20)
    if said is None or said.encoder is None or length < said.chunk:
        yield left_out("neighbours are read from the end of their chunk on", "the model does not retrieve")
        return
    m, chunks = said.chunk, length // said.chunk
    ids = random_ids(model, 1, length)
    generator, vocabulary = torch.Generator().manual_seed(1), said.encoder.embedding.vocabulary
    found = torch.randint(vocabulary, (1, chunks, COUNT, 2 * m), generator=generator).to(ids.device)
    whole, bare = read(model, ids, neighbours=found), read(model, ids)
    none = read(model, ids, neighbours=torch.full_like(found, -1))
    worst = max(gap(a, b) for a, b in zip(none, bare, strict=True))
    yield judged("without neighbours it is the model without retrieval", f"{length} tokens", worst)
    yield _causal(model, ids, found, whole, m)
    yield _decoded(model, ids, found, whole, m)


def _causal(model: Model, ids: Tensor, found: Tensor, whole: list[Tensor], m: int) -> Row:
    early, unmoved = 0.0, False
    for chunk in range(found.shape[1]):
        other, first = found.clone(), (chunk + 1) * m - 1
        other[:, chunk] = found[:, chunk].flip(-1)
        for ours, before in zip(read(model, ids, neighbours=other), whole, strict=True):
            early = max(early, gap(ours[:, :first], before[:, :first]))
            unmoved |= bool(torch.equal(ours[:, first], before[:, first]))
    name = "neighbours are read from the end of their chunk on"
    row = judged(name, f"{found.shape[1]} chunks of {m} tokens, other neighbours for each", early)
    closed = "nothing reads them: are the gates at zero?"
    return replace(row, verdict="not tried", note=closed) if unmoved and row.verdict == "holds" else row


def _decoded(model: Model, ids: Tensor, found: Tensor, whole: list[Tensor], m: int) -> Row:
    """A prompt that ends within a chunk, then one token at a time, across the end of the chunk and of the text."""
    length, worst = ids.shape[1], Difference()
    start, parts = max(length - m - 2, 1), []
    cache, pieces = model.new_cache("auto", 1), [start, *[1] * (length - start)]
    begin = 0
    for part in ids.split(pieces, dim=1):
        end = begin + part.shape[1]
        parts.append(read(model, part, cache=cache, neighbours=found[:, begin // m : end // m]))
        begin = end
    for pieces_of, reference in zip(zip(*parts, strict=True), whole, strict=True):
        worst.add(torch.cat(pieces_of, dim=1), reference)
    return worst.row("decoding with neighbours = the whole text", f"{start} tokens, then {length - start} one by one")
