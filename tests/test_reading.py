"""From masks, positions and documents, as given, to tokens: against a loop over single tokens."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from lamina.cache import Cache
from lamina.errors import LaminaError
from lamina.reading import read
from lamina.tokens import HOLE


def naive(
    mask: list[int] | None, positions: list[int] | None, documents: list[int] | None, length: int
) -> list[tuple[int, int]]:
    """(position, document) of each token of one row; documents of padding are of no consequence."""
    found, document, last, counts = [], 0, -1, dict[int, int]()
    for t in range(length):
        if mask is not None and not mask[t]:
            found.append((HOLE, 0))
            continue
        if positions is not None:
            position = positions[t]
            if documents is not None:
                document = documents[t]
            elif position <= last:
                document += 1
            last = position
        else:
            document = 0 if documents is None else documents[t]
            position = counts.get(document, 0)
            counts[document] = position + 1
        found.append((position, document))
    return found


def rows(rng: random.Random, length: int) -> tuple[list[int] | None, list[int] | None, list[int] | None]:
    """A row's mask (holes anywhere), positions (with gaps and restarts) and documents (in runs), each there or not."""
    mask = [int(rng.random() < 0.7) for _ in range(length)]
    positions, documents, position, document = [], [], rng.randrange(3), rng.randrange(3)
    for _ in range(length):
        positions.append(position)
        documents.append(document)
        position = 0 if rng.random() < 0.15 else position + rng.choice((1, 1, 1, 3))
        document += rng.random() < 0.2
    return mask, positions, documents


GIVEN = [(m, p, d) for m in (False, True) for p in (False, True) for d in (False, True)]


@pytest.mark.parametrize("with_mask, with_positions, with_documents", GIVEN)
@pytest.mark.parametrize("split", [False, True])
def test_tokens_equal_the_loop(with_mask: bool, with_positions: bool, with_documents: bool, split: bool):
    rng = random.Random(0)
    for _ in range(60):
        length = rng.randrange(1, 13)
        drawn = [rows(rng, length) for _ in range(3)]
        given = [
            [*parts] if on else [None] * 3
            for parts, on in zip(zip(*drawn), (with_mask, with_positions, with_documents))
        ]
        expected = [naive(*(part[row] for part in given), length) for row in range(3)]
        tensors = [None if part[0] is None else torch.tensor(part) for part in given]
        ids = torch.zeros(3, length, dtype=torch.int64)
        cuts = sorted({0, length, *(rng.randrange(length) for _ in range(3))}) if split else [0, length]
        cache = Cache("growing", 3) if split else None
        found: list[list[tuple[int, int]]] = [[], [], []]
        for start, stop in itertools.pairwise(cuts):
            mask, positions, documents = (None if t is None else t[:, start:stop] for t in tensors)
            if tensors[0] is not None and rng.random() < 0.5:
                mask = tensors[0][:, :stop]  # the whole mask so far, as Hugging Face's generate hands it over
            tokens = read(ids[:, start:stop], mask, positions, documents, None, cache)
            if tokens.span is not None:  # a promise: what it says is what is there
                assert torch.equal(tokens.position, torch.arange(*tokens.span).expand(3, -1))
            if cache is not None:
                cache.advance(tokens)
            for row in range(3):
                found[row] += zip(tokens.position[row].tolist(), tokens.document[row].tolist())
        for row in range(3):
            assert [p for p, _ in found[row]] == [p for p, _ in expected[row]]
            real = [(f, e) for (p, f), (_, e) in zip(found[row], expected[row]) if p != HOLE]
            # The same tokens share a document; what it is called matters only where the caller named it.
            assert len(set(real)) == len({f for f, _ in real}) == len({e for _, e in real})
            if with_documents:
                assert all(f == e for f, e in real)


def test_documents_that_alternate_keep_counting():
    """A B A: the second run of A goes on where the first stopped, or a token would see later ones as earlier."""
    documents = torch.tensor([[0, 0, 1, 0, 1, 1], [4, 2, 2, 4, 4, 2]])
    tokens = read(torch.zeros(2, 6), None, None, documents)
    assert tokens.position.tolist() == [[0, 1, 0, 2, 1, 2], [0, 0, 1, 1, 2, 2]]


def test_a_mask_of_ones_is_as_good_as_none():
    ids = torch.zeros(2, 4, dtype=torch.int64)
    assert read(ids, torch.ones(2, 4)).span == (0, 4)
    cache = Cache("growing", 2)
    cache.advance(read(ids, None))
    assert read(ids, torch.ones(2, 8), cache=cache).span == (4, 8)
    assert read(ids, torch.ones(2, 4), cache=cache).span == (4, 8)
    half = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    assert read(ids, half).span is None
    cache.advance(read(ids, half, cache=cache))
    tokens = read(ids, None, cache=cache)  # after padding, each row goes on from its own last token
    assert tokens.span is None and tokens.position[:, 0].tolist() == [7, 8]


def test_marks_are_kept():
    marked = torch.tensor([[1, 0, 0]])
    ids = torch.zeros(2, 3, dtype=torch.int64)
    for mask in (None, torch.tensor([[0, 1, 1], [1, 1, 1]])):
        tokens = read(ids, mask, marked=marked)
        assert tokens.marked is not None and tokens.marked.tolist() == [[True, False, False]] * 2
        assert tokens.span is None
    assert read(ids, torch.tensor([[0, 1, 1], [1, 1, 1]])).marked is None


def test_one_row_of_positions_serves_all():
    ids = torch.zeros(3, 4, dtype=torch.int64)
    tokens = read(ids, None, torch.tensor([[0, 1, 0, 1]]))
    assert tokens.position.tolist() == [[0, 1, 0, 1]] * 3 and tokens.document.tolist() == [[0, 0, 1, 1]] * 3


@pytest.mark.parametrize("name", ["attention_mask", "position_ids", "document_ids", "marked"])
def test_a_wrong_shape_is_refused_by_name(name: str):
    ids = torch.zeros(2, 4, dtype=torch.int64)
    given = {"attention_mask": None, name: torch.ones(2, 3, dtype=torch.int64)}
    with pytest.raises(LaminaError, match=rf"{name} has shape \(2, 3\).*\(2, 4\)"):
        read(ids, **given)
    cache = Cache("growing", 2)
    cache.advance(read(ids, None))
    with pytest.raises(LaminaError, match=r"expected \(2, 4\) or \(2, 8\)"):
        read(ids, torch.ones(2, 5), cache=cache)
