"""The distribution that is sampled: against naive filters, and by counting what is drawn."""

import math

import pytest
import torch

from lamina.errors import LaminaError
from lamina.generation import Sampling

LOGITS = torch.tensor([2.0, 1.5, 1.4, 0.3, 0.0, -0.5, -1.0, -4.0])


def naive(logits: list[float], temperature=1.0, top_k=None, top_p=None, min_p=None) -> list[float]:
    """One row, one token at a time: temperature, then top-k, top-p, min-p, each on what the one before left."""

    def normal(scores: dict[int, float]) -> dict[int, float]:
        total = sum(math.exp(s) for s in scores.values())
        return {i: math.exp(s) / total for i, s in scores.items()}

    scores = {i: logit / temperature for i, logit in enumerate(logits)}
    ranked = sorted(scores, key=lambda i: -scores[i])
    if top_k is not None:
        ranked = ranked[:top_k]
    if top_p is not None:
        shares, kept, total = normal({i: scores[i] for i in ranked}), [], 0.0
        for i in ranked:
            if total >= top_p:
                break
            kept.append(i)
            total += shares[i]
        ranked = kept
    shares = normal({i: scores[i] for i in ranked})
    if min_p is not None:
        most = max(shares.values())
        shares = {i: share for i, share in shares.items() if share >= min_p * most}
    total = sum(shares.values())
    return [shares.get(i, 0.0) / total for i in range(len(logits))]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": 100},
        {"top_p": 0.5},
        {"top_p": 0.8},
        {"top_p": 1.0},
        {"top_p": 1e-9},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
    ],
    ids=str,
)
def test_filters_equal_naive_ones(options):
    ours = Sampling(**{"temperature": 1.0} | options).probabilities(LOGITS[None])[0]
    expected = torch.tensor(naive(LOGITS.tolist(), **options))
    assert torch.allclose(ours, expected, atol=1e-6), (ours, expected)
    assert bool(((ours == 0) == (expected == 0)).all())


def test_draws_follow_the_distribution():
    """Chi-square over 20,000 draws; 18.5 is the 99.5 % point for 7 - 1 degrees of freedom."""
    sampling = Sampling(temperature=1.3, top_k=7, seed=5)
    generator = sampling.generator(torch.device("cpu"))
    shares = sampling.probabilities(LOGITS[None])[0]
    drawn = sampling.choose(LOGITS.expand(20_000, -1), generator).bincount(minlength=8)
    assert drawn[7] == 0
    expected = shares[:7] * 20_000
    assert float(((drawn[:7] - expected) ** 2 / expected).sum()) < 18.5


def test_temperature_zero_is_the_largest_logit():
    assert Sampling().choose(LOGITS[None].flip(1), None).tolist() == [7]


def test_one_seed_gives_one_sequence_and_others_differ():
    rows = LOGITS.expand(64, -1)

    def draw(seed):
        sampling = Sampling(temperature=1.0, seed=seed)
        return sampling.choose(rows, sampling.generator(torch.device("cpu"))).tolist()

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize(
    "name, value",
    [
        *(("temperature", v) for v in (math.nan, math.inf, -1, -1e-9, 1e9, "hot", True)),
        *(("top_p", v) for v in (0, 0.0, 1.1, -0.5, math.nan)),
        *(("min_p", v) for v in (-0.1, 1.1, math.nan)),
        *(("top_k", v) for v in (0, -1, 2.5, True)),
        *(("seed", v) for v in (-1, 2**63, 2**70, 1.5)),
    ],
)
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(LaminaError, match=f"^{name} is "):
        Sampling(**{name: value})
