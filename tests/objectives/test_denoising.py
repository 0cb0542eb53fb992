"""BART's denoising against fairseq's loop, written out, and against the Poisson distribution."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lamina.errors import LaminaError, UnsupportedError
from lamina.objectives import Denoising
from lamina.objectives.denoising import infilled, inserted, permuted, span_lengths
from tests.objectives.made import bart, prepared, random_of, texts
from tests.objectives.test_stream import sentences
from tests.tiny import BART, BERT, spec

MASK = 99


def masks(count: int) -> np.ndarray:
    return np.full(count, MASK)


def test_lengths_are_poisson_until_the_sum_is_reached():
    random = random_of(0)
    drawn: list[int] = []
    for words in (1, 7, 30, 100) * 500:
        lengths = span_lengths(words, 3.0, random)
        assert lengths.sum() == words and lengths[-1] > 0 and lengths.min() >= 0
        drawn += lengths[:-1].tolist()
    # Of long rows, where the last draw hardly matters, the spans follow the law: P(0) = 0.0498.
    long = np.concatenate([span_lengths(20_000, 3.0, random)[:-1] for _ in range(10)])
    counts = np.bincount(long, minlength=13)[:13]
    law = np.array([math.exp(-3) * 3**k / math.factorial(k) for k in range(13)]) * len(long)
    assert ((counts - law) ** 2 / law).sum() < 34.5  # 99.9 % at 13 degrees of freedom
    assert span_lengths(0, 3.0, random).tolist() == []


class Given:
    """Draws that a test has chosen."""

    def __init__(self, lengths: list[int], orders: list[list[int]]) -> None:
        self.lengths, self.orders = lengths, orders

    def poisson(self, mean: float, size: int) -> np.ndarray:
        found, self.lengths = self.lengths[:size], self.lengths[size:]
        return np.array(found + [1] * (size - len(found)))

    def permutation(self, count: int) -> np.ndarray:
        return np.array(self.orders.pop(0)) if self.orders else np.arange(count)


def fairseq(tokens: list[int], starts: list[bool], chosen: list[int], lengths: list[int]) -> list[int]:
    """add_whole_word_mask with replace_length=1, word by word: `chosen` words begin spans of `lengths` words."""
    word = [sum(starts[: place + 1]) - 1 for place in range(len(tokens))]
    first = {one: word.index(one) for one in chosen}
    out = []
    for place, token in enumerate(tokens):
        inside = any(
            one <= word[place] < one + length and place != first[one]
            for one, length in zip(chosen, lengths, strict=True)
        )
        if inside:
            continue
        out.append(MASK if place in first.values() else token)
    return out


@pytest.mark.parametrize("seed", range(40))
def test_spans_become_one_mask(seed: int):
    random = random_of(seed)
    size = int(random.integers(4, 40))
    starts = random.random(size) < 0.6
    starts[0] = True
    tokens = random.integers(10, 90, size=size)
    words = int(starts.sum())
    budget = math.ceil(words * 0.3)
    drawn = random.poisson(2.0, size=200).tolist()
    total, lengths = 0, []
    for one in drawn:
        lengths.append(min(one, budget - total))
        total += lengths[-1]
        if total == budget:
            break
    order = random.permutation(words).tolist()
    found = infilled(tokens, starts, 0.3, 2.0, masks, Given(list(drawn), [order]))  # pyright: ignore
    some = [one for one in lengths if one]
    expected = fairseq(tokens.tolist(), starts.tolist(), order[: len(some)], some)
    zeros = min(len(lengths) - len(some), size - len(expected))
    assert found.tolist() == [MASK] * zeros + expected  # this permutation puts new ones first


def test_a_share_of_the_words_is_in_spans():
    random = random_of(1)
    covered = []
    for _ in range(300):
        tokens = np.arange(100, 300)
        found = infilled(tokens, np.ones(200, bool), 0.3, 3.0, masks, random)
        kept = found[found != MASK]
        assert (np.diff(kept) > 0).all() and len(found) < 200
        covered.append(200 - len(kept))
    # 60 words in spans that may overlap: somewhat fewer are gone.
    assert 48 < np.mean(covered) < 60 and max(covered) <= 60


def test_sentences_change_places():
    stops = np.array([c == "." for c in "ab.c..def.gh"])
    tokens = np.arange(12)
    ends = [0, *sentences([int(not one) for one in stops], 0)]
    assert ends == [0, 3, 5, 10]
    seen = set()
    for seed in range(200):
        found = permuted(tokens, stops, 1.0, random_of(seed)).tolist()
        parts = [[0, 1, 2], [3, 4], [5, 6, 7, 8, 9], [10, 11]]
        order = tuple(next(i for i, part in enumerate(parts) if part[0] == found[place]) for place in _starts(found))
        assert [token for i in order for token in parts[i]] == found
        seen.add(order)
    assert len(seen) == 24
    some = [permuted(tokens, stops, 0.5, random_of(seed)).tolist() for seed in range(200)]
    moved = {tuple(row) for row in some}
    assert len(moved) == 7  # two of four change places, or none does


def _starts(found: list[int]) -> list[int]:
    return [place for place, token in enumerate(found) if token in (0, 3, 5, 10)]


def test_insertion_keeps_the_order():
    random = random_of(0)
    places = np.zeros(25)
    for _ in range(4000):
        found = inserted(np.arange(20), masks(5), random)
        assert found[found != MASK].tolist() == list(range(20)) and (found == MASK).sum() == 5
        places += found == MASK
    assert np.abs(places / 4000 - 0.2).max() < 0.03


@pytest.mark.parametrize(
    "changes", [{}, {"random": 0.5}, {"permute": 0.0, "mask": 0.0}, {"insert": 0.4}, {"rotate": 1.0, "mask": 0.0}]
)
def test_rows(tmp_path: Path, changes: dict[str, Any]):
    words = bart()
    documents = texts(words, (50, 3, 200, 71))
    data = prepared(tmp_path, words, [{"text": one} for one in documents])
    whole = np.concatenate(documents).tolist()
    objective = Denoising(**changes)
    rows = objective.examples(data, 32)
    size = int(30 / (1 + objective.insert))
    assert len(rows) == len(whole) // size
    damaged = 0
    for index in range(len(rows)):
        one = rows.example(index, random_of(index))
        for name in ("source", "target"):
            assert one[name][0] == words.bos and one[name][-1] == words.eos and len(one[name]) <= 32
        text = whole[index * size : (index + 1) * size]
        assert one["target"].tolist()[1:-1] == text
        source = one["source"].tolist()[1:-1]
        damaged += source != text
        if objective.mask == 0 and objective.insert == 0:
            assert sorted(source) == sorted(text)
        if objective.rotate:
            doubled = text + text
            permuted_only = objective.permute and sorted(source) == sorted(text)
            assert permuted_only or any(doubled[i : i + size] == source for i in range(size))
        if objective.insert:
            assert source.count(words.mask) >= min(math.ceil(len(text) * 0.3), 1)
        if objective.random == 0 and objective.mask:
            rest = [token for token in source if token != words.mask]
            assert len(rest) < size and not set(rest) - set(text)
    assert (damaged == 0) if changes == {"permute": 0.0, "mask": 0.0} else (damaged > len(rows) // 2)
    batch = objective.collate([rows.example(i, random_of(i)) for i in range(4)])
    assert batch.inputs["decoder_input_ids"][:, 0].eq(-1).all() and batch.asked == {"target": 4 * (size + 2)}
    assert batch.tokens == sum(len(rows.example(i, random_of(i))["source"]) for i in range(4)) + 4 * (size + 2)


def test_what_is_refused(tmp_path: Path):
    Denoising().fits(spec(BART))
    with pytest.raises(UnsupportedError, match="denoising needs an encoder that reads ids and a decoder"):
        Denoising().fits(spec(BERT))
    with pytest.raises(LaminaError, match="permute is 2.0; it must lie within 0 and 1"):
        Denoising(permute=2.0)
    words = bart()
    data = prepared(tmp_path, words, [{"text": one} for one in texts(words)])
    with pytest.raises(LaminaError, match="length=2 has no room"):
        Denoising().examples(data, 2)
