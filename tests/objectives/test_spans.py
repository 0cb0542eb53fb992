"""Span corruption against the vectors and the code of T5, and prefixes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import lamina
from lamina.errors import LaminaError, UnsupportedError
from lamina.objectives import PrefixLM, SpanCorruption
from lamina.objectives.spans import composition, corrupted, noise_spans
from lamina.patterns import Causal, Prefix, Window
from tests.objectives.made import prepared, random_of, t5, texts
from tests.small import build, decoder
from tests.tiny import GPT2, T5, spec


@pytest.mark.parametrize(
    "length, size, target", [(64, 70, 14), (128, 141, 29), (256, 284, 58), (512, 568, 114), (1024, 1137, 229)]
)
def test_the_sizes_of_t5(length: int, size: int, target: int):
    """Computed with the function of T5's own preprocessors."""
    spans = SpanCorruption()
    assert spans.text(length) == size
    noise, count = spans.counts(size)
    assert size - noise + count + 1 == length and noise + count + 1 == target


def test_halves_are_rounded_to_even():
    assert SpanCorruption(rate=0.5).counts(5) == (2, 1) and SpanCorruption(rate=0.5, span=2.0).counts(11) == (6, 3)
    assert SpanCorruption().counts(2) == (1, 1) and SpanCorruption(rate=0.9, span=1.0).counts(10) == (9, 1)


def test_every_composition_has_an_equal_chance():
    """5 in 3 parts: 6 ways, and their chi-square at 5 degrees of freedom is below 20.5 in 99.9 % of all cases."""
    random = random_of(0)
    found: dict[tuple[int, ...], int] = {}
    for _ in range(6000):
        parts = tuple(composition(5, 3, random).tolist())
        found[parts] = found.get(parts, 0) + 1
    assert len(found) == 6 and all(sum(parts) == 5 and min(parts) > 0 for parts in found)
    assert sum((count - 1000) ** 2 / 1000 for count in found.values()) < 20.5


def naive(tokens: list[int], noise: list[bool], sentinels: list[int], end: int) -> tuple[list[int], list[int]]:
    """Token by token, as the paper's figure reads, without its closing sentinel."""
    sides: tuple[list[int], list[int]] = ([], [])
    for side, gone in enumerate((True, False)):
        number = 0
        for place, token in enumerate(tokens):
            if noise[place] is not gone:
                sides[side].append(token)
            elif place == 0 or noise[place - 1] is not gone:
                sides[side].append(sentinels[number])
                number += 1
        sides[side].append(end)
    return sides


@pytest.mark.parametrize("rate, span, size", [(0.15, 3.0, 70), (0.5, 3.0, 41), (0.15, 8.0, 100), (0.15, 3.0, 2)])
def test_spans_and_their_sentinels(rate: float, span: float, size: int):
    spans = SpanCorruption(rate=rate, span=span)
    noise, count = spans.counts(size)
    sentinels = np.arange(200, 200 - count, -1)
    for seed in range(50):
        random = random_of(seed)
        mask = noise_spans(size, noise, count, random)
        assert mask.sum() == noise and not mask[0] and mask[-1]
        assert sum(b and not a for a, b in pairwise([False, *mask.tolist()])) == count
        tokens = random.integers(100, size=size)
        found = corrupted(tokens, mask, sentinels, 1)
        expected = naive(tokens.tolist(), mask.tolist(), sentinels.tolist(), 1)
        assert (found["source"].tolist(), found["target"].tolist()) == expected


def test_rows_of_spans(tmp_path: Path):
    words = t5()
    documents = texts(words, (50, 3, 200, 71))
    data = prepared(tmp_path, words, [{"text": one} for one in documents])
    whole = np.concatenate(documents).tolist()
    objective = SpanCorruption()
    rows = objective.examples(data, 64)
    assert len(rows) == len(whole) // 70
    sentinels = [words.tokens[f"<extra_id_{j}>"] for j in range(100)]
    assert sentinels == [words.vocabulary - 1 - j for j in range(100)]
    for index in range(len(rows)):
        one = rows.example(index, random_of(index))
        assert len(one["source"]) == 64 and len(one["target"]) == 14
        filled: list[int] = []
        target, place = one["target"].tolist(), 0
        for token in one["source"].tolist()[:-1]:  # put each span back where its sentinel stands
            if token not in sentinels:
                filled.append(token)
                continue
            assert target[place] == token
            place += 1
            while target[place] not in sentinels and target[place] != words.eos:
                filled.append(target[place])
                place += 1
        assert filled == whole[index * 70 : index * 70 + 70]
    batch = objective.collate([rows.example(i, random_of(i)) for i in range(3)])
    assert batch.asked == {"target": 3 * 14} and batch.tokens == 3 * (64 + 14)
    assert batch.inputs["decoder_input_ids"][:, 1:].equal(batch.labels["target"][:, :-1])
    few = t5(4)
    other = prepared(tmp_path / "few", few, [{"text": one} for one in texts(few, (200,))])
    with pytest.raises(LaminaError, match=r"no token '<extra_id_4>'; rows of this length need 5 sentinels"):
        objective.examples(other, 100)
    with pytest.raises(LaminaError, match="length=2 has no room"):
        objective.examples(data, 2)


def test_a_pair_of_prefix_and_rest(tmp_path: Path):
    words = t5()
    documents = texts(words, (50, 3, 200))
    data = prepared(tmp_path, words, [{"text": one} for one in documents])
    whole = np.concatenate(documents).tolist()
    rows = PrefixLM(pair=True).examples(data, 10)
    prefixes = []
    for index in range(2000):
        one = rows.example(index % len(rows), random_of(index))
        both = [*one["source"].tolist()[:-1], *one["target"].tolist()[:-1]]
        start = index % len(rows) * 9
        assert both == whole[start : start + 9] and one["source"][-1] == one["target"][-1] == words.eos
        prefixes.append(len(one["source"]) - 1)
    counts = np.bincount(prefixes)
    assert len(counts) == 9 and counts[0] == 0 and ((counts[1:] - 250) ** 2 / 250).sum() < 24.3  # 99.9 %, 7 degrees


def test_a_marked_prefix(tmp_path: Path):
    words = t5()
    documents = texts(words, (50, 3, 200))
    data = prepared(tmp_path, words, [{"text": one} for one in documents])
    column = data.column("text")
    objective = PrefixLM()
    rows = objective.examples(data, 8)
    batch = objective.collate([rows.example(i, random_of(i)) for i in range(20)])
    for i in range(20):
        tokens = column.slice(i * 9, i * 9 + 9)
        prefix = int(batch.inputs["marked"][i].sum())
        assert 1 <= prefix <= 8 and batch.inputs["marked"][i].tolist() == [j < prefix for j in range(8)]
        assert batch.inputs["input_ids"][i].tolist() == tokens[:-1].tolist()
        asked = [int(token) if j + 1 >= prefix else -100 for j, token in enumerate(tokens[1:])]
        assert batch.labels["target"][i].tolist() == asked
    model = build(_prefix())
    total = objective.total(model, batch)
    expected = torch.zeros((), dtype=torch.float64)
    logits = model(**batch.inputs).logits
    assert logits is not None
    for row, label in zip(logits.flatten(0, 1), batch.labels["target"].flatten().tolist(), strict=True):
        if label != -100:
            expected = expected - row.log_softmax(-1)[label]
    torch.testing.assert_close(total.kinds["target"].total, expected)


def _prefix() -> lamina.ModelSpec:
    return decoder([Prefix() | Causal(), Prefix() | Window(back=3)], vocabulary=200)


def test_models_that_do_not_fit():
    for objective in (SpanCorruption(), PrefixLM(pair=True)):
        objective.fits(spec(T5))
        with pytest.raises(UnsupportedError, match="needs an encoder that reads ids and a decoder"):
            objective.fits(spec(GPT2))
    PrefixLM().fits(_prefix())
    with pytest.raises(UnsupportedError, match=r"sees a marked prefix: its pattern lacks `\| Prefix\(\)`"):
        PrefixLM().fits(spec(GPT2))
    with pytest.raises(UnsupportedError, match="pair: true"):
        PrefixLM().fits(spec(T5))
